"""A graph with the kinds of layers that a UNet has, small enough to run in milliseconds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

WIDTH = 64
QUANTIZED = {
    "down_blocks.0.conv": 0,
    "mid_block.to_q": 0,
    "mid_block.to_k": 1,
    "mid_block.proj": 0,
    "mid_block.gate": 1,
}
"""Layers that are quantized, and the axis of the output channels in their weights."""
SKIPPED = {
    "time_embedding.linear_1": "embedding of the timestep or of another condition",
    "conv_in": "first convolution",
    "mid_block.small": "fewer than 4096 weights",
    "mid_block.tied": "its weight has other uses",
    "conv_out": "last convolution",
}


class _Builder:
    def __init__(self, dtype: ir.DataType) -> None:
        self.dtype = dtype
        self.random = np.random.default_rng(0)
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def weight(self, name: str, *shape: int) -> ir.Value:
        # The channels of both axes have different ranges, so that a scale of the wrong axis is noticed.
        ranges = np.geomspace(0.02, 0.5, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
        values = self.random.standard_normal(shape) * ranges
        values = values * np.geomspace(0.3, 1, shape[1]).reshape(-1, *(1,) * (len(shape) - 2))
        return self.initializer(f"{name}.weight", values)

    def initializer(self, name: str, array: Any, dtype: ir.DataType | None = None) -> ir.Value:
        tensor = ir.tensor(np.asarray(array, (dtype or self.dtype).numpy()), name=name)
        self.initializers.append(ir.val(name, const_value=tensor))
        return self.initializers[-1]

    def node(self, op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"{name}/{op_type}")
        node.outputs[0].name, node.outputs[0].type = f"{name}:{op_type}", ir.TensorType(self.dtype)
        self.nodes.append(node)
        return node.outputs[0]

    def linear(self, x: ir.Value, name: str, width: int = WIDTH) -> ir.Value:
        """As the tracer writes it: the weight [out, in] is transposed in the graph."""
        transposed = self.node("Transpose", [self.weight(name, width, WIDTH)], name, perm=[1, 0])
        return self.node("MatMul", [x, transposed], name)


def layer_model(dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """`sample` [B, 4, H, W], `timestep` [B, 64], `encoder_hidden_states` [B, L, 64] -> `out_sample`."""
    build = _Builder(dtype)
    sample, timestep, text = (
        ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        for name, shape in (
            ("sample", ["batch", 4, "height", "width"]),
            ("timestep", ["batch", WIDTH]),
            ("encoder_hidden_states", ["batch", "tokens", WIDTH]),
        )
    )
    embedding = build.node(
        "Gemm", [timestep, build.weight("time_embedding.linear_1", WIDTH, WIDTH)], "time_embedding.linear_1"
    )
    x = build.node("Conv", [sample, build.weight("conv_in", WIDTH, 4, 5, 5)], "conv_in", pads=[2] * 4)
    x = build.node("Conv", [x, build.weight("down_blocks.0.conv", WIDTH, WIDTH, 1, 1)], "down_blocks.0.conv")
    pooled = build.node("ReduceMean", [x, build.initializer("axes", [2, 3], ir.DataType.INT64)], "pool")
    flat = build.node(
        "Reshape", [pooled, build.initializer("flat", [-1, WIDTH], ir.DataType.INT64)], "flatten"
    )
    flat = build.node("Add", [flat, embedding], "embed")
    proj = build.node(
        "Gemm", [flat, build.weight("mid_block.proj", WIDTH, WIDTH)], "mid_block.proj", transB=1
    )
    gate = build.node("Gemm", [proj, build.weight("mid_block.gate", WIDTH, WIDTH)], "mid_block.gate")
    q = build.linear(text, "mid_block.to_q", 80)
    k = build.node("MatMul", [text, build.weight("mid_block.to_k", WIDTH, 80)], "mid_block.to_k")
    logits = build.node("MatMul", [q, build.node("Transpose", [k], "keys", perm=[0, 2, 1])], "mid_block.attn")
    small = build.linear(text, "mid_block.small", 32)
    tied = build.weight("mid_block.tied", WIDTH, WIDTH)
    gain = build.node("Add", [build.node("MatMul", [text, tied], "mid_block.tied"), tied], "mid_block.gain")
    total = gate
    for index, value in enumerate((logits, small, gain)):
        mean = build.node(
            "ReduceMean", [value, build.initializer(f"all_{index}", [1, 2], ir.DataType.INT64)], f"m{index}"
        )
        mean = build.node(
            "Reshape", [mean, build.initializer(f"to_{index}", [-1, 1], ir.DataType.INT64)], f"r{index}"
        )
        total = build.node("Add", [total, mean], f"total_{index}")
    image = build.node(
        "Reshape",
        [total, build.initializer("image", [0, WIDTH, 1, 1], ir.DataType.INT64)],
        "unflatten",
    )
    x = build.node("Add", [x, image], "mix")
    out = build.node("Conv", [x, build.weight("conv_out", 4, WIDTH, 5, 5)], "conv_out", pads=[2] * 4)
    out.name, out.shape = "out_sample", ir.Shape(["batch", 4, "height", "width"])
    graph = ir.Graph(
        [sample, timestep, text],
        [out],
        nodes=build.nodes,
        initializers=build.initializers,
        opset_imports={"": 23},
        name="unet",
    )
    return ir.Model(graph, ir_version=10)


def layer_feeds(dtype: ir.DataType = ir.DataType.FLOAT) -> dict[str, Any]:
    """Inputs for `layer_model`, with 64 text tokens."""
    random = np.random.default_rng(1)
    shapes = {"sample": (2, 4, 6, 5), "timestep": (2, WIDTH), "encoder_hidden_states": (2, WIDTH, WIDTH)}
    return {name: random.standard_normal(shape).astype(dtype.numpy()) for name, shape in shapes.items()}
