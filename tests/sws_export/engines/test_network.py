"""The calls to TensorRT's API, made on TensorRT for RTX, whose API is the same.

Options that only `tensorrt` takes are set on a real configuration here; a build with them needs a GPU.
"""

import errno
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import onnx
import onnx_ir as ir
import pytest
import tensorrt_rtx as trt

from graph_passes.name_attention import NameAttention
from sws_export.engines import network
from sws_export.engines.backend import BuildOptions
from sws_export.engines.choice import get_backend
from sws_export.errors import EngineError, OptionError
from tests.graph_passes.test_name_attention import attention

RTX = get_backend("tensorrt-rtx")
TENSORRT = get_backend("tensorrt")
PLAIN = BuildOptions(RTX)


class Quiet(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)

    def log(self, severity, message):
        pass


# The first logger of a process is the logger of the process.
LOGGER = Quiet()


# TensorRT for RTX has the calls and warns that they do nothing.
no_op_timing_cache = pytest.mark.filterwarnings("ignore:.*Timing cache operations:DeprecationWarning")


@pytest.fixture
def builder():
    return trt.Builder(LOGGER)


@pytest.fixture
def parse(builder, tmp_path):
    def parse(model, options=PLAIN):
        onnx.save(model, tmp_path / "m.onnx")
        return network.parse(trt, builder, LOGGER, tmp_path / "m.onnx", options)

    return parse


def configure(builder, shapes, options):
    return network.configure(trt, builder, LOGGER, options, [shapes], None)


def test_tf32_is_off(builder, shapes):
    assert not configure(builder, shapes, BuildOptions(RTX)).get_flag(trt.BuilderFlag.TF32)


def test_the_targets_are_set_in_order(builder, shapes):
    config = configure(builder, shapes, BuildOptions(RTX, compute_capabilities=("12.0", "8.9")))
    targets = [config.get_compute_capability(index) for index in range(config.num_compute_capabilities)]
    assert targets == [trt.ComputeCapability.SM120, trt.ComputeCapability.SM89]


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ("refit", "REFIT"),
        ("strip_weights", "STRIP_PLAN"),
        ("version_compatible", "VERSION_COMPATIBLE"),
        ("weight_streaming", "WEIGHT_STREAMING"),
    ],
)
def test_an_option_sets_its_flag_and_no_other(builder, shapes, option, flag):
    plain = configure(builder, shapes, BuildOptions(TENSORRT)).flags
    config = configure(builder, shapes, BuildOptions(TENSORRT, **{option: True}))
    assert config.flags == plain | 1 << int(trt.BuilderFlag.__members__[flag])


def test_the_optimization_level_is_set(builder, shapes):
    config = configure(builder, shapes, BuildOptions(RTX, optimization_level=4))
    assert config.builder_optimization_level == 4


def test_hardware_compatibility_is_from_ampere_on(shapes):
    # A stand-in: the configuration of TensorRT for RTX ignores this attribute.
    builder = MagicMock()
    builder.create_builder_config().add_optimization_profile.return_value = 0
    config = configure(builder, shapes, BuildOptions(TENSORRT, hardware_compatible=True))
    assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS


def test_plugins_become_part_of_the_plan(builder, shapes):
    config = configure(builder, shapes, BuildOptions(TENSORRT, plugins=(Path("/opt/libsws_plugins.so"),)))
    assert config.plugins_to_serialize == ["/opt/libsws_plugins.so"]


@no_op_timing_cache
def test_a_timing_cache_is_made_saved_and_loaded(builder, shapes, tmp_path):
    path = tmp_path / "timing.cache"
    for _ in range(2):
        config = configure(builder, shapes, BuildOptions(TENSORRT, timing_cache=path))
        network.load_timing_cache(config, path)
        network.save_timing_cache(config, path)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        assert path.stat().st_size > 0


@no_op_timing_cache
def test_a_timing_cache_that_cannot_be_written_is_named(builder, shapes, tmp_path):
    path = tmp_path / "missing" / "timing.cache"
    config = configure(builder, shapes, BuildOptions(TENSORRT, timing_cache=path))
    network.load_timing_cache(config, path)
    with pytest.raises(EngineError, match=r"cannot write the timing cache .*No such file"):
        network.save_timing_cache(config, path)


@pytest.mark.parametrize(
    ("dtype", "head_size", "marked"),
    [
        ("float16", 64, 0),
        ("bfloat16", 40, 0),
        ("float16", 9, 0),
        ("float16", 256, 0),
        ("float16", 8, 1),
        ("float16", 257, 1),
        ("float32", 64, 1),
    ],
)
def test_only_attention_without_a_kernel_is_decomposable(parse, small, dtype, head_size, marked):
    parsed = parse(small(dtype, head_size))
    assert network.allow_decomposition(trt, parsed, RTX.fused_head_sizes) == marked
    layers = [parsed.get_layer(index) for index in range(parsed.num_layers)]
    (attention,) = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    attention.__class__ = trt.IAttentionInputLayer
    assert attention.attention.decomposable == bool(marked)


def test_for_tensorrt_every_attention_is_decomposable(parse, small):
    assert network.allow_decomposition(trt, parse(small()), TENSORRT.fused_head_sizes) == 1


def test_the_parser_takes_its_own_attention_before_the_function():
    """Two layers instead of eight, and the same attention: a softmax without a mask."""
    found = {}
    for named in (False, True):
        model = attention({"scale": 1.0})
        assert not named or NameAttention()(model).modified
        parsed = trt.Builder(LOGGER).create_network(0)
        assert trt.OnnxParser(parsed, LOGGER).parse(ir.to_proto(model).SerializeToString())
        layers = [parsed.get_layer(index) for index in range(parsed.num_layers)]
        (layer,) = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
        layer.__class__ = trt.IAttentionInputLayer
        kind = layer.attention
        found[named] = (
            kind.norm_op,
            kind.causal,
            kind.decomposable,
            kind.mask,
            tuple(parsed.get_output(0).shape),
        )
        assert len(layers) == (2 if named else 8)
    assert found[True] == found[False]


def test_the_network_is_strongly_typed(parse, small):
    assert parse(small()).get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_a_library_without_weakly_typed_networks_is_not_asked_for_a_strong_one(tmp_path):
    library, builder = MagicMock(), MagicMock()
    library.NetworkDefinitionCreationFlag = library.OnnxParserFlag = SimpleNamespace(__members__={})
    network.parse(library, builder, LOGGER, tmp_path / "m.onnx", PLAIN)
    builder.create_network.assert_called_once_with(0)


def test_the_first_parser_error_is_quoted_with_its_node(parse, small):
    model = small()
    model.graph.node[4].input[0] = "x"
    with pytest.raises(
        EngineError, match=r"cannot parse .*same number of dimensions.* at node 'site' \(Attention\)"
    ):
        parse(model)


def test_a_model_local_function_stands_in_for_a_missing_plugin(parse, small):
    parsed = parse(small(), BuildOptions(TENSORRT, plugins=(Path("/opt/libsws_plugins.so"),)))
    assert parsed.num_inputs == 3


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sample": None}, r"no shapes for input sample \[-1, 4, -1, -1\]"),
        ({"sigma": ((1,), (1,), (1,))}, r"names sigma; the graph has the inputs sample, sws_state_d1"),
        ({"sample": ((1, 5, 8, 8),) * 3}, r"input sample the shape \[1, 5, 8, 8\], the graph has \[-1, 4,"),
        ({"sample": ((1, 4, 8),) * 3}, r"input sample the shape \[1, 4, 8\]"),
        ({"sample": ((2, 4, 8, 8), (1, 4, 8, 8), (2, 4, 8, 8))}, "input sample must ascend"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(parse, small, shapes, change, text):
    changed = {name: three for name, three in (dict(shapes) | change).items() if three}
    with pytest.raises(OptionError, match=text):
        network.check_inputs(parse(small()), changed)


def test_shapes_that_fit_are_taken(parse, small, shapes):
    network.check_inputs(parse(small()), shapes)


def test_an_error_of_the_disk_is_kept_and_ends_the_writing(builder, parse, small, shapes):
    chunks = []

    def full(data):
        chunks.append(len(data))
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = network.stream_writer(trt, full)
    # TensorRT returns True here: that nothing was written shows in the writer alone.
    builder.build_serialized_network_to_stream(
        parse(small()), configure(builder, shapes, BuildOptions(RTX)), writer
    )
    assert writer.error.errno == errno.ENOSPC
    assert len(chunks) == 1
