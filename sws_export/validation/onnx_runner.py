"""An exported graph in ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sws_export.errors import ExportError
from sws_export.validation.trajectory import Array

STATE_PREFIX = "sws_state_"


class OnnxRunner:
    """An exported graph in ONNX Runtime on the CPU, its state fed back from step to step."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise ExportError(
                "validation needs ONNX Runtime; install it with: pip install 'sws-export[cpu]', "
                "or skip it with --no-validate"
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._dtypes = {node.name: _numpy_dtype(node.type) for node in self._session.get_inputs()}
        self._state: dict[str, Array] | None = None

    def step(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One step; inputs that the graph does not take are left out."""
        feed = {
            name: np.asarray(values, self._dtypes[name])
            for name, values in inputs.items()
            if name in self._dtypes
        }
        feed |= self._state if self._state is not None else self._zero_state(inputs)
        outputs = dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))
        self._state = {
            name.removesuffix("_out"): value
            for name, value in outputs.items()
            if name.startswith(STATE_PREFIX)
        }
        return outputs

    def _zero_state(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        batch, _, height, width = inputs["sample"].shape
        tokens = inputs["encoder_hidden_states"].shape[1]
        sides = {"batch": batch, "height": height, "width": width, "tokens": tokens}
        return {
            node.name: np.zeros([_size(dim, sides) for dim in node.shape], np.float32)
            for node in self._session.get_inputs()
            if node.name.startswith(STATE_PREFIX)
        }


def _size(dimension: int | str, sides: Mapping[str, int]) -> int:
    if isinstance(dimension, int):
        return dimension
    name, _, divisor = dimension.partition("/")
    return sides[name] // int(divisor or 1)


def _numpy_dtype(onnx_type: str) -> type[np.generic]:
    types: dict[str, type[np.generic]] = {
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(int64)": np.int64,
    }
    return types[onnx_type]
