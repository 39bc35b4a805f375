"""ONNX graphs as sources: which are accepted, and the errors of the others."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sws_export import ExportOptions, export
from sws_export.errors import CheckpointError, ExportError
from sws_export.progress import SilentProgress
from sws_export.sources.onnx import open_onnx_source
from tests.export_runs import ONE_SITE


def changed(traced: Path, file: Path, change: Callable[[ir.Model], object]) -> Path:
    model = ir.load(traced)
    change(model)
    ir.save(model, file)
    return file


def rename(index: int, name: str) -> Callable[[ir.Model], object]:
    def change(model: ir.Model) -> None:
        model.graph.inputs[index].name = name

    return change


def test_dimensions_of_other_exporters_are_renamed(traced: Path, tmp_path: Path) -> None:
    def foreign(model: ir.Model) -> None:
        model.graph.inputs[0].shape = ir.Shape(["s0", 4, "2*s1", "2*s2"])
        model.graph.inputs[1].shape = ir.Shape(["s0"])
        model.graph.inputs[2].shape = ir.Shape([2, "s3", 16])
        model.metadata_props.clear()

    graph = open_onnx_source(changed(traced, tmp_path / "g.onnx", foreign))
    assert [spec.shape for spec in graph.inputs] == [
        ("batch", 4, "height", "width"),
        ("batch",),
        (2, "tokens", 16),
    ]
    assert graph.vae_scale is None


def test_the_recorded_vae_scale(traced: Path, tmp_path: Path) -> None:
    def record(model: ir.Model) -> None:
        document = json.loads(model.metadata_props["sws_export.manifest"])
        document["source"]["vae_scale"] = 8
        model.metadata_props["sws_export.manifest"] = json.dumps(document)

    assert open_onnx_source(changed(traced, tmp_path / "g.onnx", record)).vae_scale == 8


def test_the_digest_covers_external_weights(traced: Path, tmp_path: Path) -> None:
    file = tmp_path / "g.onnx"
    ir.save(ir.load(traced), file, external_data="g.weights")
    content = file.read_bytes() + (tmp_path / "g.weights").read_bytes()
    assert open_onnx_source(file).read_weights(SilentProgress()) == hashlib.sha256(content).hexdigest()


def external(traced: Path, directory: Path) -> Path:
    """`traced` in `directory`, with its weights in a file beside it."""
    directory.mkdir()
    ir.save(ir.load(traced), directory / "g.onnx", external_data="g.weights")
    return directory / "g.onnx"


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_external_data_behind_links(traced: Path, tmp_path: Path, link: str) -> None:
    original = external(traced, tmp_path / "original")
    linked = tmp_path / "linked"
    linked.mkdir()
    (tmp_path / "blobs").mkdir()
    for name in ("g.onnx", "g.weights"):
        blob = original.with_name(name).rename(tmp_path / "blobs" / name.replace(".", ""))
        if link == "hard":
            (linked / name).hardlink_to(blob)
        else:
            (linked / name).symlink_to(blob)
    out = tmp_path / "out.onnx"
    export(linked / "g.onnx", out, ExportOptions(sws=ONE_SITE, validate=link == "hard"))
    expected = ir.load(traced).graph.initializers["conv_in.weight"].const_value
    found = ir.load(out).graph.initializers["conv_in.weight"].const_value
    assert expected is not None
    assert found is not None
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("location", ["../secret", "a/../../secret", "/secret"])
def test_external_data_outside_of_the_directory_is_refused(
    traced: Path, tmp_path: Path, location: str
) -> None:
    import onnx

    file = external(traced, tmp_path / "g")
    model = onnx.load(file, load_external_data=False)
    for initializer in model.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location":
                entry.value = location
    file.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=f"refers to external data in '{location}'; expected a file in"):
        open_onnx_source(file)


def test_missing_weights_are_an_error_of_the_file(traced: Path, tmp_path: Path) -> None:
    file = tmp_path / "g.onnx"
    ir.save(ir.load(traced), file, external_data="g.weights")
    (tmp_path / "g.weights").unlink()
    with pytest.raises(CheckpointError, match=r"its weights are missing: expected them in .*g\.weights"):
        open_onnx_source(file)


def test_truncated_weights(traced: Path, tmp_path: Path) -> None:
    file, weights = tmp_path / "g.onnx", tmp_path / "g.weights"
    ir.save(ir.load(traced), file, external_data=weights.name)
    with weights.open("r+b") as stream:
        stream.truncate(weights.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"g\.weights is truncated: expected at least"):
        open_onnx_source(file)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_weights_that_are_not_finite(traced: Path, tmp_path: Path, value: float, dtype: ir.DataType) -> None:
    def damage(model: ir.Model) -> None:
        weight = model.graph.initializers["conv_out.bias"]
        array = np.full(4, value, np.float32).astype(dtype.numpy())
        weight.const_value = ir.tensor(array, dtype=dtype, name=weight.name)

    graph = open_onnx_source(changed(traced, tmp_path / "g.onnx", damage))
    with pytest.raises(CheckpointError, match=r"weight 'conv_out\.bias' has NaN or Inf"):
        graph.read_weights(SilentProgress())


def test_a_file_that_is_not_onnx(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"\x80not protobuf")
    with pytest.raises(CheckpointError, match="is not an ONNX model or is damaged"):
        open_onnx_source(tmp_path / "g.onnx")


def test_a_graph_with_sws(traced: Path, tmp_path: Path) -> None:
    from graph_passes.guard import GuardOptions
    from graph_passes.parameters import SwsParameters
    from graph_passes.target import TARGETS
    from sws_export.pipeline.rewrite import rewrite

    def insert(model: ir.Model) -> None:
        rewrite(model, SwsParameters(), (), GuardOptions(), TARGETS["onnxruntime"], SilentProgress())

    with pytest.raises(
        ExportError, match="has SWS already; give the checkpoint or a graph exported with --plain"
    ):
        open_onnx_source(changed(traced, tmp_path / "g.onnx", insert))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename(0, "latent"), r"found latent, timestep, encoder_hidden_states -> out_sample"),
        (lambda model: model.graph.opset_imports.update({"": 16}), "expected opset 17 or later, found 16"),
        (
            lambda model: setattr(model.graph.outputs[0], "name", "out"),
            "-> out; export it under diffusers' names",
        ),
        (
            lambda model: setattr(model.graph.inputs[0], "dtype", ir.DataType.DOUBLE),
            "found float64|found double",
        ),
        (
            lambda model: setattr(model.graph.inputs[2], "shape", ir.Shape(["batch"])),
            "encoder_hidden_states has the",
        ),
    ],
)
def test_other_graphs(
    traced: Path, tmp_path: Path, change: Callable[[ir.Model], object], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        open_onnx_source(changed(traced, tmp_path / "g.onnx", change))
