"""Plain graphs of optimum, ComfyUI and torch's exporters."""

import dataclasses
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sws_export import ExportOptions, SwsOptions, export
from sws_export.errors import ExportError
from sws_export.runtime import Session
from sws_export.sources.onnx import open_onnx_source

OPTIONS = ExportOptions(sws=SwsOptions(guard="literal", sites=("mid_block.*.attn1",)))


def changed(traced: Path, file: Path, change: Callable[[ir.Model], object]) -> Path:
    model = ir.load(traced)
    model.metadata_props.clear()
    change(model)
    ir.save(model, file)
    return file


def scalar_timestep(model: ir.Model) -> None:
    """As optimum exports it: one integer, repeated for the batch."""
    graph = model.graph
    (old,) = [value for value in graph.inputs if value.name == "timestep"]
    (sample,) = [value for value in graph.inputs if value.name == "sample"]
    new = ir.Value(name="timestep", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    graph.inputs[1] = new
    zero = ir.node("Constant", [], {"value_ints": [0]}, name="zero")
    vector = ir.node("Unsqueeze", [new, zero.outputs[0]], name="Unsqueeze")
    batch = ir.node("Shape", [sample], {"start": 0, "end": 1}, name="Shape")
    repeated = ir.node("Expand", [vector.outputs[0], batch.outputs[0]], name="Expand")
    floats = ir.node("Cast", [repeated.outputs[0]], {"to": 1}, name="Cast")
    ir.convenience.replace_all_uses_with(old, floats.outputs[0])
    graph.insert_before(graph[0], [zero, vector, batch, repeated, floats])


def comfyui_names(model: ir.Model) -> None:
    for value, name in zip(model.graph.inputs, ("x", "timesteps", "context"), strict=True):
        value.name = name
    model.graph.outputs[0].name = "h"


def half_timesteps(model: ir.Model) -> None:
    """ComfyUI's timesteps have the precision of the UNet."""
    (old,) = [value for value in model.graph.inputs if value.name == "timestep"]
    cast = ir.node("Cast", [old], {"to": 1}, name="timestep/Cast")
    ir.convenience.replace_all_uses_with(old, cast.outputs[0])
    cast.replace_input_with(0, old)
    old.dtype = ir.DataType.FLOAT16
    model.graph.insert_before(model.graph[0], cast)


def opset(number: int) -> Callable[[ir.Model], None]:
    return lambda model: model.graph.opset_imports.update({"": number})


def in_turn(*changes: Callable[[ir.Model], object]) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        for one in changes:
            one(model)

    return change


@pytest.mark.parametrize(
    "change",
    [in_turn(scalar_timestep, comfyui_names, opset(25)), in_turn(half_timesteps, opset(24))],
    ids=["scalar timestep, comfyui, opset 25", "half timesteps, opset 24"],
)
def test_the_exported_graph_has_the_inputs_of_the_contract(
    traced: Path, tmp_path: Path, change: Callable[[ir.Model], object]
) -> None:
    graph = changed(traced, tmp_path / "g.onnx", change)
    result = export(graph, tmp_path / "out.onnx", OPTIONS)
    assert result.validation is not None
    (output,) = result.validation.outputs
    assert output.name == "out_sample"
    assert output.maximum < 1e-6
    manifest = json.loads((tmp_path / "out.onnx.json").read_text())
    inputs = {entry["name"]: (entry["dtype"], entry["shape"]) for entry in manifest["inputs"]}
    assert inputs["timestep"] == ("float32", ["batch"])
    assert inputs["sample"] == ("float32", ["batch", 4, "height", "width"])
    assert list(inputs)[:3] == ["sample", "timestep", "encoder_hidden_states"]
    assert manifest["opset"] == ir.load(tmp_path / "out.onnx").graph.opset_imports[""]


def test_samples_have_timesteps_of_their_own(traced: Path, tmp_path: Path) -> None:
    """The scalar timestep of the original becomes one for each sample, and may be fractional."""
    graph = changed(traced, tmp_path / "g.onnx", scalar_timestep)
    export(graph, tmp_path / "out.onnx", dataclasses.replace(OPTIONS, validate=False))
    random = np.random.default_rng(0)
    step: dict[str, Any] = {
        "sample": random.standard_normal((2, 4, 8, 6), np.float32),
        "timestep": np.array([900.5, 100.25], np.float32),
        "encoder_hidden_states": random.standard_normal((2, 5, 16), np.float32),
    }
    found = Session.load(tmp_path / "out.onnx").step(**step, sigma=5.0, intensity=0.0)
    expected = Session.load(traced).step(**step)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_scalar_timestep_that_is_used_in_another_way(traced: Path, tmp_path: Path) -> None:
    def change(model: ir.Model) -> None:
        scalar_timestep(model)
        (expand,) = [node for node in model.graph if node.name == "Expand"]
        expand.op_type = "Tile"

    with pytest.raises(ExportError, match="the timestep is one number, and the graph does not repeat it"):
        open_onnx_source(changed(traced, tmp_path / "g.onnx", change))


def test_a_graph_without_attention(traced: Path, tmp_path: Path) -> None:
    def change(model: ir.Model) -> None:
        for node in list(model.graph):
            if node.op_type == "Attention":
                node.domain, node.op_type = "other", "FusedAttention"
        model.graph.opset_imports["other"] = 1

    with pytest.raises(
        ExportError, match=r"opset 23, and the graph has neither Attention nodes nor .*export"
    ):
        open_onnx_source(changed(traced, tmp_path / "g.onnx", change))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0"])
def test_graphs_of_the_torchscript_exporter(random_unet: Path, tmp_path: Path, processor: str) -> None:
    """What optimum runs: opset 17, one integer timestep, attention as MatMul, Softmax and MatMul."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models import attention_processor

    unet = UNet2DConditionModel.from_pretrained(random_unet).eval()
    unet.set_attn_processor(getattr(attention_processor, processor)())
    forward = unet.forward
    unet.forward = types.MethodType(lambda _, *inputs: forward(*inputs, return_dict=False)[0], unet)
    axes = {0: "batch_size", 2: "height", 3: "width"}
    torch.onnx.export(
        unet,
        (torch.randn(2, 4, 16, 16), torch.tensor(1), torch.randn(2, 7, 16)),
        tmp_path / "g.onnx",
        input_names=["sample", "timestep", "encoder_hidden_states"],
        output_names=["out_sample"],
        dynamic_axes={"sample": axes, "encoder_hidden_states": {0: "batch_size", 1: "sequence_length"}},
        opset_version=17,
        dynamo=False,
    )
    result = export(tmp_path / "g.onnx", tmp_path / "out.onnx", ExportOptions(sws=SwsOptions(sites=("*",))))
    assert result.manifest is not None
    assert {grid: len(names) for grid, names in result.manifest["sites"].items()} == {"d2": 4, "text": 4}
    assert result.validation is not None
    assert max(output.maximum for output in result.validation.outputs) < 1e-5
