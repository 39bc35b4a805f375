"""The report: what it measures, and a page that is whole by itself."""

import dataclasses
import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sws_export.cli import main

from graph_passes.parameters import SwsParameters, diamond_offsets
from sws_export import ExportOptions, SwsOptions, export
from sws_export.errors import OptionError
from sws_export.manifest import read_manifest
from sws_export.reference import band_from_dense, blended_transport, dense_from_band
from sws_export.report.charts import line_chart, spread
from sws_export.report.explanation import Explanation, SiteMetrics, StepMetrics
from sws_export.report.page import render
from sws_export.report.report import write_report

STEPS = 3
MAPS = 6

Reported = tuple[Explanation, str]


@pytest.fixture(scope="module")
def reported(sws_graph: Path, random_unet: Path, tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """By the reference: the graph does not contain it."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    explanation = write_report(sws_graph, random_unet, out, steps=STEPS, intensity=1.0, height=12, width=8)
    return explanation, out.read_text("utf-8")


@pytest.fixture(scope="module")
def measured(metrics_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """By the graph itself, without its checkpoint."""
    out = tmp_path_factory.mktemp("measured") / "report.html"
    explanation = write_report(metrics_graph, None, out, steps=STEPS, intensity=1.0, height=12, width=8)
    return explanation, out.read_text("utf-8")


class _Tags(HTMLParser):
    """Tags that are open, and everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("how", ["reported", "measured"])
def test_metrics_obey_the_method(request: pytest.FixtureRequest, how: str) -> None:
    explanation: Explanation = request.getfixturevalue(how)[0]
    parameters = SwsParameters()
    assert len(explanation.steps) == STEPS
    assert [step.sigma for step in explanation.steps] == sorted(
        (step.sigma for step in explanation.steps), reverse=True
    )
    for step in explanation.steps:
        assert step.effect > 0
        assert step.seconds > 0
        assert step.kl_cap == pytest.approx(parameters.kl_slope * (1 - step.progress) + parameters.kl_floor)
        assert [state.shape for state in step.states.values()] == [(145, 6, 4)]
        for site in step.sites.values():
            assert 0 <= site.kl <= step.kl_cap
            assert 0 < site.uncertainty < 1
            assert 0 < site.entropy_min <= site.entropy_mean <= site.entropy_max <= np.log(6 * 4) + 1e-5
            assert (site.alpha_k == 0) == (step.progress >= parameters.u_stop)


def test_the_reference_and_the_artefact_have_the_same_metrics(reported: Reported, measured: Reported) -> None:
    by_reference, by_artefact = reported[0], measured[0]
    assert (by_reference.metrics_source, by_artefact.metrics_source) == ("reference", "artefact")
    for expected, found in zip(by_reference.steps, by_artefact.steps, strict=True):
        assert expected.error is not None
        assert expected.error < 1e-4
        assert found.error is None
        assert expected.sites.keys() == found.sites.keys()
        for path, site in expected.sites.items():
            for figure in ("alpha_k", "a_v", "entropy_mean", "entropy_min", "entropy_max", "kl"):
                value = pytest.approx(getattr(site, figure), rel=1e-3, abs=2e-5)
                assert getattr(found.sites[path], figure) == value


@pytest.mark.parametrize("how", ["reported", "measured"])
def test_the_page_is_whole(request: pytest.FixtureRequest, how: str) -> None:
    explanation, page = request.getfixturevalue(how)
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    # Three tokens at each of the three steps, on one grid.
    assert len(tags.fetched) == 9
    assert all(address.startswith("data:image/png;base64,") for address in tags.fetched)
    assert "$" not in page
    cells = re.findall(r'<td class="ink" style="background:[^"]*" title="([^"]*)"', page)
    sites = explanation.steps[0].sites
    assert len(cells) == MAPS * STEPS * len(sites)
    # Numbers at the end that distinguish no two sites are left out of their names.
    first = sites["down_blocks.1.attentions.0.transformer_blocks.0.attn1"]
    assert f"down 1 · 0, step 1: {first.alpha_k:.1%}" in cells
    assert f"<td>{first.entropy_mean:.2f}</td>" in page
    assert ('<th scope="col">error</th>' in page) == (how == "reported")


def test_an_engine_has_its_gpu_memory_among_the_facts() -> None:
    explanation = hostile_explanation()
    memory = {"weights": 10**9, "profiles": [{"activations": 5 * 10**8, "scratch": 0, "states": 10**7}]}
    engine: Any = {"backend": "tensorrt-rtx", "gpu_memory": memory}
    measured = dataclasses.replace(explanation, manifest={**explanation.manifest, "engine": engine})
    needs = "needs 1.51 GB of GPU memory: weights 1.00 GB, activations 500.00 MB, states 10.00 MB"
    assert needs in render(measured)
    assert needs not in render(explanation)


HOSTILE = "</title><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


def hostile_explanation() -> Explanation:
    """Every string of the manifest, and the names of files, sites and states, hold markup and quotes."""
    manifest = read_manifest(Path(__file__).parents[1] / "manifest" / "recorded" / "format_1_sws.json")
    output = {"name": "out_sample", "maximum": 1e-6, "mean": 1e-7, "tolerance": 1e-4, "passed": True}
    sizes = {"batch": 2, "height": 8, "width": 6}
    validation = {"reference": "torch", "remarks": ["a"], "steps": 5, "sizes": sizes, "outputs": [output]}
    stages = [{"name": "export", "seconds": 1.0, "peak_memory": 10**9}]
    site = SiteMetrics(0.1, 0.2, 1.0, 0.5, 1.5, 0.01)
    steps = tuple(
        StepMetrics(
            sigma=sigma,
            progress=0.5,
            kl_cap=0.1,
            seconds=0.1,
            effect=0.1,
            error=1e-6,
            sites={f"mid_block.attentions.{number}{HOSTILE}": site for number in range(2)},
            states={f"sws_state_d2{HOSTILE}": np.full((145, 4, 3), 0.01, np.float32)},
        )
        for sigma in (9.0, 1.0)
    )
    return Explanation(
        manifest=spoiled(manifest | {"validation": validation, "stages": stages}),
        artefact=f"a{HOSTILE}",
        intensity=1.0,
        sizes={"batch": 1, "height": 8, "width": 6, "tokens": 7},
        text=HOSTILE,
        metrics_source="artefact",
        tokens={HOSTILE: (0.5, 0.5)},
        steps=steps,
    )


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")
def test_hostile_metadata_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render(hostile_explanation()), "utf-8")
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/p"]
    done = subprocess.run(
        [*browser, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    tags = _Tags()
    tags.feed(done.stdout)
    assert tags.fetched
    assert all(address.startswith("data:image/png;base64,") for address in tags.fetched)
    assert "<script" not in done.stdout
    title = html.escape(HOSTILE, quote=False)
    assert re.findall("<title>SWS in (.*?)</title>", done.stdout, re.DOTALL) == [f"a{title}"]
    assert done.stdout.count("&lt;script&gt;") > 20


def spoiled(value: Any) -> Any:
    """`value` with markup appended to every string."""
    if isinstance(value, dict):
        return {name: spoiled(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [spoiled(entry) for entry in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_sites_go_down_and_up_again(measured: Reported) -> None:
    labels = re.findall(r'<tr><th scope="row">([dmu][^<]*)</th><td class="ink"', measured[1])
    assert labels == ["down 1 · 0", "mid 0", "up 0 · 0", "up 0 · 1"] * MAPS


def test_chosen_tokens(metrics_graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    arguments = ["report", str(metrics_graph), "--out", str(out), "--steps", "2", "--height", "8"]
    assert main([*arguments, "--width", "8", "--token", "0.25,0.75", "--token", "1,1", "--quiet"]) == 0
    assert re.findall(r'<th scope="row">([\d., ]+)</th>', out.read_text("utf-8")) == ["0.25, 0.75", "1, 1"]
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_chart_goes_from_0_to_a_round_number() -> None:
    chart = line_chart({"a": [0.0, 0.03], "b": [0.017, 0.01]}, ["9", "0.5"], ".3f")
    assert re.findall(r">(0\.\d+)</text>", chart) == ["0.000", "0.020", "0.040", "0.5"]
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', chart)]
    # 0 lies on the lowest line, 0.03 of 0.04 three quarters up.
    bottom, top = 156.0, 8.0
    assert heights[:2] == [bottom, pytest.approx(bottom - 0.75 * (bottom - top))]
    assert "legend" in chart
    assert "<span>" not in line_chart({"a": [1.0, 2.0]}, ["9", "0.5"], ".3f")


def test_spread_is_a_row_of_the_transport() -> None:
    dense = blended_transport(torch.tensor([0.4]), 5, 7, SwsParameters())
    band = band_from_dense(dense, 5, 7)
    assert torch.equal(dense_from_band(band), dense)
    assert band.shape[1] == len(diamond_offsets(8))
    for row, column in ((0, 0), (2, 3), (4, 6)):
        shares = spread(band[0].numpy(), row, column)
        np.testing.assert_array_equal(shares.ravel(), dense[0, row * 7 + column].numpy())


def test_plain_artefacts_have_nothing_to_report(traced: Path, random_unet: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="was exported with --plain: it contains no SWS"):
        write_report(traced, random_unet, tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


def test_a_graph_without_site_metrics_needs_a_checkpoint(sws_graph: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"has no site metrics among its outputs: give .*--debug"):
        write_report(sws_graph, None, tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 1}, "steps 1 is out of range"),
        ({"intensity": 0.0}, "intensity 0 is out of range"),
        ({"tokens": {"x": (0.5, 1.5)}}, r"token 0\.5,1\.5 is out of range"),
    ],
)
def test_options_that_are_refused(
    sws_graph: Path, random_unet: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        write_report(sws_graph, random_unet, tmp_path / "x.html", **change)  # type: ignore[arg-type]


def test_cross_attention_and_the_grid_of_the_text(traced: Path, tmp_path: Path) -> None:
    graph, out = tmp_path / "text.onnx", tmp_path / "report.html"
    export(
        traced,
        graph,
        ExportOptions(
            sws=SwsOptions(sites=("mid_block.*",), guard="literal", debug_outputs=True), validate=False
        ),
    )
    write_report(graph, None, out, steps=2, height=12, width=8)
    page = out.read_text("utf-8")
    assert set(re.findall(r'<tr><th scope="row">(mid[^<]*)</th>', page)) == {"mid", "mid text"}
    assert "<b>text: 1 × 8 tokens</b>" in page
    # On a single row centre and edge are one token: two of the text and three of the image, at two steps.
    assert page.count("<img ") == 2 * (2 + 3)
