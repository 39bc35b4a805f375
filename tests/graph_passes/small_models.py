"""Graphs with attention sites as a UNet's export has them, small enough to run in milliseconds."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graph_passes.clean_graph import CleanGraph
from graph_passes.fold_constants import FoldConstants
from graph_passes.lower_functions import LowerFunctions

CHANNELS = 8
HEADS = 2
FLOAT = ir.DataType.FLOAT


def site_name(path: str) -> str:
    """Full path of the first self-attention below `path`, as in `down_blocks.0`."""
    return f"{path}.attentions.0.transformer_blocks.0.attn1"


@dataclasses.dataclass(frozen=True)
class SiteSpec:
    """One attention of a small model; the defaults are a self-attention site.

    Attributes:
        name: Module path.
        factor: Downsampling of its grid.
        context: Keys and values come from the input `encoder_hidden_states`.
        context_values: Values alone come from there.
        cast_context: What comes from there is cast first.
        image_prompt: Keys and values come from an input of another name.
        projected: Queries are a projection of the tokens; else the tokens themselves.
        bias: Projections have biases.
        masked: A mask is added to the logits.
        split: Permutation after the heads are split.
        join: Permutation before the heads are joined.
        typed: The shape of the queries is known.
        watched: The result per head has a second consumer.
        kv_heads: Heads of keys and values.
        attributes: Further attributes of the node.
    """

    name: str = site_name("down_blocks.0")
    factor: int = 1
    context: bool = False
    context_values: bool = False
    cast_context: bool = False
    image_prompt: bool = False
    projected: bool = True
    bias: bool = False
    masked: bool = False
    split: tuple[int, int, int, int] = (0, 2, 1, 3)
    join: tuple[int, int, int, int] = (0, 2, 1, 3)
    typed: bool = True
    watched: bool = False
    kv_heads: int = HEADS
    attributes: tuple[tuple[str, Any], ...] = ()


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.random = np.random.default_rng(0)

    def constant(self, array: Any) -> ir.Value:
        name = f"constant_{len(self.initializers)}"
        tensor = ir.tensor(np.asarray(array), name=name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self.initializers.append(value)
        return value

    def node(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        name = f"{name}/{op_type}"
        taken = sum(node.name is not None and node.name.startswith(name) for node in self.nodes)
        node = ir.node(op_type, inputs, attributes, name=f"{name}_{taken + 1}" if taken else name)
        node.outputs[0].name = f"value_{len(self.nodes)}"
        node.outputs[0].type = ir.TensorType(FLOAT)
        self.nodes.append(node)
        return node.outputs[0]

    def project(self, x: ir.Value, width: int, spread: float, name: str, bias: bool) -> ir.Value:
        weight = self.random.standard_normal((_width(x), width), dtype=np.float32) * np.float32(spread)
        y = self.node("MatMul", [x, self.constant(weight)], name)
        if bias:
            y = self.node("Add", [self.constant(self.random.standard_normal(width, np.float32)), y], name)
        return y

    def heads(self, x: ir.Value, heads: int, perm: Sequence[int], name: str) -> ir.Value:
        shape = self.constant(np.array([0, 0, heads, CHANNELS // HEADS]))
        return self.node("Transpose", [self.node("Reshape", [x, shape], name)], name, perm=list(perm))

    def site(
        self, spec: SiteSpec, tokens: ir.Value, context: ir.Value, image: ir.Value
    ) -> tuple[ir.Value, list[ir.Value]]:
        """The attention's output [B, T, C], and values with a second consumer."""
        name = spec.name
        source = image if spec.image_prompt else context if spec.context else tokens
        if spec.cast_context:
            source = self.node("Cast", [source], name, to=int(FLOAT))
        values = context if spec.context_values else source
        kv_width = CHANNELS * spec.kv_heads // HEADS
        # Large queries make attention peaked.
        q = self.project(tokens, CHANNELS, 2.0, f"{name}.to_q", spec.bias) if spec.projected else tokens
        k = self.project(source, kv_width, 0.7, f"{name}.to_k", spec.bias)
        v = self.project(values, kv_width, 0.7, f"{name}.to_v", spec.bias)
        inputs: list[ir.Value | None] = [
            self.heads(q, HEADS, spec.split, name),
            self.heads(k, spec.kv_heads, spec.split, name),
            self.heads(v, spec.kv_heads, spec.split, name),
        ]
        if spec.typed:
            for value, heads in zip(inputs, (HEADS, spec.kv_heads, spec.kv_heads), strict=True):
                assert value is not None
                value.shape = ir.Shape(["batch", heads, None, CHANNELS // HEADS])
        if spec.masked:
            inputs.append(self.constant(np.zeros((1, 1), np.float32)))
        y = self.node("Attention", inputs, name, **dict(spec.attributes))
        joined = self.node("Transpose", [y], name, perm=list(spec.join))
        result = self.node("Reshape", [joined, self.constant(np.array([0, -1, CHANNELS]))], name)
        return result, [self.node("Identity", [y], name)] if spec.watched else []


def _width(x: ir.Value) -> int:
    """Channels of [B, T, C]: the declared ones of an input, else `CHANNELS`."""
    width = x.shape[2] if x.producer() is None and x.shape is not None else CHANNELS
    assert isinstance(width, int)
    return width


def float_input(name: str, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(shape))


def build_model(specs: Sequence[SiteSpec], levels: int = 1, text_width: int = CHANNELS) -> ir.Model:
    """`sample` [B, 8, H, W], `encoder_hidden_states` [B, L, 8] -> `out_sample`, all tokens joined.

    Args:
        specs: The sites, in graph order.
        levels: Resolutions of the UNet that this stands for.
        text_width: Channels of the text.
    """
    build = _Builder()
    sample = float_input("sample", ["batch", CHANNELS, "height", "width"])
    text = float_input("encoder_hidden_states", ["batch", "tokens", text_width])
    image = float_input("image_embeds", ["batch", "image_tokens", CHANNELS])
    build.node("Neg", [sample], f"down_blocks.{levels - 1}.resnets.0")
    results, further = [], []
    for spec in specs:
        side = [spec.factor, spec.factor]
        grid = build.node("AveragePool", [sample], "pool", kernel_shape=side, strides=side)
        flat = build.node("Reshape", [grid, build.constant(np.array([0, 0, -1]))], "flatten")
        tokens = build.node("Transpose", [flat], "flatten", perm=[0, 2, 1])
        result, others = build.site(spec, tokens, text, image)
        results.append(build.project(result, CHANNELS, 0.5, f"{spec.name}.to_out.0", True))
        further += others
    out = build.node("Concat", results, "conv_out", axis=1)
    out.name = "out_sample"
    out.shape = ir.Shape(["batch", None, CHANNELS])
    graph = ir.Graph(
        [sample, text, *([image] if any(spec.image_prompt for spec in specs) else [])],
        [out, *further],
        nodes=build.nodes,
        initializers=build.initializers,
        opset_imports={"": 23},
        name="unet",
    )
    return ir.Model(graph, ir_version=11)


def feeds(
    batch: int = 2, height: int = 4, width: int = 6, tokens: int = 5, text_width: int = CHANNELS
) -> dict[str, Any]:
    """Inputs of a small model; samples of the batch differ."""
    random = np.random.default_rng(1)
    return {
        "sample": random.standard_normal((batch, CHANNELS, height, width), dtype=np.float32),
        "encoder_hidden_states": random.standard_normal((batch, tokens, text_width), dtype=np.float32),
    }


def op_counts(model: ir.Model) -> dict[str, int]:
    """Nodes of each type, with the domain where it is not ONNX's."""
    counts: dict[str, int] = {}
    for node in model.graph:
        name = f"{node.domain}.{node.op_type}".lstrip(".")
        counts[name] = counts.get(name, 0) + 1
    return counts


def graph_bytes(model: ir.Model) -> bytes:
    """The serialized model, equal for equal models."""
    return ir.to_proto(model).SerializeToString(deterministic=True)


def finished(model: ir.Model) -> ir.Model:
    """`model` with all SWS functions lowered, folded and cleaned, as at the end of an export."""
    LowerFunctions()(model)
    FoldConstants()(model)
    CleanGraph()(model)
    return model
