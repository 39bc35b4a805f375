"""The report: what it measures, and a page that is whole by itself."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from graph_passes.parameters import SwsParameters, diamond_offsets
from sws_export.errors import OptionError
from sws_export.reference import band_from_dense, blended_transport, dense_from_band
from sws_export.runtime.report import Explanation, write_report
from sws_export.runtime.report_page import spread

STEPS = 3


@pytest.fixture(scope="module")
def reported(
    sws_graph: Path, random_unet: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Explanation, str]:
    out = tmp_path_factory.mktemp("report") / "report.html"
    explanation = write_report(sws_graph, random_unet, out, steps=STEPS, intensity=1.0, height=12, width=8)
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

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_figures_obey_the_method(reported: tuple[Explanation, str]) -> None:
    explanation, _ = reported
    parameters = SwsParameters()
    assert len(explanation.steps) == STEPS
    assert [step.sigma for step in explanation.steps] == sorted(
        (step.sigma for step in explanation.steps), reverse=True
    )
    for step in explanation.steps:
        assert step.error < 1e-4
        assert step.effect > 0
        assert step.seconds > 0
        assert step.kl_cap == pytest.approx(parameters.kl_slope * (1 - step.progress) + parameters.kl_floor)
        assert [state.shape for state in step.states.values()] == [(145, 6, 4)]
        for site in step.sites.values():
            assert 0 <= site.kl <= step.kl_cap
            assert 0 < site.uncertainty < 1
            assert 0 < site.entropy <= np.log(6 * 4) + 1e-5
            assert (site.alpha_k == 0) == (step.progress >= parameters.u_stop)


def test_the_page_is_whole(reported: tuple[Explanation, str]) -> None:
    explanation, page = reported
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.fetched
    assert all(address.startswith("data:image/png;base64,") for address in tags.fetched)
    assert "$" not in page
    # One cell a site and step in each of the four maps.
    cells = re.findall(r'<td style="background:[^"]*" title="([^"]*)"', page)
    assert len(cells) == 4 * STEPS * len(explanation.steps[0].sites)
    name, first = next(iter(explanation.steps[0].sites.items()))
    assert f"{name}, step 1: {first.alpha_k:.4g}" in cells


def test_spread_is_a_row_of_the_transport() -> None:
    dense = blended_transport(torch.tensor([0.4]), 5, 7, SwsParameters())
    band = band_from_dense(dense, 5, 7)
    assert torch.equal(dense_from_band(band), dense)
    assert band.shape[1] == len(diamond_offsets(8))
    for row, column in ((0, 0), (2, 3), (4, 6)):
        shares = spread(band[0].numpy(), row, column)
        np.testing.assert_array_equal(shares.ravel(), dense[0, row * 7 + column].numpy())


def test_plain_artefacts_have_nothing_to_report(traced: Path, random_unet: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="was exported with --plain: there is no SWS in it"):
        write_report(traced, random_unet, tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("steps", "intensity", "message"),
    [(1, 0.5, "steps 1 is out of range"), (3, 0.0, "intensity 0 is out of range")],
)
def test_options_that_are_refused(
    sws_graph: Path, random_unet: Path, tmp_path: Path, steps: int, intensity: float, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        write_report(sws_graph, random_unet, tmp_path / "x.html", steps=steps, intensity=intensity)
