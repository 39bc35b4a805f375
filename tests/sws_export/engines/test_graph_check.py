import onnx
import pytest
from onnx import TensorProto, helper

from sws_export.engines.graph_check import check_graph
from sws_export.errors import CheckpointError, EngineError

OPSETS = [helper.make_opsetid("", 23), helper.make_opsetid("sws", 1)]


def saved(path, nodes, functions=()):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes, "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=OPSETS, functions=list(functions)), path)
    return path


def call(op_type, domain="sws"):
    return helper.make_node(op_type, ["x"], ["y"], domain=domain)


def function(name, body):
    return helper.make_function("sws", name, ["x"], ["y"], [body], OPSETS)


def test_standard_operators_pass(graph):
    check_graph(graph, custom_operators=False)


@pytest.mark.parametrize("operator", ["sws::BandedTransport", "com.microsoft::Gelu", "ai.onnx::ROIAlign_TRT"])
def test_a_custom_operator_is_named(tmp_path, operator):
    domain, op_type = operator.split("::")
    path = saved(tmp_path / "m.onnx", [call(op_type, "" if domain == "ai.onnx" else domain)])
    with pytest.raises(EngineError, match=rf"has custom operators: {operator};"):
        check_graph(path, custom_operators=False)


def test_custom_operators_pass_with_plugins(tmp_path):
    check_graph(saved(tmp_path / "m.onnx", [call("BandedTransport")]), custom_operators=True)


def test_a_function_of_the_model_is_not_a_custom_operator(tmp_path):
    body = helper.make_node("Relu", ["x"], ["y"])
    check_graph(saved(tmp_path / "m.onnx", [call("F")], [function("F", body)]), custom_operators=False)


def test_a_custom_operator_inside_a_function_is_found(tmp_path):
    functions = [function("F", call("G")), function("G", call("KeyGuard"))]
    with pytest.raises(EngineError, match=r"custom operators: sws::KeyGuard;"):
        check_graph(saved(tmp_path / "m.onnx", [call("F")], functions), custom_operators=False)


def test_a_custom_operator_inside_a_branch_is_found(tmp_path):
    def branch(op_type, domain):
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        return helper.make_graph([call(op_type, domain)], "branch", [], [out])

    choice = helper.make_node(
        "If", ["x"], ["y"], then_branch=branch("Relu", ""), else_branch=branch("KeyGuard", "sws")
    )
    with pytest.raises(EngineError, match=r"custom operators: sws::KeyGuard;"):
        check_graph(saved(tmp_path / "m.onnx", [choice]), custom_operators=False)


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"\x80"])
def test_a_file_that_is_not_a_model(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not an ONNX model or is damaged"):
        check_graph(tmp_path / "m.onnx", custom_operators=False)


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"m\.onnx: no such file"):
        check_graph(tmp_path / "m.onnx", custom_operators=False)


def with_external_data(path, small):
    onnx.save(small(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    return path


def test_complete_external_data(tmp_path, small):
    check_graph(with_external_data(tmp_path / "m.onnx", small), custom_operators=False)


def test_missing_external_data(tmp_path, small):
    path = with_external_data(tmp_path / "m.onnx", small)
    (tmp_path / "m.data").unlink()
    with pytest.raises(EngineError, match=r"weights of .* are missing: .*m\.data does not exist"):
        check_graph(path, custom_operators=False)


def test_truncated_external_data(tmp_path, small):
    path = with_external_data(tmp_path / "m.onnx", small)
    data = tmp_path / "m.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(EngineError, match=r"truncated: .*m\.data has \d+ bytes, expected \d+"):
        check_graph(path, custom_operators=False)
