"""Recorded modules compared with torch in ONNX Runtime, dynamic sizes, and refusals."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from sws_export.errors import ExportError
from sws_export.tensors import TensorSpec
from sws_export.tracing.record import trace

SAMPLE = TensorSpec("sample", "float32", ("batch", 4, "height", "width"))
TEXT = TensorSpec("text", "float32", ("batch", "tokens", 6))
OPSET = 23


class Lambda(torch.nn.Module):
    """A module that computes a function of `sample`, and of weights where it has any."""

    def __init__(self, function: Callable[..., torch.Tensor], **weights: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            self.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs, **dict(self.named_parameters()))


def record(module: torch.nn.Module, *specs: TensorSpec) -> ir.Model:
    """The graph of `module` with its weights."""
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = trace(module.to("meta"), lambda inputs: module(*inputs.values()), specs, 2, OPSET)
    model.graph.outputs[0].name = "out"
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(weights[name])
    return model


def run(model: ir.Model, **feeds: torch.Tensor) -> torch.Tensor:
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    return torch.from_numpy(np.asarray(out))


def attention(sample: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = sample.shape
    tokens = sample.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    heads = tokens.view(batch, -1, 2, 2).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(heads, heads * 2, heads + 1)
    joined = mixed.transpose(1, 2).reshape(batch, -1, channels)
    return joined.reshape(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()


def frequencies(sample: torch.Tensor) -> torch.Tensor:
    steps = torch.exp(-2.0 * torch.arange(0, 4, dtype=torch.float32, device=sample.device))
    angles = sample[:, :, None].float() * steps[None, :, None, None]
    both = torch.cat([torch.sin(angles), torch.cos(angles)], dim=2)
    return torch.cat([both[:, :, 4:], both[:, :, :4]], dim=2).flatten(1, 2)


CASES = {
    "arithmetic": lambda x: (2 - x) * 3 / (x * x + 1.5) - 0.25 + x / 1.0,
    "half": lambda x: x.half() * 2.0 + 1,
    "promotion": lambda x: x.half() + x,
    "gelu": lambda x: F.gelu(F.silu(x)),
    "halves": lambda x: x.chunk(2, dim=1)[0] * F.gelu(x.chunk(2, dim=1)[1]),
    "upscaled": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "attention": attention,
    "frequencies": frequencies,
    "two dynamic sizes": lambda x: x.reshape(x.shape[0], 2, 2 * x.shape[2], x.shape[3]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(1, 4, 2, 4), (3, 4, 6, 2)])
def test_graph_computes_what_torch_does(case, shape):
    function = CASES[case]
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = function(sample)
    found = run(record(Lambda(function), SAMPLE), sample=sample)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    # ONNX Runtime rounds to float16 once where torch does twice.
    tolerance = 2e-3 if expected.dtype == torch.float16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.norm = torch.nn.GroupNorm(2, 8)
        self.project = torch.nn.Linear(8, 6)
        self.layer_norm = torch.nn.LayerNorm(6)
        self.pooled = torch.nn.Linear(6, 5)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        grid = self.norm(self.conv(sample))
        tokens = self.layer_norm(self.project(grid.flatten(2).transpose(1, 2)))
        return self.pooled(tokens.reshape(-1, 6))


def test_layers_with_weights():
    torch.manual_seed(0)
    layers, sample = Layers(), torch.randn(2, 4, 6, 4)
    with torch.no_grad():
        expected = layers(sample)
    model = record(layers, SAMPLE)
    torch.testing.assert_close(run(model, sample=sample), expected, rtol=1e-5, atol=1e-5)
    weights = {name for name, value in model.graph.initializers.items() if not name.startswith("constant")}
    assert weights == {name for name, _ in layers.named_parameters()}


def test_nodes_are_named_after_modules_and_shapes_are_symbolic():
    model = record(Layers(), SAMPLE)
    nodes = {node.name: node for node in model.graph}
    assert {"conv/Conv", "norm/GroupNormalization", "project/MatMul", "pooled/Gemm"} <= nodes.keys()
    assert list(nodes["conv/Conv"].outputs[0].shape) == ["batch", 8, "height/2", "width/2"]
    assert list(nodes["project/MatMul"].outputs[0].shape) == ["batch", "height*width/4", 6]


def test_equal_nodes_are_appended_once():
    model = record(Lambda(lambda x: F.silu(x) + F.silu(x)), SAMPLE)
    assert [node.op_type for node in model.graph] == ["Sigmoid", "Mul", "Add"]


def test_the_same_module_gives_the_same_bytes():
    first, second = (ir.to_proto(record(Lambda(attention), SAMPLE)) for _ in range(2))
    assert first.SerializeToString() == second.SerializeToString()


def test_weights_alone_may_be_used_like_inputs():
    module = Lambda(lambda text, table: text + table.unsqueeze(0), table=torch.arange(6.0))
    text = torch.randn(2, 3, 6)
    expected = text + torch.arange(6.0)
    torch.testing.assert_close(run(record(module, TEXT), text=text), expected)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(lambda x: torch.cumsum(x, 0), "cumsum", id="unknown function"),
        pytest.param(lambda x: x.clone().add_(1), "add_", id="in place"),
        pytest.param(lambda x: F.silu(x, inplace=True), "does not overwrite", id="in-place activation"),
        pytest.param(lambda x: x * x.shape[0], "depends on sizes", id="size as a number"),
        pytest.param(lambda x: x * 2 if x.shape[3] > 210 else x, "depends on sizes", id="branch on a size"),
        pytest.param(lambda x: x[:, :, : x.shape[2] // 2], "depends on sizes", id="slice by a size"),
        pytest.param(lambda x: x[0], "an index with new axes or one slice", id="index"),
        pytest.param(
            lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), "nearest-neighbour", id="bilinear"
        ),
        pytest.param(lambda x: x + torch.ones(4, 1, 1).to(x.device), "was not recorded", id="moved constant"),
    ],
)
def test_what_dynamic_shapes_cannot_express_is_refused(function, message):
    with pytest.raises(ExportError, match=message):
        record(Lambda(function), SAMPLE)
