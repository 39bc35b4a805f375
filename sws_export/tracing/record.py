"""Runs a module on the meta device and records the torch functions that it calls."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from sws_export.errors import ExportError
from sws_export.tensors import TensorSpec, concrete_shape
from sws_export.tracing import tensor_operators  # noqa: F401  (registers its operators)
from sws_export.tracing.graph import GraphBuilder, graph_text, to_model
from sws_export.tracing.layer_operators import OUTPUT_OF
from sws_export.tracing.registry import OPERATORS
from sws_export.tracing.sizes import PRIMES, TraceSizes

_CONSTANT_FACTORIES = frozenset({torch.arange})

Call = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


def trace(
    module: torch.nn.Module, call: Call, inputs: Sequence[TensorSpec], multiple: int, opset: int
) -> ir.Model:
    """The ONNX model of `call`, which runs `module`.

    The module runs twice at different sizes, and both runs must record the same graph. This detects constants
    that were computed from sizes and branches that depend on sizes.

    Args:
        module: On the meta device; its parameters become initializers without data, named as in its
            state dict.
        call: Takes the inputs by name, returns one tensor.
        inputs: The graph's inputs.
        multiple: Divisor of height and width.
        opset: Version of the standard operators, 23 or later for `Attention`.

    Raises:
        ExportError: The module calls an unsupported torch function, or depends on sizes in a way that a graph
            with dynamic shapes cannot express.
    """
    first, second = (_record(module, call, inputs, TraceSizes(primes, multiple), opset) for primes in PRIMES)
    for one, other in itertools.zip_longest(graph_text(first), graph_text(second)):
        if one != other:
            raise ExportError(
                "the UNet depends on sizes in a way that a graph with dynamic shapes cannot express: "
                f"{one} became {other} at another size"
            )
    return to_model(first)


def _record(
    module: torch.nn.Module, call: Call, inputs: Sequence[TensorSpec], sizes: TraceSizes, opset: int
) -> ir.Graph:
    builder = GraphBuilder(sizes)
    recorder = Recorder(builder, module)
    feeds = {}
    for spec in inputs:
        dtype = getattr(torch, spec.dtype)
        feeds[spec.name] = torch.empty(concrete_shape(spec, sizes.concrete()), dtype=dtype, device="meta")
        recorder.bind(feeds[spec.name], builder.add_input(spec.name, feeds[spec.name]))
    with torch.no_grad(), _scopes(module, builder), recorder:
        output = call(feeds)
    return builder.finish(recorder.value(output), opset)


@contextlib.contextmanager
def _scopes(module: torch.nn.Module, builder: GraphBuilder) -> Iterator[None]:
    """Set `builder.scope` to the path of the module that runs."""
    names = {child: name for name, child in module.named_modules()}
    stack = [""]

    def enter(child: torch.nn.Module, _: Any) -> None:
        stack.append(names.get(child, stack[-1]))
        builder.scope = stack[-1]

    def leave(*_: Any) -> None:
        stack.pop()
        builder.scope = stack[-1]

    entering, leaving = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield
    finally:
        entering.remove()
        leaving.remove()


class Recorder(TorchFunctionMode):
    """Records every torch function call; each tensor on the meta device corresponds to a value of the graph.

    Tensors on the CPU are constants; calls with constants only are executed and not recorded.
    """

    def __init__(self, builder: GraphBuilder, module: torch.nn.Module) -> None:
        super().__init__()
        self.builder = builder
        self._weights = {id(tensor): name for name, tensor in module.state_dict(keep_vars=True).items()}
        self._values: dict[int, ir.Value] = {}
        # Keeps the tensors alive, so that their ids stay unique.
        self._bound: list[torch.Tensor] = []

    def bind(self, tensor: torch.Tensor, value: ir.Value) -> None:
        """Make `value` the graph value of `tensor`."""
        self._values[id(tensor)] = value
        self._bound.append(tensor)

    def value(self, tensor: torch.Tensor) -> ir.Value:
        """The graph value of `tensor`."""
        if id(tensor) in self._values:
            return self._values[id(tensor)]
        if id(tensor) in self._weights:
            return self.builder.weight(self._weights[id(tensor)], tensor)
        if tensor.device.type == "meta":
            raise ExportError(
                f"{self.builder.scope}: a tensor of shape {list(tensor.shape)} was not recorded"
            )
        return self.builder.constant(tensor)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func in _CONSTANT_FACTORIES:
            return func(*args, **given | {"device": "cpu"})
        tensors = [tensor for tensor in _flat([*args, *given.values()]) if isinstance(tensor, torch.Tensor)]
        if all(tensor.device.type != "meta" for tensor in tensors):
            return func(*args, **given)
        result = self._run(func, args, given)
        outputs = [tensor for tensor in _flat([result]) if isinstance(tensor, torch.Tensor)]
        if not outputs:
            return result
        operator = OPERATORS.get(func)
        if operator is None:
            raise ExportError(
                f"{self.builder.scope}: the torch function {_name(func)} is not supported; "
                "export a UNet of the Stable Diffusion family"
            )
        values = operator(self, outputs, *args, **given)
        for tensor, value in zip(outputs, values, strict=True):
            self.bind(tensor, value)
        return result

    def _run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of `func` on the meta device, with constants moved there."""
        if func in OUTPUT_OF:
            return OUTPUT_OF[func](*args, **kwargs)
        return func(*_on_meta(args), **{name: _on_meta(value) for name, value in kwargs.items()})


def _flat(items: Any) -> Iterator[Any]:
    for item in items:
        if isinstance(item, list | tuple) and not isinstance(item, torch.Size):
            yield from _flat(item)
        else:
            yield item


def _on_meta(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        # Scalars keep their rules of type promotion on any device.
        return item if item.device.type == "meta" else item.to("meta")
    if isinstance(item, list | tuple) and not isinstance(item, torch.Size):
        return type(item)(_on_meta(part) for part in item)
    return item


def _name(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__qualname__", func))
