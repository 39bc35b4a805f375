"""Plans in TensorRT or TensorRT for RTX, which share one Python API.

Not run on a GPU in this project's tests: those replace the library and the device by ones in host memory.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from sws_export.engines.choice import get_backend
from sws_export.engines.header import plan_header
from sws_export.errors import EngineError
from sws_export.runtime.backend import StateShapes
from sws_export.runtime.contract import Contract
from sws_export.runtime.cuda_device import CudaDevice, Memory
from sws_export.runtime.inputs import Array

_FLOAT32_BYTES = 4


class Device(Protocol):
    """What is used of a GPU; see `CudaDevice`."""

    name: str
    capability: str

    def activate(self) -> None: ...  # noqa: D102
    def stream(self) -> int: ...  # noqa: D102
    def allocate(self, nbytes: int) -> Memory: ...  # noqa: D102
    def zero(self, memory: Memory, nbytes: int, stream: int) -> None: ...  # noqa: D102
    def upload(self, memory: Memory, array: Array, stream: int) -> None: ...  # noqa: D102
    def download(self, array: Array, memory: Memory, stream: int) -> None: ...  # noqa: D102
    def synchronize(self, stream: int) -> None: ...  # noqa: D102
    def capture(self, stream: int, enqueue: Callable[[], None]) -> Callable[[], None]: ...  # noqa: D102


def open_tensorrt(contract: Contract, *, cuda_graphs: bool) -> "TensorRtBackend":
    """Load the plan on the GPU of this machine.

    Raises:
        EngineError: The library is not installed, there is no GPU, or the plan is for another one.
    """
    library = get_backend(contract.backend).load()
    return TensorRtBackend(contract, library, CudaDevice(), cuda_graphs=cuda_graphs)


class TensorRtBackend:
    """A plan loaded in TensorRT."""

    def __init__(self, contract: Contract, library: Any, device: Device, *, cuda_graphs: bool) -> None:
        """Deserialise the plan.

        Args:
            contract: What the manifest says of it.
            library: The module `tensorrt` or `tensorrt_rtx`.
            device: The GPU.
            cuda_graphs: Record each step as a CUDA graph once its buffers are settled.

        Raises:
            EngineError: The plan is for another GPU or library version.
        """
        self.device = "cuda"
        self._contract = contract
        self._gpu = device
        self._cuda_graphs = cuda_graphs
        header = plan_header(contract.path)
        targets = header.compute_capabilities
        if targets and device.capability not in targets:
            raise EngineError(
                f"{contract.path} was built for compute capability {', '.join(targets)}; {device.name} has "
                f"{device.capability}: build it again with --compute-capability {device.capability}"
            )
        device.activate()
        self._complaints: list[str] = []
        logger = _log_into(self._complaints, library)
        try:
            runtime = library.Runtime(logger)
        except TypeError as error:
            # TensorRT returned null.
            raise EngineError(
                f"{library.__name__} {library.__version__} cannot create a runtime on {device.name}: "
                f"{self._complaints[0] if self._complaints else error}; "
                "check that the NVIDIA driver supports this version (nvidia-smi shows the driver)"
            ) from error
        # A graph lowered for TensorRT may carry the SWS plugins in its plan.
        runtime.engine_host_code_allowed = contract.manifest.get("target") == "tensorrt"
        self._engine = runtime.deserialize_cuda_engine(contract.path.read_bytes())
        # The engine holds neither of them by itself.
        self._kept = (logger, runtime)
        if self._engine is None:
            raise EngineError(
                f"{library.__name__} {library.__version__} on {device.name} cannot load {contract.path}, "
                f"which was built by version {header.version}: {self._first_complaint()}; "
                "build the engine again on this machine"
            )

    def loop(self, states: StateShapes) -> "TensorRtLoop":
        """Buffers and an execution context for one stream."""
        self._gpu.activate()
        context = self._engine.create_execution_context()
        if context is None:
            raise EngineError(
                f"no further stream of {self._contract.path.name} fits on {self._gpu.name}: "
                f"{self._first_complaint()}; use fewer streams, or build the engine for smaller sizes"
            )
        return TensorRtLoop(
            context, self._gpu, self._contract, states, self._first_complaint, self._cuda_graphs
        )

    def _first_complaint(self) -> str:
        """The first error since the last one that was told."""
        first = self._complaints[0] if self._complaints else "it gives no reason"
        self._complaints.clear()
        return first


class TensorRtLoop:
    """An execution context and its buffers: states A and B in turn, inputs and outputs in fixed places."""

    def __init__(
        self,
        context: Any,
        device: Device,
        contract: Contract,
        states: StateShapes,
        complaint: Callable[[], str],
        cuda_graphs: bool,
    ) -> None:
        self._context = context
        self._gpu = device
        self._complaint = complaint
        self._stream = device.stream()
        self._outputs = {pair.spec.name: pair.output for pair in contract.states}
        self._states = dict(states)
        self._sets = tuple({name: self._zeros(shape) for name, shape in states.items()} for _ in range(2))
        self._current = 0
        self._places: dict[str, Memory] = {}
        self._placed: dict[str, tuple[int, ...]] = {}
        self._cuda_graphs = cuda_graphs
        # What launches the step A -> B and the step B -> A: each has its own addresses in it.
        self._recorded: list[Callable[[], None] | None] = [None, None]
        self._warm = [False, False]
        for name, shape in states.items():
            self._require(context.set_input_shape(name, shape), f"the shape {list(shape)} of {name}")
        device.synchronize(self._stream)

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run one step; see `Loop`."""
        self._gpu.activate()
        self._place(inputs, outputs)
        for name, array in inputs.items():
            self._gpu.upload(self._places[name], array, self._stream)
        self._launch()
        for name, array in outputs.items():
            self._gpu.download(array, self._places[name], self._stream)
        self._gpu.synchronize(self._stream)
        self._current = 1 - self._current

    def read(self, name: str) -> Array:
        """A copy of a state; see `Loop`."""
        self._gpu.activate()
        values = np.empty(self._states[name], np.float32)
        self._gpu.download(values, self._sets[self._current][name], self._stream)
        self._gpu.synchronize(self._stream)
        return values

    def write(self, name: str, values: Array) -> None:
        """Replace a state; see `Loop`."""
        self._gpu.activate()
        self._gpu.upload(
            self._sets[self._current][name], np.ascontiguousarray(values, np.float32), self._stream
        )
        self._gpu.synchronize(self._stream)

    def _zeros(self, shape: tuple[int, ...]) -> Memory:
        nbytes = math.prod(shape) * _FLOAT32_BYTES
        memory = self._gpu.allocate(nbytes)
        self._gpu.zero(memory, nbytes, self._stream)
        return memory

    def _place(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Have a buffer of the right size for each array; what was recorded with others is forgotten."""
        for name, array in {**inputs, **outputs}.items():
            if self._placed.get(name) == array.shape:
                continue
            self._recorded, self._warm = [None, None], [False, False]
            self._places[name] = self._gpu.allocate(array.nbytes)
            self._placed[name] = array.shape
            if name in inputs:
                accepted = self._context.set_input_shape(name, array.shape)
                self._require(accepted, f"the shape {list(array.shape)} of {name}")
            self._require(self._context.set_tensor_address(name, self._places[name].address), name)

    def _launch(self) -> None:
        recorded = self._recorded[self._current]
        if recorded is not None:
            recorded()
            return
        for name, output in self._outputs.items():
            read, written = self._sets[self._current][name], self._sets[1 - self._current][name]
            self._require(self._context.set_tensor_address(name, read.address), name)
            self._require(self._context.set_tensor_address(output, written.address), output)
        # TensorRT asks for one run outside a recording after every change of shapes.
        if self._cuda_graphs and self._warm[self._current]:
            launch = self._gpu.capture(self._stream, self._enqueue)
            self._recorded[self._current] = launch
            launch()
            return
        self._enqueue()
        self._warm[self._current] = True

    def _enqueue(self) -> None:
        self._require(
            self._context.execute_async_v3(self._stream), "to run this step; the state is unchanged"
        )

    def _require(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise EngineError(f"TensorRT refuses {what}: {self._complaint()}")


def _log_into(complaints: list[str], library: Any) -> Any:
    """A logger that keeps errors; they tell why a call returned nothing."""
    errors = (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR)

    class Log(library.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                complaints.append(message)

    return Log()
