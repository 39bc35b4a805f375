"""Graphs that are fixed to sizes: what they declare, hold and compute, and how they were compared."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sws_export import ExportOptions, SizeOptions, SwsOptions, export
from sws_export.errors import OptionError, ValidationError
from sws_export.pipeline import graph as graph_making
from sws_export.pipeline.revalidate import validate
from sws_export.runtime import Session, StepError
from tests.export_runs import listing, with_options
from tests.graph_passes.small_models import op_counts

SIZES = ExportOptions(sizes=SizeOptions(batch="2", height="8", width="12", tokens="7", vae_scale=1))
ON_SIZES = {"Shape", "Range", "Expand"}

pytestmark = pytest.mark.usefixtures("quick_trace")


def inputs(batch: int = 2, height: int = 8, width: int = 12) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "sample": random.standard_normal((batch, 4, height, width)),
        "timestep": 500.0,
        "encoder_hidden_states": random.standard_normal((batch, 7, 16)),
        "sigma": 3.0,
        "intensity": 1.0,
    }


def steps(path: Path) -> list[Any]:
    session = Session.load(path, device="cpu")
    return [session.step(**inputs()) for _ in range(2)]


def test_a_fixed_graph_and_its_contract(random_unet: Path, out: Path) -> None:
    report = export(random_unet, out / "graph.onnx", SIZES)
    assert sorted(listing(out)) == ["graph.onnx", "graph.onnx.json"]
    shapes = {entry["name"]: entry["shape"] for entry in report.manifest["inputs"]}
    assert shapes["sample"] == [2, 4, 8, 12]
    assert shapes["timestep"] == shapes["sigma"] == [2]
    assert shapes["encoder_hidden_states"] == [2, 7, 16]
    assert shapes["sws_state_d2"] == [2, 145, 4, 6]
    assert {entry["name"]: entry["shape"] for entry in report.manifest["outputs"]}["sws_state_d2_out"] == [
        2,
        145,
        4,
        6,
    ]
    assert not ON_SIZES & op_counts(ir.load(out / "graph.onnx")).keys()


def test_it_computes_what_the_graph_of_any_size_does(random_unet: Path, out: Path) -> None:
    export(random_unet, out / "any.onnx", ExportOptions(validate=False))
    export(random_unet, out / "fixed.onnx", SIZES)
    assert ON_SIZES & op_counts(ir.load(out / "any.onnx")).keys()
    for found, expected in zip(steps(out / "fixed.onnx"), steps(out / "any.onnx"), strict=True):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_report_tells_what_was_compared(random_unet: Path, out: Path) -> None:
    report = export(random_unet, out / "graph.onnx", SIZES)
    assert report.validation is not None
    (remark,) = report.validation.remarks
    assert remark.startswith("compared before batch was set to 2, height was set to 8, width")
    assert "the static graph differs by up to" in remark
    assert report.validation.sizes["width"] != 12


def test_a_fixed_graph_that_is_wrong_is_not_written(
    random_unet: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = graph_making.rewrite

    def wrong(model: ir.Model, *arguments: Any, sizes: Any, **named: Any) -> Any:
        report = real(model, *arguments, sizes=sizes, **named)
        if sizes:
            bias = model.graph.initializers["conv_out.bias"]
            assert bias.const_value is not None
            bias.const_value = ir.tensor(bias.const_value.numpy() + 1, name="conv_out.bias")
        return report

    monkeypatch.setattr(graph_making, "rewrite", wrong)
    with pytest.raises(ValidationError, match="differs from the graph with dynamic shapes: out_sample by"):
        export(random_unet, out / "graph.onnx", SIZES)
    assert listing(out) == {}


def test_a_bfloat16_graph_runs_beside_the_one_of_any_size_too(random_unet: Path, out: Path) -> None:
    report = export(random_unet, out / "graph.onnx", with_options(SIZES, precision="bf16"))
    assert report.validation is not None
    assert any("the static graph differs by up to" in remark for remark in report.validation.remarks)


def test_a_step_that_is_long_is_not_run(
    random_unet: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_making, "_RUNNABLE", 1.0)
    monkeypatch.setattr(graph_making, "compare_static_shapes", None)
    report = export(random_unet, out / "graph.onnx", SIZES)
    assert report.validation is not None
    assert report.validation.remarks[0].endswith("was not run, a step on this processor would be long")


def test_weights_are_written_once(random_unet: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sws_export.onnx_files.EMBED_LIMIT", 2**20)
    saved = []
    real = graph_making.save_onnx
    monkeypatch.setattr(graph_making, "save_onnx", lambda *given: saved.append(given[1]) or real(*given))
    export(random_unet, out / "graph.onnx", SIZES)
    assert sorted(listing(out)) == ["graph.onnx", "graph.onnx.data", "graph.onnx.json"]
    assert len(saved) == 1
    held = [value.const_value for value in ir.load(out / "graph.onnx").graph.initializers.values()]
    inside = sum(tensor.nbytes for tensor in held if tensor and not isinstance(tensor, ir.ExternalTensor))
    # What depends on the grid: the transports of three scales on 4 x 6 tokens, and kernels.
    assert inside < 600_000
    export(random_unet, out / "any.onnx", ExportOptions(validate=False))
    found, expected = steps(out / "graph.onnx")[1], steps(out / "any.onnx")[1]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_other_sizes_are_refused_at_run_time(random_unet: Path, out: Path) -> None:
    export(random_unet, out / "graph.onnx", SIZES)
    session = Session.load(out / "graph.onnx", device="cpu")
    with pytest.raises(
        StepError, match=r"dimension 0 is 1, expected 2; the input is \[2, 4, 8, 12\]; .*another --batch"
    ):
        session.step(**inputs(batch=1))


def test_a_fixed_graph_is_validated_again_at_its_sizes(random_unet: Path, out: Path) -> None:
    export(random_unet, out / "graph.onnx", SIZES)
    report = validate(out / "graph.onnx", random_unet)
    assert report.passed
    assert report.sizes == {"batch": 2, "height": 8, "width": 12, "tokens": 7}


def test_some_sizes_only(random_unet: Path, out: Path) -> None:
    report = export(
        random_unet, out / "graph.onnx", ExportOptions(sizes=SizeOptions(height="8", width="12", vae_scale=1))
    )
    shapes = {entry["name"]: entry["shape"] for entry in report.manifest["inputs"]}
    assert shapes["sample"] == ["batch", 4, 8, 12]
    assert shapes["sws_state_d2"] == ["batch", 145, 4, 6]
    assert not ON_SIZES & op_counts(ir.load(out / "graph.onnx")).keys()


def test_a_plain_graph_is_fixed_too(random_unet: Path, traced: Path, out: Path) -> None:
    report = export(
        random_unet,
        out / "plain.onnx",
        ExportOptions(sws=SwsOptions(plain=True), sizes=SizeOptions(height="8", width="12", vae_scale=1)),
    )
    assert report.manifest["inputs"][0]["shape"] == ["batch", 4, 8, 12]
    # From there SWS is as fixed as the graph that it is put into.
    report = export(out / "plain.onnx", out / "sws.onnx")
    shapes = {entry["name"]: entry["shape"] for entry in report.manifest["inputs"]}
    assert shapes["sws_state_d2"] == ["batch", 145, 4, 6]
    with pytest.raises(OptionError, match="the graph has a static height of 8, found 16"):
        export(
            out / "plain.onnx", out / "sws.onnx", ExportOptions(sizes=SizeOptions(height="16", vae_scale=1))
        )
    assert traced.is_file()
