"""Attention of other exporters: MatMul, Softmax and MatMul in the forms that torch's exporters write."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from graph_passes.fold_constants import FoldConstants
from graph_passes.recognize_attention import RecognizeAttention
from tests.conftest import RunOnnx

HEADS, SIZE = 2, 4
WIDTH = HEADS * SIZE
HEAD = f"""
<ir_version: 10, opset_import: ["": 23]>
unet (float[B, T, {WIDTH}] x, float[B, L, {WIDTH}] y, float[{WIDTH}, {WIDTH}] w, float[B, 1, T, L] mask)
    => (float[B, T, {WIDTH}] out)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    heads = Constant <value_int = {HEADS}> ()
    first = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [-1]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    count = Constant <value_ints = [{HEADS}]> ()
    q = MatMul (x, w)
    k = MatMul (y, w)
    v = MatMul (y, w)
    sizes = Shape (x)
    batch = Gather (sizes, zero)
    batch1 = Unsqueeze (batch, first)
    key_sizes = Shape (k)
    width = Gather (key_sizes, two)
    size = Div (width, heads)
    size1 = Unsqueeze (size, first)
    split = Concat <axis = 0> (batch1, last, count, size1)
    q_split = Reshape (q, split)
    k_split = Reshape (k, split)
    v_split = Reshape (v, split)
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q_split)
    v_heads = Transpose <perm = [0, 2, 1, 3]> (v_split)
"""
TAIL = """
    inner = Mul (size, heads)
    inner1 = Unsqueeze (inner, first)
    join = Concat <axis = 0> (batch1, last, inner1)
    out_heads = Transpose <perm = [0, 2, 1, 3]> (attended)
    out = Reshape (out_heads, join)
}
"""
# torch's scaled_dot_product_attention in graphs of the TorchScript exporter.
FUSED = """
    k_turned = Transpose <perm = [0, 2, 3, 1]> (k_split)
    shape = Shape (q_heads)
    depth = Slice (shape, last, end)
    depth_float = Cast <to = 1> (depth)
    depth_root = Sqrt (depth_float)
    unit = Constant <value_floats = [1.0]> ()
    scale = Div (unit, depth_root)
    scale_root = Sqrt (scale)
    q_scaled = Mul (q_heads, scale_root)
    k_scaled = Mul (k_turned, scale_root)
    logits = MatMul (q_scaled, k_scaled)
    weights = Softmax <axis = -1> (logits)
    attended = MatMul (weights, v_heads)
"""
# diffusers' AttnProcessor, with heads merged into the batch and baddbmm.
MERGED = """
    k_heads = Transpose <perm = [0, 2, 1, 3]> (k_split)
    rows = Gather (sizes, one)
    rows1 = Unsqueeze (rows, first)
    many = Mul (batch, heads)
    many1 = Unsqueeze (many, first)
    merge = Concat <axis = 0> (many1, last, size1)
    q_merged = Reshape (q_heads, merge)
    k_merged = Reshape (k_heads, merge)
    v_merged = Reshape (v_heads, merge)
    k_turned = Transpose <perm = [0, 2, 1]> (k_merged)
    product = MatMul (q_merged, k_turned)
    scale = Constant <value_float = 0.5> ()
    scaled = Mul (product, scale)
    nothing = Constant <value_float = 0.0> ()
    logits_shape = Shape (product)
    empty = ConstantOfShape (logits_shape)
    zeros = Mul (empty, nothing)
    logits = Add (scaled, zeros)
    weights = Softmax <axis = -1> (logits)
    merged = MatMul (weights, v_merged)
    merged_shape = Shape (merged)
    merged_batch = Gather (merged_shape, zero)
    merged_rows = Gather (merged_shape, one)
    out_batch = Div (merged_batch, heads)
    out_batch1 = Unsqueeze (out_batch, first)
    out_rows1 = Unsqueeze (merged_rows, first)
    part = Concat <axis = 0> (out_batch1, count, out_rows1, size1)
    attended = Reshape (merged, part)
"""
# torch's scaled_dot_product_attention in graphs of the dynamo exporter of opset 18.
THREE_STEPS = """
    k_heads = Transpose <perm = [0, 2, 1, 3]> (k_split)
    shape = Shape <start = 0> (k_heads)
    minus2 = Constant <value_ints = [-2]> ()
    least = Constant <value_ints = [-9223372036854775808]> ()
    depth = Slice (shape, last, end)
    keys = Slice (shape, minus2, last)
    outer = Slice (shape, least, minus2)
    flat = Concat <axis = 0> (last, keys, depth)
    k_flat = Reshape (k_heads, flat)
    k_flat_turned = Transpose <perm = [0, 2, 1]> (k_flat)
    unflat = Concat <axis = 0> (outer, depth, keys)
    k_turned = Reshape (k_flat_turned, unflat)
    scale_root = Constant <value_float = 0.70710677> ()
    q_scaled = Mul (q_heads, scale_root)
    k_scaled = Mul (k_turned, scale_root)
    logits = MatMul (q_scaled, k_scaled)
    weights = Softmax <axis = -1> (logits)
    attended = MatMul (weights, v_heads)
"""
FORMS = {"fused": FUSED, "merged": MERGED, "three steps": THREE_STEPS}


def parsed(body: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(HEAD + body + TAIL))


def recognized(body: str) -> tuple[ir.Model, bool]:
    model = parsed(body)
    FoldConstants()(model)
    return model, RecognizeAttention()(model).modified


def values() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"x": (2, 5, WIDTH), "y": (2, 3, WIDTH), "w": (WIDTH, WIDTH), "mask": (2, 1, 5, 3)}
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_exporters(run_onnx: RunOnnx, form: str) -> None:
    expected = run_onnx(parsed(FORMS[form]), values())["out"]
    model, modified = recognized(FORMS[form])
    assert modified
    kinds = [node.op_type for node in model.graph if node.op_type != "Constant"]
    assert sorted(kinds) == ["Attention", *["MatMul"] * 3, *["Reshape"] * 4, *["Transpose"] * 4]
    (attention,) = [node for node in model.graph if node.op_type == "Attention"]
    assert attention.attributes["scale"].as_float() == pytest.approx(SIZE**-0.5)
    np.testing.assert_allclose(run_onnx(model, values())["out"], expected, rtol=0, atol=1e-6)
    assert not RecognizeAttention()(model).modified


@pytest.mark.parametrize(
    ("form", "old", "new"),
    [
        ("fused", "Softmax <axis = -1> (logits)", "Softmax <axis = 1> (logits)"),
        (
            "fused",
            "weights = Softmax <axis = -1> (logits)",
            "masked = Add (logits, mask)\n weights = Softmax (masked)",
        ),
        (
            "fused",
            "weights = Softmax <axis = -1> (logits)",
            "wide = Cast <to = 11> (logits)\n soft = Softmax (wide)\n weights = Cast <to = 1> (soft)",
        ),
        ("merged", "logits = Add (scaled, zeros)", "logits = Add (scaled, product)"),
        ("merged", "many = Mul (batch, heads)", "many = Mul (batch, one)"),
        ("three steps", "perm = [0, 2, 1]> (k_flat)", "perm = [0, 1, 2]> (k_flat)"),
    ],
)
def test_near_misses_are_left(form: str, old: str, new: str) -> None:
    body = FORMS[form].replace(old, new)
    assert body != FORMS[form]
    model, modified = recognized(body)
    assert not modified
    assert any(node.op_type == "Softmax" for node in model.graph)
