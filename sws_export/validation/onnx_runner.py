"""An exported graph in ONNX Runtime."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graph_passes.upcast_bfloat16 import UpcastBfloat16
from sws_export.errors import ExportError
from sws_export.progress import Stage
from sws_export.validation.partition import partition_graph
from sws_export.validation.trajectory import Array

STATE_PREFIX = "sws_state_"
_ERRORS_ONLY = 3


class OnnxRunner:
    """An exported graph in ONNX Runtime on the CPU, its state fed back from step to step.

    A small graph is run as it is. Of a large one, a piece at a time is loaded, run for all steps and
    dropped, so that a small share of the weights is in memory. ONNX Runtime cannot compute in bfloat16: of
    such a graph its float32 twin is run.
    """

    def __init__(self, path: Path) -> None:
        """Read the graph and have ONNX Runtime load it.

        Raises:
            ExportError: ONNX Runtime is not installed or refuses the graph.
        """
        self._runtime = _import_onnxruntime()
        self._path = path
        model = ir.load(path)
        widened = UpcastBfloat16()(model).modified
        self._inputs = list(model.graph.inputs)
        self._outputs = [str(value.name) for value in model.graph.outputs]
        self._pieces = partition_graph(model)
        # Of a graph in pieces, too: the file as a whole has to be one that ONNX Runtime takes.
        whole = None if widened else self._session(path)
        self._whole = whole if len(self._pieces) == 1 else None
        self._states: dict[str, Array] | None = None

    def run(self, steps: Sequence[Mapping[str, Array]], stage: Stage) -> list[dict[str, Array]]:
        """Run `steps` one after the other, the first from the state of the last run, or a zero state.

        Args:
            steps: Inputs by name, without states. They are converted to the graph's dtypes; those that it
                does not take are left out.
            stage: Is advanced by one for each step.

        Returns:
            The outputs of each step by name.
        """
        known = [self._converted(inputs) for inputs in steps]
        first = self._states or self._zero_states(steps[0])
        for place, piece in enumerate(self._pieces):
            session = self._whole or self._session(ir.to_proto(piece).SerializeToString())
            states = first
            for values in known:
                values |= states
                self._run_piece(session, values)
                # Made by the first piece, whichever takes them.
                states = {name: values[f"{name}_out"] for name in states}
                stage.advance(1 / len(self._pieces))
            # Among what is of no use any more are transposed weights, once for each step.
            later = self._taken_from(place + 1)
            known = [{name: values[name] for name in values if name in later} for values in known]
        self._states = states
        return [{name: values[name] for name in self._outputs} for values in known]

    def _taken_from(self, place: int) -> set[str | None]:
        """Names of what the pieces from `place` on take, and of the outputs."""
        inputs = (value.name for piece in self._pieces[place:] for value in piece.graph.inputs)
        return {*inputs, *self._outputs}

    def _run_piece(self, session: Any, values: dict[str, Array]) -> None:
        """Add what a piece computes of `values` to them."""
        made = [output.name for output in session.get_outputs()]
        taken = {node.name: values[node.name] for node in session.get_inputs()}
        values |= zip(made, session.run(made, taken), strict=True)

    def _session(self, model: Path | bytes) -> Any:
        options = self._runtime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if len(self._pieces) > 1:
            # What makes a session fast over many runs takes copies of its weights.
            options.graph_optimization_level = self._runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        folder = str(self._path.parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        try:
            return self._runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise ExportError(f"ONNX Runtime refuses {self._path}: {error}") from error

    def _converted(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {
            name: np.asarray(inputs[name], value.dtype.numpy())
            for value in self._inputs
            if (name := str(value.name)) in inputs and value.dtype is not None
        }

    def _zero_states(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        batch, _, height, width = inputs["sample"].shape
        tokens = inputs["encoder_hidden_states"].shape[1]
        sides = {"batch": batch, "height": height, "width": width, "tokens": tokens}
        return {
            str(value.name): np.zeros([_size(dim, sides) for dim in value.shape or ()], np.float32)
            for value in self._inputs
            if str(value.name).startswith(STATE_PREFIX)
        }


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ExportError(
            "validation needs ONNX Runtime; install it with: pip install 'sws-export[cpu]', "
            "or skip it with --no-validate"
        ) from error
    return onnxruntime


def _size(dimension: int | ir.SymbolicDim, sides: Mapping[str, int]) -> int:
    if isinstance(dimension, int):
        return dimension
    name, _, divisor = str(dimension.value).partition("/")
    return sides[name] // int(divisor or 1)
