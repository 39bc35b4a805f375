"""The error of one layer with 8-bit weights and activations."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from graph_passes.find_layers import Layer
from graph_passes.insert_qdq import activation_scale
from graph_passes.quantize_weights import FORMATS, rounded_weight
from graph_passes.weight_formats import WeightFormat
from sws_export.validation.trajectory import Array

if TYPE_CHECKING:
    import torch


class LayerError:
    """Compares the outputs of a layer with and without rounding, in float32, with the scales of the graph."""

    def __init__(self, layer: Layer, activations: WeightFormat, largest: float, steps: int) -> None:
        """Compare the outputs of `steps` steps; `largest` is the range of the inputs."""
        self._layer = layer
        self._format = activations
        assert layer.weight.dtype is not None
        self._scale = float(activation_scale(largest, activations, layer.weight.dtype))
        self._remaining = steps
        self._weights: tuple[torch.Tensor, torch.Tensor] | None = None
        self._error = 0.0
        self._output = 0.0

    @property
    def relative(self) -> float:
        """Root mean square error, relative to the root mean square of the output."""
        return math.sqrt(self._error / self._output) if self._output else 0.0

    def add(self, inputs: Array) -> None:
        """Add the error of a step.

        The weights are read at the first step and held until the last one: all steps of a subgraph are run
        before the next one is, and the inputs of all steps would take much more memory.
        """
        import torch

        weight, rounded = self._weights = self._weights or self._read_weights()
        values = torch.from_numpy(inputs.astype(np.float32))
        exact = self._output_of(values, weight)
        error = self._output_of(self._round(values), rounded) - exact
        self._error += float(error.square().sum())
        self._output += float(exact.square().sum())
        self._remaining -= 1
        if not self._remaining:
            self._weights = None

    def _read_weights(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """The weight in float32, and its values after rounding."""
        import torch

        stored = self._layer.weight.const_value
        assert stored is not None
        exact = torch.from_numpy(stored.numpy().astype(np.float32))
        return exact, torch.from_numpy(rounded_weight(stored, self._layer.axis, self._format))

    def _round(self, values: "torch.Tensor") -> "torch.Tensor":
        import torch

        largest = FORMATS[self._format].largest
        steps = (values / self._scale).clamp(-largest, largest)
        rounded = steps.round() if self._format == "int8" else steps.to(torch.float8_e4m3fn).float()
        return rounded * self._scale

    def _output_of(self, values: "torch.Tensor", weight: "torch.Tensor") -> "torch.Tensor":
        """The layer without its bias, which has no part in the error."""
        import torch.nn.functional as F

        node = self._layer.node
        if node.op_type != "Conv":
            return values @ (weight.T if self._layer.axis == 0 else weight)
        given: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
        rank = weight.ndim - 2
        pads = list(given.get("pads", [0] * 2 * rank))
        # torch pads the last dimension first: [left, right, top, bottom].
        padding = [side for axis in reversed(range(rank)) for side in (pads[axis], pads[axis + rank])]
        return F.conv2d(
            F.pad(values, padding),
            weight,
            stride=tuple(given.get("strides", [1] * rank)),
            dilation=tuple(given.get("dilations", [1] * rank)),
            groups=given.get("group", 1),
        )
