"""Small ONNX graphs with short builds, and sizes for their profiles."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sws_export.options import SizeOptions
from sws_export.tensors import ProfileShapes, TensorSpec, shapes_for

FEATURES = 4
ONNX_TYPES = {
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "bfloat16": TensorProto.BFLOAT16,
}


def _weights(name: str, shape: tuple[int, ...], dtype: str) -> onnx.TensorProto:
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32) * 0.05
    return helper.make_tensor(name, ONNX_TYPES[dtype], shape, values.ravel().tolist())


def attention_model(dtype: str = "float16", head_size: int = 64) -> onnx.ModelProto:
    """A convolution, one attention site and two states, with dynamic shapes: a minimal UNet."""
    width = 2 * head_size
    nodes = [
        helper.make_node("Conv", ["sample", "conv_in"], ["x"], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["x", "to_tokens"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["tokens"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["tokens", "to_q"], ["q"]),
        helper.make_node(
            "Attention", ["q", "tokens", "tokens"], ["a"], name="site", q_num_heads=2, kv_num_heads=2
        ),
        helper.make_node("Transpose", ["a"], ["columns"], perm=[0, 2, 1]),
        helper.make_node("Shape", ["x"], ["grid"]),
        helper.make_node("Reshape", ["columns", "grid"], ["y"]),
        helper.make_node("Conv", ["y", "conv_out"], ["out_sample"]),
        helper.make_node("Add", ["sws_state_d1", "sws_state_d1"], ["sws_state_d1_out"]),
        helper.make_node("Add", ["sws_state_d2", "sws_state_d2"], ["sws_state_d2_out"]),
    ]
    weights = [
        _weights("conv_in", (width, FEATURES, 3, 3), dtype),
        _weights("to_q", (width, width), dtype),
        _weights("conv_out", (FEATURES, width, 1, 1), dtype),
        numpy_helper.from_array(np.array([0, width, -1], np.int64), "to_tokens"),
    ]
    states = {
        "sws_state_d1": ["batch", 145, "height", "width"],
        "sws_state_d2": ["batch", 145, "height/2", "width/2"],
    }
    latent = ["batch", FEATURES, "height", "width"]

    def values(suffix: str, sample: str) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(sample, ONNX_TYPES[dtype], latent)] + [
            helper.make_tensor_value_info(name + suffix, TensorProto.FLOAT, shape)
            for name, shape in states.items()
        ]

    graph = helper.make_graph(nodes, "small", values("", "sample"), values("_out", "out_sample"), weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def long_model(length: int) -> onnx.ModelProto:
    """A chain of convolutions with different kernels: 100 of them build for seconds."""
    nodes, weights, value, width = [], [], "sample", FEATURES
    for index in range(length):
        wider = 16 + 8 * (index % 13)
        weights.append(_weights(f"w{index}", (wider, width, 3, 3), "float16"))
        nodes.append(helper.make_node("Conv", [value, f"w{index}"], [f"c{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Softmax", [f"c{index}"], [f"x{index}"], axis=1))
        value, width = f"x{index}", wider
    sample = helper.make_tensor_value_info(
        "sample", TensorProto.FLOAT16, ["batch", FEATURES, "height", "width"]
    )
    out = helper.make_tensor_value_info(value, TensorProto.FLOAT16, ["batch", width, "height", "width"])
    graph = helper.make_graph(nodes, "long", [sample], [out], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


class Recorder:
    """A `Progress` that records its calls, and calls `on_describe` for each description."""

    def __init__(self, on_describe: Callable[[str], None] = lambda _: None) -> None:
        self.stages: list[str] = []
        self.described: list[str] = []
        self.warnings: list[str] = []
        self.logged: list[str] = []
        self._on_describe = on_describe

    @contextlib.contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator["Recorder"]:  # noqa: ARG002
        self.stages.append(name)
        yield self

    def advance(self, amount: float = 1.0) -> None: ...

    def log(self, message: str) -> None:
        self.logged.append(message)

    def describe(self, text: str) -> None:
        self.described.append(text)
        self._on_describe(text)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def small() -> Callable[..., onnx.ModelProto]:
    return attention_model


@pytest.fixture
def recorder() -> type[Recorder]:
    return Recorder


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """An ONNX file that builds in a tenth of a second."""
    path = tmp_path / "small.onnx"
    onnx.save(attention_model(), path)
    return path


@pytest.fixture(scope="session")
def long_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file that builds for seconds."""
    path = tmp_path_factory.mktemp("long") / "long.onnx"
    onnx.save(long_model(100), path)
    return path


@pytest.fixture
def shapes() -> ProfileShapes:
    options = SizeOptions(batch="1:2:4", height="64:128:256", width="64:128:256", tokens="77")
    (sizes,) = options.engine_profiles(None, 2, 8)
    inputs = [
        TensorSpec("sample", "float16", ("batch", FEATURES, "height", "width")),
        TensorSpec("sws_state_d1", "float32", ("batch", 145, "height", "width")),
        TensorSpec("sws_state_d2", "float32", ("batch", 145, "height/2", "width/2")),
    ]
    return shapes_for(inputs, sizes)


@pytest.fixture
def long_shapes(shapes: ProfileShapes) -> ProfileShapes:
    return {"sample": shapes["sample"]}
