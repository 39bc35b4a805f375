"""The properties of checkpoints and ONNX graphs as sources."""

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file

from graph_passes.parameters import SwsParameters
from sws_export import ExportOptions, SourceOptions
from sws_export.errors import CheckpointError, OptionError
from sws_export.progress import SilentProgress
from sws_export.sources import open_source
from sws_export.sources.checkpoint import CheckpointSource
from sws_export.sources.onnx import OnnxSource
from sws_export.validation import SwsSpec
from tests.export_runs import with_options

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Listener(SilentProgress):
    """Records warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def opened(
    model: Path, progress: SilentProgress | None = None, *, engine: bool = False, **options: Any
) -> Any:
    chosen = with_options(ExportOptions(), **options)
    return open_source(model, chosen, progress or SilentProgress(), engine=engine)


def copy_with(random_unet: Path, directory: Path, change: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_bytes((random_unet / "config.json").read_bytes())
    save_file(change(load_file(random_unet / WEIGHTS)), directory / WEIGHTS)
    return directory


def test_a_checkpoint(random_unet: Path) -> None:
    source = opened(random_unet)
    assert isinstance(source, CheckpointSource)
    assert (source.path, source.precision, source.size_multiple) == (random_unet, "fp32", 2)
    assert [spec.name for spec in source.inputs] == ["sample", "timestep", "encoder_hidden_states"]
    assert 500_000 < source.parameter_count < 2_000_000
    first, precision, second, third = source.describe()
    assert first.startswith("UNet2DConditionModel, diffusers layout, ")
    assert first.endswith("F32 -> fp32")
    assert precision == "precision: fp32, that of the checkpoint"
    assert second == "configuration: config.json beside the weights"
    assert third == source.checkpoint.prediction.remark()
    # No conversion, and nothing but the weights of the UNet.
    assert source.whole_files == source.files
    assert opened(random_unet, precision="fp16").whole_files == ()
    # As of a file with a whole pipeline.
    some = dict(list(source.checkpoint.stored.items())[::2])
    part = dataclasses.replace(source, checkpoint=dataclasses.replace(source.checkpoint, stored=some))
    assert part.whole_files == ()


def test_precision_is_that_asked_for(random_unet: Path) -> None:
    source = opened(random_unet, precision="fp16")
    assert source.precision == "fp16"
    assert source.inputs[0].dtype == "float16"
    assert source.inputs[1].dtype == "float32"


@pytest.mark.parametrize(
    ("dtype", "graph", "engine"),
    [
        ("float16", "fp16", "fp16"),
        ("bfloat16", "bf16", "bf16"),
        ("float64", "fp32", "fp16"),
        ("float8_e4m3fn", "fp16", "fp16"),
    ],
)
def test_precision_defaults_to_what_is_stored(
    random_unet: Path, tmp_path: Path, dtype: str, graph: str, engine: str
) -> None:
    import torch

    def cast(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}

    directory = copy_with(random_unet, tmp_path / "cast", cast)
    assert opened(directory).precision == graph
    assert opened(directory, engine=True).precision == engine


def test_an_engine_has_float16_unless_asked_otherwise(random_unet: Path) -> None:
    source = opened(random_unet, engine=True)
    assert source.describe()[1] == (
        "precision: fp16, the default of an engine; --precision fp32 keeps that of the checkpoint"
    )
    kept = opened(random_unet, engine=True, precision="fp32")
    assert kept.describe()[1] == "precision: fp32, as given by --precision"


def test_float8_beside_bfloat16_is_exported_in_bfloat16(random_unet: Path, tmp_path: Path) -> None:
    import torch

    def cast(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: tensor.to(torch.float8_e4m3fn if tensor.ndim == 2 else torch.bfloat16)
            for name, tensor in tensors.items()
        }

    assert opened(copy_with(random_unet, tmp_path / "cast", cast)).precision == "bf16"


def test_the_manifest_entry_of_a_checkpoint(random_unet: Path) -> None:
    entry = opened(random_unet, prediction_type="v_prediction").entry("ab")
    assert entry["kind"] == "checkpoint"
    assert entry["sha256"] == "ab"
    assert entry["prediction_type"] == "v_prediction"
    assert entry["sampling"] == {}
    edm = opened(random_unet, prediction_type="edm").entry("ab")
    assert edm["sampling"] == {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
    assert entry["config"]["block_out_channels"] == [32, 64]


def test_unused_tensors_are_a_warning(random_unet: Path, tmp_path: Path) -> None:
    import torch

    progress = Listener()
    directory = copy_with(random_unet, tmp_path / "more", lambda all_: all_ | {"more.weight": torch.zeros(3)})
    opened(directory, progress).check(progress)
    assert progress.warnings == ["1 tensors of the checkpoint have no place in this UNet and are ignored"]


def test_a_missing_tensor_is_named(random_unet: Path, tmp_path: Path) -> None:
    def without(tensors: dict[str, Any]) -> dict[str, Any]:
        del tensors["conv_out.bias"]
        return tensors

    with pytest.raises(CheckpointError, match=r"lacks 1 of the .*\(conv_out\.bias\)"):
        opened(copy_with(random_unet, tmp_path / "less", without)).check(SilentProgress())


def test_a_graph(traced: Path) -> None:
    source = opened(traced)
    assert isinstance(source, OnnxSource)
    assert (source.path, source.precision, source.size_multiple, source.config) == (traced, "fp32", 2, None)
    assert [spec.shape for spec in source.inputs] == [
        ("batch", 4, "height", "width"),
        ("batch",),
        ("batch", "tokens", 16),
    ]
    assert source.describe()[0].startswith("plain ONNX graph, ")
    assert source.read_weights(SilentProgress()) == hashlib.sha256(traced.read_bytes()).hexdigest()
    assert source.entry("ab") == {
        "kind": "onnx",
        "file": "traced.onnx",
        "sha256": "ab",
        "size_multiple": 2,
    }


OF_CHECKPOINTS: dict[str, Any] = {
    "precision": "fp16",
    "config": Path("c.json"),
    "ema": True,
    "variant": "fp16",
    "attention_head_dim": (8,),
    "prediction_type": "v_prediction",
    "loras": ("x.safetensors",),
    "controlnet": True,
    "plain": True,
}


def test_a_graph_takes_no_options_of_checkpoints(traced: Path) -> None:
    assert {field.name for field in dataclasses.fields(SourceOptions)} | {"plain"} == OF_CHECKPOINTS.keys()
    for name, value in OF_CHECKPOINTS.items():
        option = "--lora" if name == "loras" else "--" + name.replace("_", "-")
        message = f"{traced} is a graph already: {option} applies to checkpoints only; leave it out"
        with pytest.raises(OptionError, match=re.escape(message)):
            opened(traced, **{name: value})


@pytest.mark.parametrize("size", ["dynamic", "fixed"])
def test_a_graph_is_validated_at_intensity_0(traced: Path, tmp_path: Path, size: str) -> None:
    from graph_passes.guard import GuardOptions
    from graph_passes.target import TARGETS
    from sws_export.onnx_files import save_onnx
    from sws_export.pipeline.rewrite import rewrite

    model = ir.load(traced)
    if size == "fixed":
        model.graph.inputs[0].shape = ir.Shape(["batch", 4, 6, 10])
    start, made = tmp_path / "start.onnx", tmp_path / "made.onnx"
    ir.save(model, start)
    source = opened(start)
    graph = source.plain_model(SilentProgress())
    parameters = SwsParameters()
    report = rewrite(graph, parameters, (), GuardOptions(), TARGETS["onnxruntime"], SilentProgress())
    save_onnx(graph, made, SilentProgress())
    found = source.validate(made, SwsSpec(parameters, report.site_names), SilentProgress())
    assert found.passed
    assert found.outputs[0].maximum <= 1e-5
    assert found.remarks == (
        "the computation of SWS was not compared: that needs the checkpoint (sws-export validate)",
    )
    expected = (6, 10) if size == "fixed" else (8, 6)
    assert (found.sizes["height"], found.sizes["width"]) == expected
