"""Traffic between two products, as `benchmarks/rtx_model.py` counts it."""

from pathlib import Path

import onnx
import onnx.parser
import pytest

from benchmarks.rtx_model import network_work

MATRIX = 4 * 64 * 64
"""Bytes of [64, 64] float32."""


@pytest.mark.parametrize(
    ("between", "traffic"),
    [
        ("b = Add (a, a)", 2 * MATRIX),
        ("c = Add (a, x)  b = Mul (c, c)", 3 * MATRIX),
        # The same elements in the same order.
        ("c = Reshape (a, flat)  b = Reshape (c, square)", 0),
        ("b = Transpose <perm = [1, 0]> (a)", 2 * MATRIX),
        ("c = Reshape (a, flat)  d = Reshape (c, square)  b = Add (d, d)", 2 * MATRIX),
        # No more is read than is used.
        ("c, d = Split <num_outputs = 2> (a)  b = Concat <axis = 0> (d, c)", 2 * MATRIX),
    ],
)
def test_traffic_of_fused_layers(tmp_path: Path, between: str, traffic: int) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 23]>
        model (float[64, 64] x, float[64, 64] weight) => (float[64, 64] y)
        <int64[1] flat = {{4096}}, int64[2] square = {{64, 64}}> {{
            a = MatMul (x, weight)
            {between}
            y = MatMul (b, weight)
        }}"""
    )
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    work = network_work(path)
    products = [row for row in work if row.kind.startswith("product")]
    assert [row.operations for row in products] == [2 * 64**3] * 2
    assert [row.bytes for row in products] == [3 * MATRIX] * 2
    assert sum(row.bytes for row in work) - 6 * MATRIX == traffic
