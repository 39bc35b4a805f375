"""Every call to TensorRT's Python API, made on the recorded API of TensorRT 10.14, 10.16 and 11.4."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import onnx
import pytest

from sws_export.engines import child, monitor, network
from sws_export.engines.backend import BuildOptions
from sws_export.engines.choice import get_backend
from sws_export.errors import EngineError
from sws_export.runtime.tensorrt_backend import TensorRtBackend
from tests.sws_export.engines.recorded_tensorrt import VERSIONS, RecordedLibrary
from tests.sws_export.engines.tensorrt_api import record

TENSORRT = get_backend("tensorrt")
PLUGIN = Path("/opt/libsws_plugins.so")
PLAN = b"ftrt" + bytes(40)
INPUTS, OUTPUTS = {"x": ["n", 4], "state": [1, 8]}, {"y": ["n", 4], "state_out": [1, 8]}


@pytest.fixture(params=VERSIONS)
def library(request, monkeypatch):
    """The module `tensorrt` of one release, with a builder that writes a plan."""
    trt = RecordedLibrary(request.param)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)

    def build(builder, network, config, writer):
        return writer.write(PLAN) == len(PLAN)

    # The creator classes are not recorded: of a creator only its name is used.
    creators = [SimpleNamespace(name="KeyGuard"), SimpleNamespace(name="BandedTransport")]
    trt.answers |= {
        ("Builder", "build_serialized_network_to_stream"): build,
        ("IPluginRegistry", "all_creators"): lambda _: creators,
        ("INetworkDefinition", "num_inputs"): lambda _: 1,
        ("INetworkDefinition", "num_layers"): lambda _: 1,
        ("ITensor", "name"): lambda _: "x",
        ("ITensor", "shape"): lambda _: (-1, 4),
        ("ILayer", "type"): lambda _: trt.LayerType.ATTENTION_INPUT,
        ("ITimingCache", "serialize"): lambda _: b"timings",
    }
    return trt


@pytest.fixture
def graph(tmp_path):
    """A graph with a call of sws::KeyGuard, its definition, and another local function."""
    helper = onnx.helper
    domains = [helper.make_opsetid("", 23), helper.make_opsetid("sws", 1)]
    functions = [
        helper.make_function(
            "sws", name, ["a"], ["b"], [helper.make_node("Identity", ["a"], ["b"])], domains[:1]
        )
        for name in ("KeyGuard", "Schedule")
    ]
    nodes = [
        helper.make_node("KeyGuard", ["x"], ["y"], domain="sws"),
        helper.make_node("Schedule", ["y"], ["z"], domain="sws"),
    ]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xz"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:]),
        opset_imports=domains,
        functions=functions,
        ir_version=10,
    )
    onnx.save(model, tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def specification(graph, **options):
    build = BuildOptions(TENSORRT, **options)
    return {
        "onnx": str(graph),
        "out": str(graph.with_name("g.plan")),
        "profiles": [{"x": [[1, 4], [2, 4], [4, 4]]}, {"x": [[8, 4], [8, 4], [8, 4]]}],
        "options": build.to_json(),
    }


def called(library, name):
    return [arguments for called, arguments in library.calls if called == name]


def test_a_build_makes_only_calls_that_the_release_has(library, graph, tmp_path):
    events = MagicMock()
    child._build(
        specification(
            graph,
            optimization_level=4,
            timing_cache=tmp_path / "timing.cache",
            refit=True,
            strip_weights=True,
            version_compatible=True,
            hardware_compatible=True,
            weight_streaming=True,
            plugins=(PLUGIN,),
        ),
        events,
    )
    assert graph.with_name("g.plan").read_bytes() == PLAN
    assert (tmp_path / "timing.cache").read_bytes() == b"timings"
    built = events.send.call_args
    assert built.args == ("built",)
    assert built.kwargs["decomposed_attentions"] == 1
    flags = {arguments["flag"] for arguments in called(library, "IBuilderConfig.set_flag")}
    assert flags == {
        library.BuilderFlag.__members__[name]
        for name in ("REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE", "WEIGHT_STREAMING")
    }
    assert len(called(library, "IBuilderConfig.add_optimization_profile")) == 2
    assert called(library, "IPluginRegistry.load_library") == [{"plugin_path": str(PLUGIN)}]
    assert called(library, "Builder.create_network") == [
        {"flags": 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)}
    ]


def test_plugins_take_precedence_over_functions_in_every_release(library, graph):
    child._build(specification(graph, plugins=(PLUGIN,)), MagicMock())
    flags = called(library, "OnnxParser.set_flag")
    if "ENABLE_PLUGIN_OVERRIDE" in library.OnnxParserFlag.__members__:
        assert flags == [{"flag": library.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE}]
        assert called(library, "OnnxParser.parse_from_file") == [{"model": str(graph)}]
        assert called(library, "OnnxParser.parse") == []
        return
    assert library.__version__.startswith("10.14")
    assert flags == []
    (parsed,) = called(library, "OnnxParser.parse")
    assert parsed["path"] == str(graph)
    model = onnx.load_from_string(parsed["model"])
    assert [function.name for function in model.functions] == ["Schedule"]
    assert [node.op_type for node in model.graph.node] == ["KeyGuard", "Schedule"]


def test_without_plugins_no_parser_flag_is_set(library, graph):
    child._build(specification(graph), MagicMock())
    assert called(library, "OnnxParser.set_flag") == []
    assert len(called(library, "OnnxParser.parse_from_file")) == 1


def test_a_parser_error_is_read_by_calls_that_the_release_has(library, graph):
    library.answers |= {
        ("OnnxParser", "parse_from_file"): lambda *_, **__: False,
        ("OnnxParser", "num_errors"): lambda _: 1,
        ("OnnxParser", "get_error"): lambda *_, **__: library.ParserError.__new__(library.ParserError),
        ("ParserError", "desc"): lambda _: "unsupported",
        ("ParserError", "node_operator"): lambda _: "Conv",
        ("ParserError", "node_name"): lambda _: "c1",
    }
    with pytest.raises(EngineError, match=r"unsupported at node 'c1' \(Conv\)"):
        child._build(specification(graph), MagicMock())


@pytest.mark.parametrize(
    ("member", "what"),
    [
        (("Builder", "create_network"), "network"),
        (("Builder", "create_builder_config"), "builder configuration"),
        (("Builder", "create_optimization_profile"), "optimization profile"),
    ],
)
def test_a_null_object_is_an_engine_error(library, graph, member, what):
    library.answers[member] = lambda *_, **__: None
    with pytest.raises(EngineError, match=rf"tensorrt .* cannot create a {what}: no reason given; .*driver"):
        child._build(specification(graph), MagicMock())


def fail_with_reason(library):
    """A constructor whose factory function in C++ logs a reason and returns null."""

    def fail(self, *arguments, **keywords):
        arguments[-1].log(library.ILogger.Severity.ERROR, "CUDA driver version is insufficient")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    return fail


@pytest.mark.parametrize(("name", "what"), [("Builder", "builder"), ("OnnxParser", "parser")])
def test_a_null_constructor_is_an_engine_error_with_the_logged_reason(
    library, graph, name, what, monkeypatch
):
    monkeypatch.setattr(getattr(library, name), "__init__", fail_with_reason(library))
    with pytest.raises(EngineError, match=rf"cannot create a {what}: CUDA driver version is insufficient"):
        child._build(specification(graph), MagicMock())


def test_callbacks_override_methods_that_the_release_calls(library):
    events = MagicMock()
    for made, base in (
        (monitor.make_logger(library, events), library.ILogger),
        (monitor.make_monitor(library, events), library.IProgressMonitor),
        (network.stream_writer(library, len), library.IStreamWriter),
    ):
        overridden = [name for name in vars(type(made)) if not name.startswith("_")]
        assert overridden
        assert all(name in vars(base) for name in overridden)
    logger = monitor.make_logger(library, events)
    logger.log(library.ILogger.Severity.INFO, "not forwarded")
    logger.log(library.ILogger.Severity.WARNING, "w")
    logger.log(library.ILogger.Severity.INTERNAL_ERROR, "e")
    assert [call.kwargs["severity"] for call in events.send.call_args_list] == ["warning", "error"]


@pytest.fixture
def contract(tmp_path):
    """As much of an engine's contract as the runtime reads, beside a plan with a plausible header."""
    plan = tmp_path / "g.plan"
    plan.write_bytes(b"ftrt" + bytes(20) + struct.pack("<4B", 10, 16, 1, 11) + bytes(16))
    state = SimpleNamespace(spec=SimpleNamespace(name="state"), output="state_out")
    profiles = tuple({"x": ((size, 4),) * 3, "state": ((1, 8),) * 3} for size in (1, 2))
    inputs, outputs = (
        [{"name": name, "dtype": "float32", "shape": shape} for name, shape in tensors.items()]
        for tensors in (INPUTS, OUTPUTS)
    )
    manifest = {"target": "tensorrt", "inputs": inputs, "outputs": outputs}
    return SimpleNamespace(path=plan, manifest=manifest, states=[state], profiles=profiles)


@pytest.fixture
def device():
    gpu = MagicMock(capability="9.0")
    gpu.name = "GPU"
    gpu.stream.return_value = 7
    gpu.allocate.return_value = SimpleNamespace(address=4096)
    return gpu


@pytest.fixture
def engine_tensors(library, contract):
    """Gives the recorded engine the tensors and profiles of `contract`."""
    entries = contract.manifest["inputs"] + contract.manifest["outputs"]
    shapes = {
        entry["name"]: tuple(-1 if size == "n" else size for size in entry["shape"]) for entry in entries
    }
    modes = library.TensorIOMode
    library.answers |= {
        ("ICudaEngine", "num_io_tensors"): lambda _: len(shapes),
        ("ICudaEngine", "get_tensor_name"): lambda _, index: list(shapes)[index],
        ("ICudaEngine", "get_tensor_mode"): lambda _, name: modes.INPUT if name in INPUTS else modes.OUTPUT,
        ("ICudaEngine", "get_tensor_dtype"): lambda *_, **__: library.DataType.FLOAT,
        ("ICudaEngine", "get_tensor_shape"): lambda _, name: shapes[name],
        ("ICudaEngine", "num_optimization_profiles"): lambda _: len(contract.profiles),
        ("ICudaEngine", "get_tensor_profile_shape"): lambda _, name, profile_index: list(
            contract.profiles[profile_index][name]
        ),
    }


@pytest.mark.usefixtures("engine_tensors")
def test_an_engine_is_run_by_calls_that_the_release_has(library, contract, device):
    array = MagicMock(shape=(2, 4), nbytes=32)
    loop = TensorRtBackend(contract, library, device, cuda_graphs=False).loop({"state": (1, 8)})
    loop.run({"x": array}, {"y": array})
    assert called(library, "Runtime.deserialize_cuda_engine") == [
        {"serialized_engine": contract.path.read_bytes()}
    ]
    assert called(library, "IExecutionContext.set_optimization_profile_async") == [
        {"profile_index": 1, "stream_handle": 7}
    ]
    assert {"name": "x", "shape": (2, 4)} in called(library, "IExecutionContext.set_input_shape")
    assert called(library, "IExecutionContext.execute_async_v3") == [{"stream_handle": 7}]


def test_a_null_runtime_is_an_engine_error_with_the_logged_reason(library, contract, device, monkeypatch):
    monkeypatch.setattr(library.Runtime, "__init__", fail_with_reason(library))
    with pytest.raises(EngineError, match=r"cannot create a runtime on GPU: CUDA driver version is insuf"):
        TensorRtBackend(contract, library, device, cuda_graphs=False)


def test_the_stand_in_refuses_what_the_release_lacks():
    trt = RecordedLibrary("10.14")
    config = trt.Builder(monitor.make_logger(trt, MagicMock())).create_builder_config()
    with pytest.raises(AttributeError, match="ENABLE_PLUGIN_OVERRIDE"):
        _ = trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE
    with pytest.raises(AttributeError, match="num_compute_capabilities"):
        config.num_compute_capabilities = 1
    with pytest.raises(TypeError, match="no overload takes"):
        config.set_flag(17)
    with pytest.raises(TypeError, match="expected int"):
        config.builder_optimization_level = "4"


@pytest.mark.slow
@pytest.mark.parametrize("version", record.VERSIONS)
def test_the_recordings_are_those_of_nvidia_s_bindings(version, tmp_path):
    try:
        found = record.describe(record.fetch(version, tmp_path))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the bindings cannot be fetched or imported: {error.stderr.strip()[-300:]}")
    release = ".".join(version.split(".")[:2])
    recorded = json.loads((Path(record.HERE) / f"{release}.json").read_text())
    assert found == recorded
