"""Run an exported graph in ONNX Runtime."""

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graph_passes.insert_sws import CALLS
from graph_passes.upcast_bfloat16 import UpcastBfloat16
from sws_export.errors import ExportError
from sws_export.onnx_files import load_onnx, relocate_external_data
from sws_export.progress import Stage
from sws_export.validation.partition import SUBGRAPH_BYTES, partition_graph
from sws_export.validation.trajectory import Array

_STATE_PREFIX = "sws_state_"
# Errors are raised as well; ONNX Runtime would print them raw, with names from the graph.
_LOG_FATAL = 4


class OnnxRunner:
    """An exported graph in ONNX Runtime on the CPU, with the state fed back from step to step.

    A graph with few weights runs in one session. A larger one is partitioned; each subgraph is loaded, run
    for all steps and released, so that only a small part of the weights is in memory at a time. ONNX Runtime
    does not support bfloat16 on the CPU: a float32 copy of a bfloat16 graph is run instead.

    Attributes:
        observe: Called with the name and the value of each observed value at each step.
    """

    def __init__(
        self,
        graph: Path | ir.Model,
        subgraph_bytes: int = SUBGRAPH_BYTES,
        observed: Set[str] = frozenset(),
    ) -> None:
        """Read the graph and load it in ONNX Runtime.

        Args:
            graph: The ONNX file, or a graph in memory, which is changed.
            subgraph_bytes: Approximate size of the weights in each subgraph.
            observed: Inputs and outputs that `observe` is called with; `run` does not return them.

        Raises:
            CheckpointError: The file is not an ONNX model.
            ExportError: ONNX Runtime is not installed or cannot load the graph.
        """
        self._runtime = _import_onnxruntime()
        file = graph if isinstance(graph, Path) else None
        self._name = str(file or "the unquantized graph")
        model = load_onnx(graph) if isinstance(graph, Path) else graph
        upcast = UpcastBfloat16()(model).modified
        self._inputs = list(model.graph.inputs)
        self._observed = observed
        self.observe: Callable[[str, Array], None] | None = None
        self._outputs = [str(value.name) for value in model.graph.outputs if value.name not in observed]
        data_directory = relocate_external_data(model)
        self._data_directory = data_directory or (file.parent if file else Path())
        self._subgraphs = partition_graph(model, subgraph_bytes)
        single = len(self._subgraphs) == 1
        # Also for a partitioned graph: ONNX Runtime must be able to load the whole file.
        whole = None
        if not upcast and (single or file is not None):
            beside = file is not None and data_directory in (None, file.parent.resolve())
            whole = self._session(file if file is not None and beside else _serialized(model))
        self._whole = whole if single else None
        self._states: dict[str, Array] | None = None

    def reset(self) -> None:
        """Start the next run from a zero state."""
        self._states = None

    @property
    def subgraph_count(self) -> int:
        """Number of subgraphs that the graph is partitioned into."""
        return len(self._subgraphs)

    def run(self, steps: Sequence[Mapping[str, Array]], stage: Stage) -> list[dict[str, Array]]:
        """Run `steps` in order, starting from the last state of the previous call, or from a zero state.

        Args:
            steps: Inputs by name, without states. They are cast to the dtypes of the graph; inputs that the
                graph does not have are ignored.
            stage: Advanced by one for each step.

        Returns:
            The outputs of each step by name.
        """
        values_of_steps = [self._cast(inputs) for inputs in steps]
        for values in values_of_steps:
            self._show(values)
        initial_states = self._states or self._zero_states(steps[0])
        for index, subgraph in enumerate(self._subgraphs):
            session = self._whole or self._session(_serialized(subgraph))
            states = initial_states
            for values in values_of_steps:
                values |= states
                self._run_subgraph(session, values)
                # The first subgraph computes all state outputs.
                states = {name: values[f"{name}_out"] for name in states}
                stage.advance(1 / len(self._subgraphs))
            # Drop values that are not used later: transposed weights are among them, one copy for each step.
            used_later = self._used_from(index + 1)
            values_of_steps = [
                {name: values[name] for name in values if name in used_later} for values in values_of_steps
            ]
        self._states = states
        return [{name: values[name] for name in self._outputs} for values in values_of_steps]

    def _used_from(self, index: int) -> set[str | None]:
        """Names of the graph outputs and of the inputs of the subgraphs from `index` on."""
        inputs = (value.name for subgraph in self._subgraphs[index:] for value in subgraph.graph.inputs)
        return {*inputs, *self._outputs}

    def _run_subgraph(self, session: Any, values: dict[str, Array]) -> None:
        """Run a subgraph on `values` and add its outputs to them."""
        outputs = [output.name for output in session.get_outputs()]
        inputs = {node.name: values[node.name] for node in session.get_inputs()}
        computed = dict(zip(outputs, session.run(outputs, inputs), strict=True))
        self._show(computed)
        values |= computed

    def _show(self, values: Mapping[str, Array]) -> None:
        """Call `observe` with the observed ones of `values`."""
        if self.observe is not None:
            for name in self._observed & values.keys():
                self.observe(name, values[name])

    def _session(self, model: Path | bytes) -> Any:
        options = self._runtime.SessionOptions()
        options.log_severity_level = _LOG_FATAL
        if len(self._subgraphs) > 1:
            # These optimizations make repeated runs faster, but copy weights.
            options.graph_optimization_level = self._runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._data_directory)
        )
        try:
            return self._runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the exceptions of ONNX Runtime have no common base class
            raise ExportError(f"ONNX Runtime cannot load {self._name}: {error}") from error

    def _cast(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {
            name: np.asarray(inputs[name], value.dtype.numpy())
            for value in self._inputs
            if (name := str(value.name)) in inputs and value.dtype is not None
        }

    def _zero_states(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        states = [value for value in self._inputs if is_state(str(value.name))]
        if not states:
            return {}
        batch, _, height, width = inputs["sample"].shape
        tokens = inputs["encoder_hidden_states"].shape[1]
        sizes = {"batch": batch, "height": height, "width": width, "tokens": tokens}
        return {
            str(value.name): np.zeros([_dimension(dim, sizes) for dim in value.shape or ()], np.float32)
            for value in states
        }


def is_state(name: str) -> bool:
    """Whether an input or output of a graph is a state."""
    return name.startswith(_STATE_PREFIX) or name in (CALLS.input, CALLS.output)


def _serialized(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString())


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ExportError(
            "validation needs ONNX Runtime; install it with: pip install 'sws-export[cpu]', "
            "or skip validation with --no-validate"
        ) from error
    return onnxruntime


def _dimension(dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    name, _, divisor = str(dim.value).partition("/")
    return sizes[name] // int(divisor or 1)
