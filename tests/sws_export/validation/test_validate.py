"""Sizes, tolerances, remarks and requirements of a validation."""

import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from graph_passes.debug_outputs import PREFIX
from graph_passes.guard import GuardOptions
from graph_passes.parameters import SwsParameters
from sws_export import ExportOptions, SwsOptions, export
from sws_export.checkpoint import open_checkpoint
from sws_export.checkpoint.unet_io import unet_inputs
from sws_export.errors import ExportError, ValidationError
from sws_export.progress import SilentProgress
from sws_export.validation import OutputDifference, SwsSpec, ValidationReport, validate_against_reference
from sws_export.validation.onnx_runner import OnnxRunner
from sws_export.validation.sizes import validation_sizes
from tests.export_runs import ONE_SITE


def test_sizes_are_not_square_and_fit_the_unet() -> None:
    for levels in range(1, 5):
        sizes = validation_sizes(2 ** (levels - 1), 10**6)
        assert sizes["height"] != sizes["width"]
        assert sizes["height"] % 2 ** (levels - 1) == sizes["width"] % 2 ** (levels - 1) == 0
        assert sizes["batch"] == 2
    large = validation_sizes(8, 10**9)
    small = validation_sizes(8, 10**8)
    assert large["height"] * large["width"] < small["height"] * small["width"]


def test_the_report_as_json_values() -> None:
    outputs = (OutputDifference("a", 0.5, 0.1, 0.2, 1.0), OutputDifference("b", 0.5, 0.1, 0.2, 0.25))
    report = ValidationReport("x", ("r",), 5, {"batch": 2}, outputs, 1.234)
    assert not report.passed
    assert report.as_dict() == {
        "passed": False,
        "reference": "x",
        "remarks": ["r"],
        "steps": 5,
        "sizes": {"batch": 2},
        "outputs": [
            {"name": "a", "maximum": 0.5, "mean": 0.1, "quantile": 0.2, "tolerance": 1.0, "passed": True},
            {"name": "b", "maximum": 0.5, "mean": 0.1, "quantile": 0.2, "tolerance": 0.25, "passed": False},
        ],
        "seconds": 1.23,
    }


@pytest.fixture(scope="module")
def graph(quick_trace: Path, random_unet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("graph") / "graph.onnx"
    export(random_unet, out, ExportOptions(sws=ONE_SITE, validate=False))
    return out


def validated(graph: Path, random_unet: Path, parameters: SwsParameters) -> dict[str, OutputDifference]:
    checkpoint = open_checkpoint(random_unet)
    sites = ("mid_block.attentions.0.transformer_blocks.0.attn1",)
    inputs = unet_inputs(checkpoint.config, "float32")
    report = validate_against_reference(
        graph, checkpoint, inputs, SwsSpec(parameters, sites), "fp32", SilentProgress()
    )
    return {output.name: output for output in report.outputs}


def test_the_graph_passes_with_its_own_parameters_only(graph: Path, random_unet: Path) -> None:
    right = validated(graph, random_unet, SwsParameters())
    assert all(output.passed for output in right.values())
    assert (right["out_sample"].tolerance, right["sws_state_d2_out"].tolerance) == (2e-4, 1e-5)
    wrong = validated(graph, random_unet, SwsParameters(tau=0.4))
    assert not wrong["sws_state_d2_out"].passed


def test_the_reference_has_the_query_rows_of_the_guard(
    quick_trace: Path, random_unet: Path, tmp_path: Path
) -> None:
    """A share for the KL divergence alone is validated like a guard with all rows, on both kinds of sites."""
    parameters = SwsParameters(kl_floor=1e-6, kl_slope=0.0)
    sites = tuple(f"mid_block.attentions.0.transformer_blocks.0.{name}" for name in ("attn1", "attn2"))
    options = SwsOptions(
        sites=sites, guard="literal", guard_rows="kl:1/4", parameters=parameters, debug_outputs=True
    )
    out = tmp_path / "graph.onnx"
    export(random_unet, out, ExportOptions(sws=options, validate=False))
    guard = options.guard_options()
    spec = SwsSpec(parameters, sites, guard, debug_sites=sites)
    checkpoint = open_checkpoint(random_unet)
    inputs = unet_inputs(checkpoint.config, "float32")
    found, exact = (
        validate_against_reference(out, checkpoint, inputs, chosen, "fp32", SilentProgress())
        for chosen in (spec, dataclasses.replace(spec, guard=GuardOptions("literal")))
    )
    assert found.passed
    assert found.remarks == ("the KL divergence is that of 1/4 of the query rows, in the reference too",)
    assert {output.name for output in exact.outputs if not output.passed} >= {f"{PREFIX}alpha_k"}


def test_a_binding_kl_budget_has_its_own_tolerance(graph: Path, random_unet: Path) -> None:
    found = validated(graph, random_unet, SwsParameters(kl_floor=1e-5, kl_slope=0.0))
    assert found["out_sample"].tolerance == 5e-4


def test_a_nonfinite_reference_is_an_error_of_the_checkpoint(
    graph: Path, random_unet: Path, tmp_path: Path
) -> None:
    """Weights near the largest float32: products of nine in a row are too large for float64."""
    broken = Path(shutil.copytree(random_unet, tmp_path / "unet"))
    file = broken / "diffusion_pytorch_model.safetensors"
    save_file({name: np.copysign(np.float32(3e38), value) for name, value in load_file(file).items()}, file)
    with pytest.raises(ValidationError, match="out_sample of the eager reference contains NaN or Inf"):
        validated(graph, broken, SwsParameters())


def test_validation_needs_onnx_runtime(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ExportError, match=r"pip install 'sws-export\[cpu\]', or skip validation with --no-validate"
    ):
        OnnxRunner(graph)
