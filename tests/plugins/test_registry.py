"""The plugin registry and ONNX parser of TensorRT for RTX load the library and resolve its operators."""

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("tensorrt_rtx")

SESSION = Path(__file__).with_name("registry_session.py")


def session(library: Path, *arguments: str) -> str:
    command = [sys.executable, str(SESSION), str(library), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "loaded True" in result.stdout, result.stdout + result.stderr
    # The logger prints to stdout; the plugin library writes to stderr only if it finds no logger.
    assert "sws::" not in result.stderr
    return result.stdout


def test_creators_make_plugins(library: Path) -> None:
    output = session(library, "creators")

    for namespace in ("sws", ""):
        assert f"creator {namespace}::BandedTransport 1 radius tensors\n" in output
        assert f"creator {namespace}::KeyGuard 1 num_heads scale key_cap bisection_steps\n" in output
    assert "plugin sws::BandedTransport 2 True" in output
    assert "plugin sws::KeyGuard 2 True" in output
    assert "done" in output


def test_the_reason_of_a_refusal_reaches_the_logger(library: Path) -> None:
    output = session(library, "refuse")

    assert output.count("refused True") == 2
    for operator, reason in (
        ("BandedTransport", "attribute 'radius': expected 1 to 8, found 99"),
        ("KeyGuard", "attribute 'num_heads' is missing"),
    ):
        assert f"log Severity.ERROR sws::{operator}: layer 'layer': {reason}" in output


def transport_model(domain: str, *functions: onnx.FunctionProto) -> onnx.ModelProto:
    node = helper.make_node("BandedTransport", ["P", "x"], ["y"], domain=domain, radius=8, tensors=1)
    graph = helper.make_graph(
        [node],
        "transport",
        [
            helper.make_tensor_value_info("P", TensorProto.FLOAT, [1, 145, 8, 8]),
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 64, 16]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 64, 16])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions)


@pytest.mark.parametrize("domain", ["sws", "trt.plugins"])
def test_the_onnx_parser_resolves_a_node(library: Path, tmp_path: Path, domain: str) -> None:
    """By the node's domain, or by the empty namespace, as ONNX Runtime's TensorRT provider writes it."""
    onnx.save(transport_model(domain), tmp_path / "transport.onnx")

    output = session(library, "parse", str(tmp_path / "transport.onnx"))

    assert "Successfully created plugin: BandedTransport" in output


@pytest.mark.parametrize(("command", "plugin"), [("parse", False), ("parse_without_functions", True)])
def test_a_local_function_takes_precedence_unless_it_is_removed(
    library: Path, tmp_path: Path, command: str, plugin: bool
) -> None:
    """Which is what network.py does for TensorRT before 10.15, whose parser has no flag for it."""
    body = [helper.make_node("Identity", ["x"], ["y"])]
    function = helper.make_function(
        "sws",
        "BandedTransport",
        ["P", "x"],
        ["y"],
        body,
        [helper.make_opsetid("", 20)],
        ["radius", "tensors"],
    )
    onnx.save(transport_model("sws", function), tmp_path / "transport.onnx")

    output = session(library, command, str(tmp_path / "transport.onnx"))

    assert ("Successfully created plugin: BandedTransport" in output) == plugin
    assert ("parsed True" in output) != plugin  # this parser ends the process once it has created a plugin
