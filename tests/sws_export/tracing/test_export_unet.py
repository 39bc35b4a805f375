"""The plain export: structure, dynamic sizes, agreement with torch, weights, deterministic bytes."""

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from graph_passes.clean_graph import CleanGraph
from graph_passes.find_sites import find_sites
from sws_export.checkpoint import Checkpoint, open_checkpoint
from sws_export.checkpoint.unet_module import call_unet, load_unet
from sws_export.errors import ExportError
from sws_export.onnx_files import save_onnx
from sws_export.progress import SilentProgress
from sws_export.tracing.export_unet import export_plain
from tests.conftest import ROOT, SHAPES, RunOnnx, ShapesModel, ShapesOnnx
from tests.graph_passes.small_models import graph_bytes

TinyModel = Callable[[Any], ir.Model]
# Batch, height, width, tokens; the UNet halves its input twice.
SIZES = [(1, 32, 32, 7), (3, 16, 24, 77), (2, 4, 8, 1)]
TINY: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "mid_block_type": None,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}


def shapes_feeds(batch: int, height: int, width: int, tokens: int, dtype: str = "float32") -> dict[str, Any]:
    random = np.random.default_rng(batch)
    return {
        "sample": random.standard_normal((batch, 3, height, width)).astype(dtype),
        "timestep": np.linspace(20, 950, batch, dtype=np.float32),
        "encoder_hidden_states": random.standard_normal((batch, tokens, 64)).astype(dtype),
    }


def relative_error(found: Any, expected: Any) -> float:
    """Largest difference, relative to the largest value expected."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def cleaned_bytes(file: Path) -> bytes:
    """The model without metadata of the exporter's run, as artefacts are saved."""
    model = ir.load(file)
    CleanGraph()(model)
    return graph_bytes(model)


@pytest.fixture(scope="module")
def exact_prediction() -> Any:
    """The example in torch, in float64."""
    unet = load_unet(open_checkpoint(SHAPES), torch.float64)

    def predict(feeds: Mapping[str, Any]) -> Any:
        inputs = {name: torch.from_numpy(value).double() for name, value in feeds.items()}
        with torch.no_grad():
            return call_unet(unet, inputs).numpy()

    return predict


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet with two attention layers and random float32 weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("tiny-unet-of-a-test")
    unet = UNet2DConditionModel.from_config(TINY)
    save_file(unet.state_dict(), directory / "diffusion_pytorch_model.safetensors")
    (directory / "config.json").write_text(json.dumps(TINY))
    return directory


@pytest.fixture(scope="module")
def tiny(tiny_directory: Path) -> Checkpoint:
    return open_checkpoint(tiny_directory)


@pytest.fixture(scope="module")
def tiny_model(tiny: Checkpoint) -> TinyModel:
    """Its export in any precision, not to be changed."""
    return functools.cache(lambda precision: export_plain(tiny, precision))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_attention_node_for_each_layer_and_the_names_of_inputs(
    shapes_model: ShapesModel, precision: str
) -> None:
    model = shapes_model(precision)
    assert [node.op_type for node in model.graph].count("Attention") == 14
    assert {node.domain for node in model.graph} == {""}
    assert model.graph.opset_imports == {"": 23}
    assert len(model.functions) == 0
    assert len(find_sites(model)[0]) == 7
    dtype = {"fp32": "FLOAT", "fp16": "FLOAT16"}[precision]
    interface = [
        (
            value.name,
            value.dtype and value.dtype.name,
            [getattr(dim, "value", dim) for dim in value.shape or ()],
        )
        for value in (*model.graph.inputs, *model.graph.outputs)
    ]
    assert interface == [
        ("sample", dtype, ["batch", 3, "height", "width"]),
        ("timestep", "FLOAT", ["batch"]),
        ("encoder_hidden_states", dtype, ["batch", "tokens", 64]),
        ("out_sample", dtype, ["batch", 3, "height", "width"]),
    ]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_agrees_with_torch_in_float64(
    shapes_model: ShapesModel, run_onnx: RunOnnx, exact_prediction: Any, size: tuple[int, int, int, int]
) -> None:
    feeds = shapes_feeds(*size)
    expected = exact_prediction(feeds)
    found = run_onnx(shapes_model("fp32"), feeds)["out_sample"]
    assert found.shape == expected.shape == (size[0], 3, size[1], size[2])
    assert found.dtype == np.float32
    assert relative_error(found, expected) <= 1e-5


def test_float16_agrees_within_its_precision(
    shapes_model: ShapesModel, run_onnx: RunOnnx, exact_prediction: Any
) -> None:
    feeds = shapes_feeds(*SIZES[1], dtype="float16")
    found = run_onnx(shapes_model("fp16"), feeds)["out_sample"]
    assert found.dtype == np.float16
    assert relative_error(found.astype(np.float64), exact_prediction(feeds)) <= 2e-2


def test_samples_are_independent(shapes_model: ShapesModel, run_onnx: RunOnnx) -> None:
    feeds = shapes_feeds(3, 16, 24, 7)
    model = shapes_model("fp32")
    together = run_onnx(model, feeds)["out_sample"]
    for member in range(3):
        alone = run_onnx(model, {name: value[member : member + 1] for name, value in feeds.items()})
        assert relative_error(together[member], alone["out_sample"][0]) <= 1e-5


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_are_those_of_the_checkpoint(shapes_model: ShapesModel, precision: str) -> None:
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    weights = load_file(SHAPES / "diffusion_pytorch_model.safetensors")
    model = shapes_model(precision)
    found = {name: value for name, value in model.graph.initializers.items() if name in weights}
    assert found.keys() == weights.keys()
    for name, value in found.items():
        assert value.const_value is not None
        expected = weights[name].to(dtype)
        assert list(value.const_value.shape) == list(expected.shape), name
        assert value.const_value.tobytes() == expected.numpy().tobytes(), name


def test_other_floats_of_a_float16_graph_are_small(shapes_model: ShapesModel) -> None:
    """Only the time embedding's table and constants stay float32."""
    model = shapes_model("fp16")
    wide = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
    assert all(value.const_value is not None and value.const_value.size <= 16 for value in wide)


def test_a_weight_in_the_stored_precision_is_read_from_the_checkpoints_file(
    tiny: Checkpoint, tiny_model: TinyModel
) -> None:
    model = tiny_model("fp32")
    for name, expected in load_file(tiny.files[0]).items():
        tensor = model.graph.initializers[name].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.tobytes() == expected.numpy().tobytes()


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_converted_weight_is_rounded_as_torch_rounds(
    tiny: Checkpoint,
    tiny_model: TinyModel,
    precision: str,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    model = tiny_model(precision)
    ir_dtype = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
    assert [value.dtype for value in model.graph.inputs] == [ir_dtype, ir.DataType.FLOAT, ir_dtype]
    assert model.graph.outputs[0].dtype == ir_dtype
    save_onnx(model, tmp_path / "m.onnx", SilentProgress())
    saved = ir.load(tmp_path / "m.onnx").graph.initializers
    for name, expected in load_file(tiny.files[0]).items():
        tensor = saved[name].const_value
        assert tensor is not None
        assert tensor.dtype == ir_dtype
        assert list(tensor.shape) == list(expected.shape)
        assert tensor.tobytes() == expected.to(dtype).view(torch.int16).numpy().tobytes(), name


def test_fused_weights_replace_stored_ones_and_must_be_in_range(tiny: Checkpoint) -> None:
    large = torch.zeros(16)
    large[3] = -7e4
    fused = {"conv_in.bias": lambda: large, "conv_out.bias": lambda: torch.full((4,), 0.5)}
    weights = export_plain(tiny, "fp16", fused=fused).graph.initializers
    assert weights["conv_out.bias"].const_value is not None
    assert weights["conv_out.bias"].const_value.numpy().tolist() == [0.5] * 4
    assert weights["conv_in.bias"].const_value is not None
    message = (
        r"conv_in\.bias: a weight of 7e\+04 exceeds the range of fp16; export with --precision bf16 or fp32"
    )
    with pytest.raises(ExportError, match=message):
        weights["conv_in.bias"].const_value.tobytes()


def test_a_missing_weight_is_refused_by_name(tiny: Checkpoint) -> None:
    stored = {name: tensor for name, tensor in tiny.tensors.items() if name != "conv_out.bias"}
    with pytest.raises(ExportError, match=r"tensor conv_out\.bias is missing"):
        export_plain(dataclasses.replace(tiny, stored=stored))


EXPORT = """
import sys
from pathlib import Path
from sws_export.checkpoint import open_checkpoint
from sws_export.tracing.export_unet import export_plain
from sws_export.onnx_files import save_onnx
from sws_export.progress import SilentProgress
save_onnx(export_plain(open_checkpoint(Path(sys.argv[1])), "fp16"), Path(sys.argv[2]), SilentProgress())
"""


@pytest.mark.slow
def test_another_process_elsewhere_writes_the_same_bytes(
    tiny_directory: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    here = tmp_path / "here.onnx"
    save_onnx(tiny_model("fp16"), here, SilentProgress())
    moved = tmp_path / "copy"
    moved.mkdir()
    for file in tiny_directory.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    there = tmp_path / "there.onnx"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXPORT, "copy", "there.onnx"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345", "HOME": str(tmp_path)},
        check=True,
    )
    assert cleaned_bytes(there) == cleaned_bytes(here)


def test_the_model_contains_no_paths_of_this_machine(shapes_onnx: ShapesOnnx) -> None:
    data = cleaned_bytes(shapes_onnx("fp32"))
    for place in (ROOT, SHAPES, Path(sys.prefix), Path(torch.__file__).parent, Path.home() / ".cache"):
        assert str(place).encode() not in data
    for mark in (b"site-packages", b"stack_trace", b".safetensors"):
        assert mark not in data


def test_an_unsupported_input_is_refused_before_tracing(tiny: Checkpoint) -> None:
    odd = dataclasses.replace(tiny, config={**tiny.config, "encoder_hid_dim_type": "text_proj"})
    with pytest.raises(ExportError, match="encoder_hid_dim_type"):
        export_plain(odd)
