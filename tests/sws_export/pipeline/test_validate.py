"""`sws-export validate`: the comparison of an existing graph with its checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from sws_export.cli import main

from sws_export import ExportOptions, SwsOptions, SwsParameters, export
from sws_export.errors import CheckpointError, ManifestError, ValidationError
from sws_export.pipeline.validate import validate
from tests.export_runs import error_line, make_unet

PARAMETERS = SwsParameters(beta=0.5, scales=(2, 2, 4))


@pytest.fixture(scope="module")
def exported(quick_trace: Path, random_unet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "graph.onnx"
    export(
        random_unet,
        out,
        ExportOptions(
            sws=SwsOptions(parameters=PARAMETERS, sites=("mid_block.*",), guard="literal"), validate=False
        ),
    )
    return out


def changed(exported: Path, file: Path, change: Callable[[ir.Model], object]) -> Path:
    model = ir.load(exported)
    change(model)
    ir.save(model, file)
    return file


def scale_weight(model: ir.Model) -> None:
    value = model.graph.initializers["mid_block.resnets.0.conv1.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * 1.1, name=value.name)


def test_parameters_and_sites_are_read_from_the_graph(exported: Path, random_unet: Path) -> None:
    report = validate(exported, random_unet)
    assert report.passed
    states = {"sws_state_d2_out", "sws_state_text_out"}
    assert {output.name for output in report.outputs} == {"out_sample", *states}


def test_the_preset_is_read_from_the_graph(random_unet: Path, tmp_path: Path) -> None:
    parameters = SwsParameters(beta=0.5, kl_floor=1e-5, kl_slope=0.0)
    options = ExportOptions(
        sws=SwsOptions(
            preset="node", u="sigma", parameters=parameters, sites=("up_blocks.*",), debug_outputs=True
        ),
        validate=False,
    )
    export(random_unet, tmp_path / "node.onnx", options)
    report = validate(tmp_path / "node.onnx", random_unet)
    assert report.passed
    names = {output.name for output in report.outputs}
    assert {"out_sample", "sws_state_text_out", "sws_debug_alpha_k", "sws_debug_kl_cap"} <= names


def test_a_changed_weight_is_one_error_line(
    exported: Path, random_unet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = changed(exported, tmp_path / "g.onnx", scale_weight)
    assert main(["validate", str(file), str(random_unet), "--json", "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["passed"] is False
    assert "differs from the eager reference in float64 by more than is allowed: out_sample" in error_line(
        err
    )
    assert err.count("\n") == 1


def test_another_checkpoint_is_refused(exported: Path, tmp_path: Path) -> None:
    other = make_unet(tmp_path / "other", cross_attention_dim=24)
    with pytest.raises(ValidationError, match="give the checkpoint that it was exported from"):
        validate(exported, other)


def test_a_graph_without_a_manifest(exported: Path, random_unet: Path, tmp_path: Path) -> None:
    file = changed(exported, tmp_path / "g.onnx", lambda model: model.metadata_props.clear())
    with pytest.raises(CheckpointError, match="was not written by sws-export"):
        validate(file, random_unet)


def test_a_graph_in_place_of_the_checkpoint(exported: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"is a graph: expected the checkpoint that .* was exported from"
    ):
        validate(exported, exported)


def test_missing_files_and_files_that_are_not_onnx(random_unet: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"cannot read .*g\.onnx: No such file"):
        validate(tmp_path / "g.onnx", random_unet)
    shutil.copy(random_unet / "config.json", tmp_path / "g.onnx")
    with pytest.raises(ManifestError, match="is not an ONNX model or is damaged"):
        validate(tmp_path / "g.onnx", random_unet)
