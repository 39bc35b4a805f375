"""Graphs of opset 17 and later converted to opset 23."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from graph_passes.errors import GraphError
from graph_passes.upgrade_opset import UpgradeOpset
from tests.conftest import RunOnnx

TEXT = """
<ir_version: 8, opset_import: ["": {opset}]>
unet (float[B, 4, 6] x) => (float[B, 1, 3] out)
{{
    mean = ReduceMean <axes = [1], keepdims = 1> (x)
    left, right = Split <axis = 2> (mean)
    out = Add (left, right)
}}
"""


def parsed(opset: int) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT.format(opset=opset)))


def test_axes_become_an_input_and_split_counts_its_outputs(run_onnx: RunOnnx) -> None:
    values = {"x": np.random.default_rng(0).standard_normal((2, 4, 6), np.float32)}
    expected = run_onnx(parsed(17), values)["out"]
    model = parsed(17)
    assert UpgradeOpset(23)(model).modified
    assert model.graph.opset_imports[""] == 23
    assert np.array_equal(run_onnx(model, values)["out"], expected)
    assert not UpgradeOpset(23)(model).modified


def test_older_and_newer_graphs() -> None:
    with pytest.raises(GraphError, match="expected opset 17 or later, found 16"):
        UpgradeOpset(23)(parsed(16))
    newer = parsed(17)
    newer.graph.opset_imports[""] = 25
    assert not UpgradeOpset(23)(newer).modified
    assert newer.graph.opset_imports[""] == 25
