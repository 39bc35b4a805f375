"""Static shapes: what a graph declares, its operators, results, and comparison with the dynamic graph."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sws_export import ExportOptions, ExportReport, SizeOptions, SwsOptions, export
from sws_export.errors import OptionError, ValidationError
from sws_export.pipeline.validate import validate
from sws_export.runtime import Session, StepError
from tests.export_runs import ONE_SITE, AtStage, listing, with_options
from tests.graph_passes.small_models import op_counts

STATIC = ExportOptions(
    sws=ONE_SITE, sizes=SizeOptions(batch="2", height="8", width="12", tokens="7", vae_scale=1)
)
GRID = SizeOptions(height="8", width="12", vae_scale=1)
SHAPE_OPS = {"Shape", "Range", "Expand"}

pytestmark = pytest.mark.usefixtures("quick_trace")


@pytest.fixture(scope="module")
def static(quick_trace: Path, middle_unet: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """A validated graph with four static sizes, whose files tests must not change."""
    return export(middle_unet, tmp_path_factory.mktemp("static") / "graph.onnx", STATIC)


@pytest.fixture(scope="module")
def dynamic(quick_trace: Path, middle_unet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same graph with dynamic shapes, which tests must not change."""
    file = tmp_path_factory.mktemp("dynamic") / "graph.onnx"
    export(middle_unet, file, ExportOptions(sws=ONE_SITE, validate=False))
    return file


def inputs(batch: int = 2) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "sample": random.standard_normal((batch, 4, 8, 12)),
        "timestep": 500.0,
        "encoder_hidden_states": random.standard_normal((batch, 7, 16)),
        "sigma": 3.0,
        "intensity": 1.0,
    }


def assert_same_steps(path: Path, expected: Path) -> None:
    """Two steps, the second with the state of the first."""
    sessions = [Session.load(file, device="cpu") for file in (path, expected)]
    for _ in range(2):
        found, wanted = (session.step(**inputs()) for session in sessions)
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def shapes(report: ExportReport, kind: str = "inputs") -> dict[str, Any]:
    assert report.manifest is not None
    return {entry["name"]: entry["shape"] for entry in report.manifest[kind]}  # type: ignore[literal-required]


def test_manifest_and_operators(static: ExportReport) -> None:
    file = static.files[0]
    assert sorted(listing(file.parent)) == ["graph.onnx", "graph.onnx.json"]
    found = shapes(static)
    assert found["sample"] == [2, 4, 8, 12]
    assert found["timestep"] == found["sigma"] == [2]
    assert found["encoder_hidden_states"] == [2, 7, 16]
    assert found["sws_state_d2"] == shapes(static, "outputs")["sws_state_d2_out"] == [2, 145, 4, 6]
    assert not SHAPE_OPS & op_counts(ir.load(file)).keys()


def test_results_equal_those_of_the_dynamic_graph(static: ExportReport, dynamic: Path) -> None:
    assert SHAPE_OPS & op_counts(ir.load(dynamic)).keys()
    assert_same_steps(static.files[0], dynamic)


def test_the_report_describes_the_comparison(static: ExportReport) -> None:
    assert static.validation is not None
    (remark,) = static.validation.remarks
    assert remark.startswith("compared before batch was set to 2, height was set to 8, width")
    assert "the static graph differs by up to" in remark
    assert static.validation.sizes["width"] != 12


def test_other_sizes_are_refused_at_run_time(static: ExportReport) -> None:
    session = Session.load(static.files[0], device="cpu")
    with pytest.raises(
        StepError, match=r"dimension 0 is 1, expected 2; the input is \[2, 4, 8, 12\]; .*another --batch"
    ):
        session.step(**inputs(batch=1))


def test_validate_uses_the_static_sizes(static: ExportReport, middle_unet: Path) -> None:
    report = validate(static.files[0], middle_unet)
    assert report.passed
    assert report.sizes == {"batch": 2, "height": 8, "width": 12, "tokens": 7}


def test_a_wrong_static_graph_is_not_published(middle_unet: Path, out: Path) -> None:
    def spoil() -> None:
        """Change a weight of the static graph before it is compared."""
        (file,) = out.rglob("graph.onnx")
        model = ir.load(file)
        bias = model.graph.initializers["conv_out.bias"]
        assert bias.const_value is not None
        bias.const_value = ir.tensor(bias.const_value.numpy() + 1, name="conv_out.bias")
        ir.save(model, file)

    with pytest.raises(ValidationError, match="differs from the graph with dynamic shapes: out_sample by"):
        export(middle_unet, out / "graph.onnx", STATIC, AtStage("compare static shapes", spoil))
    assert listing(out) == {}


def test_a_static_bfloat16_graph_is_compared_too(middle_unet: Path, out: Path) -> None:
    report = export(middle_unet, out / "graph.onnx", with_options(STATIC, precision="bf16"))
    assert report.validation is not None
    assert any("the static graph differs by up to" in remark for remark in report.validation.remarks)


def test_a_static_graph_with_long_steps_is_not_run(middle_unet: Path, out: Path) -> None:
    progress = AtStage()
    report = export(middle_unet, out / "graph.onnx", with_options(STATIC, batch="8192"), progress)
    assert "compare static shapes" not in progress.stages
    assert report.validation is not None
    assert report.validation.remarks[0].endswith("was not run, a step on this processor would be long")


def test_some_sizes_are_static(middle_unet: Path, out: Path) -> None:
    report = export(middle_unet, out / "graph.onnx", ExportOptions(sws=ONE_SITE, sizes=GRID, validate=False))
    found = shapes(report)
    assert found["sample"] == ["batch", 4, 8, 12]
    assert found["sws_state_d2"] == ["batch", 145, 4, 6]
    assert not SHAPE_OPS & op_counts(ir.load(out / "graph.onnx")).keys()


def test_a_static_plain_graph_as_the_source(middle_unet: Path, out: Path) -> None:
    plain = out / "plain.onnx"
    report = export(middle_unet, plain, ExportOptions(sws=SwsOptions(plain=True), sizes=GRID))
    assert shapes(report)["sample"] == ["batch", 4, 8, 12]
    report = export(plain, out / "sws.onnx", ExportOptions(sws=ONE_SITE, validate=False))
    assert shapes(report)["sws_state_d2"] == ["batch", 145, 4, 6]
    with pytest.raises(OptionError, match="the graph has a static height of 8, found 16"):
        export(plain, out / "sws.onnx", ExportOptions(sizes=SizeOptions(height="16", vae_scale=1)))
