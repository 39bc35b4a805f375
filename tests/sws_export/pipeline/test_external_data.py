"""Graphs with more weights than an ONNX file holds: written once, beside it, and restored from the cache."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from sws_export import ExportOptions, ExportReport, QuantizationOptions, SizeOptions, export
from sws_export.cache import open_cache
from sws_export.files import external_data_path
from sws_export.onnx_files import load_onnx, save_onnx
from sws_export.pipeline.skeleton import complete_skeleton, save_skeleton
from sws_export.progress import SilentProgress
from sws_export.runtime import Session
from tests.export_runs import ONE_SITE, AtStage, make_unet

OPTIONS = ExportOptions(sws=ONE_SITE, validate=False)
FILES = {"graph.onnx", "graph.onnx.data", "graph.onnx.json"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A UNet with an embedding of 65536 classes, 268 MB of zeros."""
    blocks = {"down_block_types": 2 * ("DownBlock2D",), "up_block_types": 2 * ("UpBlock2D",)}
    model = make_unet(tmp_path / "model", num_class_embeds=1, time_embedding_dim=1024, **blocks)
    weights = load_file(model / "diffusion_pytorch_model.safetensors")
    weights["class_embedding.weight"] = np.zeros((65536, 1024), np.float32)
    save_file(weights, model / "diffusion_pytorch_model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_class_embeds": 65536}))
    return model


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWS_EXPORT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SWS_EXPORT_CACHE_SIZE", "1GB")


def cached(report: ExportReport) -> list[str]:
    return [timing.name for timing in report.stages if timing.cached]


def prediction(graph: Path) -> Any:
    random = np.random.default_rng(0)
    return Session.load(graph, device="cpu").step(
        sample=random.standard_normal((2, 4, 8, 12)),
        timestep=500.0,
        encoder_hidden_states=random.standard_normal((2, 7, 16)),
        class_labels=[3, 65535],
        sigma=3.0,
        intensity=1.0,
    )


def test_external_data_begin_with_the_source_and_are_restored(model: Path, out: Path) -> None:
    report = export(model, out / "graph.onnx", OPTIONS)
    assert {file.name for file in out.iterdir()} == {file.name for file in report.files} == FILES
    (source,) = model.glob("*.safetensors")
    data = (out / "graph.onnx.data").read_bytes()
    assert data.startswith(source.read_bytes())
    graph = (out / "graph.onnx").read_bytes()
    assert sum(entry.size for entry in open_cache().entries()) < 2**20, "weights are not kept"
    assert "export" in cached(export(model, out / "graph.onnx", OPTIONS))
    assert {file.name for file in out.iterdir()} == FILES
    assert (out / "graph.onnx").read_bytes() == graph
    assert (out / "graph.onnx.data").read_bytes() == data


@pytest.mark.slow
def test_static_and_dynamic_graphs_share_quantized_weights(model: Path, out: Path) -> None:
    """They are compared when the weights have been written once."""
    sizes = SizeOptions(batch="2", height="8", width="12", tokens="7", vae_scale=1)
    options = ExportOptions(sws=ONE_SITE, sizes=sizes, quantization=QuantizationOptions(weights="int8"))
    progress = AtStage()
    report = export(model, out / "graph.onnx", options, progress)
    assert {file.name for file in out.iterdir()} == FILES
    assert progress.stages.count("save") == 1
    assert report.validation is not None
    assert "the static graph differs by up to" in report.validation.remarks[-1]
    held = [value.const_value for value in ir.load(out / "graph.onnx").graph.initializers.values()]
    inside = sum(tensor.nbytes for tensor in held if tensor and not isinstance(tensor, ir.ExternalTensor))
    # What depends on the grid: the transports of three scales on 4 x 6 tokens, and kernels.
    assert inside < 600_000
    expected = prediction(out / "graph.onnx")
    again = export(model, out / "graph.onnx", options)
    assert "static shapes" in cached(again)
    np.testing.assert_array_equal(prediction(out / "graph.onnx"), expected)


def test_a_skeleton_has_constants_that_are_external_data(tmp_path: Path) -> None:
    """A static graph reads some from the data of the dynamic one, which the cache does not keep."""
    arrays = {name: np.arange(1000, dtype=np.float32) + number for number, name in enumerate("wc")}
    values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()]
    total = ir.node("Add", values)
    graph = ir.Graph([], total.outputs, nodes=[total], initializers=values, opset_imports={"": 23})
    save_onnx(ir.Model(graph, ir_version=10), tmp_path / "m.onnx", SilentProgress(), embed_limit=0)
    model = load_onnx(tmp_path / "m.onnx")
    source = {"w": ir.tensor(arrays["w"], name="w")}
    skeleton = save_skeleton(model, source, tmp_path)
    assert skeleton.stat().st_size < 2 * arrays["c"].nbytes
    external_data_path(tmp_path / "m.onnx").unlink()
    completed = complete_skeleton(skeleton, source)
    assert completed is not None
    for name, value in completed.graph.initializers.items():
        assert value.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), arrays[name])
