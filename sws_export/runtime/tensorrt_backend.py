"""Engines in TensorRT or TensorRT for RTX, which share one Python API.

Not run on a GPU by this project's tests, which replace the library and the device by fakes in host memory.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import numpy as np

from sws_export.engines.choice import get_backend
from sws_export.engines.header import plan_header
from sws_export.errors import EngineError
from sws_export.runtime.backend import StateShapes
from sws_export.runtime.contract import Contract
from sws_export.runtime.cuda_device import CudaDevice, Device, Memory, fetch, fill
from sws_export.runtime.inputs import Array, Buffer, GpuTensor
from sws_export.runtime.integrity import FoundTensor, check_profiles, check_tensors
from sws_export.runtime.profiles import narrowest_profile
from sws_export.tensors import Shape

_FLOAT32_BYTES = 4
# Members of TensorRT's DataType.
_DTYPES = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
}


def open_tensorrt(
    contract: Contract, *, cuda_graphs: bool, engine_host_code_allowed: bool
) -> "TensorRtBackend":
    """Load the plan on the GPU of this machine.

    Raises:
        EngineError: The library is not installed, there is no GPU, or the plan is for another one.
    """
    library = get_backend(contract.backend).load()
    return TensorRtBackend(
        contract,
        library,
        CudaDevice(),
        cuda_graphs=cuda_graphs,
        engine_host_code_allowed=engine_host_code_allowed,
    )


class TensorRtBackend:
    """A plan loaded in TensorRT."""

    def __init__(
        self,
        contract: Contract,
        library: Any,
        device: Device,
        *,
        cuda_graphs: bool,
        engine_host_code_allowed: bool = False,
    ) -> None:
        """Deserialize the plan and compare its tensors and profiles with the manifest.

        Args:
            contract: Of the engine.
            library: The module `tensorrt` or `tensorrt_rtx`.
            device: The GPU.
            cuda_graphs: Capture the step as CUDA graphs.
            engine_host_code_allowed: See `Session.load`.

        Raises:
            EngineError: The plan is for another GPU or library version, contains host code that is not
                allowed, or has other tensors than its manifest.
        """
        self.device = "cuda"
        self._contract = contract
        self._library = library
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
        self._errors: list[str] = []
        logger = _error_logger(self._errors, library)
        try:
            runtime = library.Runtime(logger)
        except TypeError as error:
            # TensorRT returned null.
            raise EngineError(
                f"{library.__name__} {library.__version__} cannot create a runtime on {device.name}: "
                f"{self._errors[0] if self._errors else error}; "
                "check that the NVIDIA driver supports this version (nvidia-smi shows the driver)"
            ) from error
        runtime.engine_host_code_allowed = engine_host_code_allowed
        self._engine = runtime.deserialize_cuda_engine(contract.path.read_bytes())
        # The engine does not keep them alive.
        self._kept = (logger, runtime)
        if self._engine is None:
            raise EngineError(
                f"{library.__name__} {library.__version__} on {device.name} cannot load {contract.path}, "
                f"which was built by version {header.version}: {self._first_error()}; "
                f"build the engine again on this machine{_host_code_hint(contract, engine_host_code_allowed)}"
            )
        _check_engine(contract, self._engine, library)

    def loop(self, states: StateShapes) -> "TensorRtLoop":
        """Buffers and an execution context for one stream."""
        self._gpu.activate()
        context = self._create_context()
        if context is None:
            raise EngineError(
                f"no further stream of {self._contract.path.name} fits on {self._gpu.name}: "
                f"{self._first_error()}; use fewer streams, or build the engine for smaller sizes"
            )
        return TensorRtLoop(context, self._gpu, self._contract, states, self._first_error, self._cuda_graphs)

    def _create_context(self) -> Any:
        if len(self._contract.profiles) < 2:
            return self._engine.create_execution_context()
        # The default allocates what the largest profile needs, whichever is used.
        strategies = self._library.ExecutionContextAllocationStrategy
        return self._engine.create_execution_context(strategy=strategies.ON_PROFILE_CHANGE)

    def _first_error(self) -> str:
        """The first error that TensorRT logged since the last call."""
        first = self._errors[0] if self._errors else "TensorRT logged no reason"
        self._errors.clear()
        return first


def _check_engine(contract: Contract, engine: Any, library: Any) -> None:
    """Compare the engine's tensors and profiles with the manifest."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == library.TensorIOMode.INPUT]
    found = {
        name: FoundTensor(
            name,
            _DTYPES.get(engine.get_tensor_dtype(name).name, "another dtype"),
            [None if size < 0 else size for size in engine.get_tensor_shape(name)],
        )
        for name in names
    }
    outputs = [found[name] for name in names if name not in inputs]
    check_tensors(contract.path, contract.manifest, [found[name] for name in inputs], outputs)
    profiles: list[dict[str, tuple[Shape, Shape, Shape]]] = []
    for index in range(engine.num_optimization_profiles):
        profile: dict[str, tuple[Shape, Shape, Shape]] = {}
        for name in inputs:
            smallest, best, largest = engine.get_tensor_profile_shape(name, index)
            profile[name] = (tuple(smallest), tuple(best), tuple(largest))
        profiles.append(profile)
    check_profiles(contract.path, contract.profiles, profiles)


def _host_code_hint(contract: Contract, allowed: bool) -> str:
    if allowed or contract.backend != "tensorrt":
        return ""
    return (
        "; if it contains plugins or is version-compatible, it has host code, which is run only for "
        "engine_host_code_allowed=True: pass that for engines whose origin you trust"
    )


class TensorRtLoop:
    """An execution context, two alternating sets of state buffers, and buffers for inputs and outputs."""

    def __init__(
        self,
        context: Any,
        device: Device,
        contract: Contract,
        states: StateShapes,
        first_error: Callable[[], str],
        cuda_graphs: bool,
    ) -> None:
        self._context = context
        self._gpu = device
        self._first_error = first_error
        self._stream = device.stream()
        self._profiles = contract.profiles
        self._profile = 0
        self._outputs = {pair.spec.name: pair.output for pair in contract.states}
        self._states = dict(states)
        self._sets = tuple({name: self._zeros(shape) for name, shape in states.items()} for _ in range(2))
        self._current = 0
        self._buffers: dict[str, Memory] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._cuda_graphs = cuda_graphs
        # Launch the captured steps A -> B and B -> A: a CUDA graph contains the addresses of the buffers.
        self._captured: list[Callable[[], None] | None] = [None, None]
        self._warm = [False, False]
        device.synchronize(self._stream)

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run one step; see `Loop`."""
        self._gpu.activate()
        self._bind(inputs, outputs)
        for name, array in inputs.items():
            if not self._in_place(array):
                fill(self._gpu, self._buffers[name], array, self._stream)
        self._launch()
        for name, array in outputs.items():
            if not self._in_place(array):
                fetch(self._gpu, array, self._buffers[name], self._stream)
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

    def _in_place(self, array: Buffer) -> TypeGuard[GpuTensor]:
        """Whether the engine reads or writes it where it is."""
        return isinstance(array, GpuTensor) and not self._cuda_graphs

    def _bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Set the shapes and addresses that changed; captured steps are dropped if a shape did.

        Arrays have a buffer on the GPU. Torch tensors in GPU memory are used where they are, unless steps are
        captured: a CUDA graph contains the addresses, so that tensors are copied into buffers on the GPU.
        """
        self._select_profile({name: array.shape for name, array in inputs.items()})
        for name, shape in self._states.items():
            self._set_input_shape(name, shape)
        for name, array in {**inputs, **outputs}.items():
            if self._shapes.get(name) != array.shape:
                self._buffers.pop(name, None)
                if name in inputs:
                    self._set_input_shape(name, array.shape)
                self._shapes[name] = array.shape
            if self._in_place(array):
                address = array.address
            else:
                if name not in self._buffers:
                    self._buffers[name] = self._gpu.allocate(array.nbytes)
                address = self._buffers[name].address
            if self._addresses.get(name) != address:
                self._require(self._context.set_tensor_address(name, address), name)
                self._addresses[name] = address

    def _select_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Switch to the narrowest profile that accepts these shapes of inputs."""
        profile = narrowest_profile(self._profiles, shapes) or 0
        if profile == self._profile:
            return
        accepted = self._context.set_optimization_profile_async(profile, self._stream)
        self._require(accepted, f"optimization profile {profile}")
        self._profile = profile
        # The shapes and addresses of the previous profile are invalid.
        self._shapes.clear()
        self._addresses.clear()

    def _set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self._shapes.get(name) == shape:
            return
        self._captured, self._warm = [None, None], [False, False]
        self._require(self._context.set_input_shape(name, shape), f"the shape {list(shape)} of {name}")
        self._shapes[name] = shape

    def _launch(self) -> None:
        captured = self._captured[self._current]
        if captured is not None:
            captured()
            return
        for name, output in self._outputs.items():
            read, written = self._sets[self._current][name], self._sets[1 - self._current][name]
            self._require(self._context.set_tensor_address(name, read.address), name)
            self._require(self._context.set_tensor_address(output, written.address), output)
        # TensorRT requires one run outside the capture after every change of shapes.
        if self._cuda_graphs and self._warm[self._current]:
            launch = self._gpu.capture(self._stream, self._enqueue)
            self._captured[self._current] = launch
            launch()
            return
        self._enqueue()
        self._warm[self._current] = True

    def _enqueue(self) -> None:
        self._require(self._context.execute_async_v3(self._stream), "this step, and the state is unchanged")

    def _require(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise EngineError(f"TensorRT rejects {what}: {self._first_error()}")


def _error_logger(messages: list[str], library: Any) -> Any:
    """A logger that appends errors to `messages`: the reasons why a call of the library failed."""
    errors = (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR)

    class Log(library.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                messages.append(message)

    return Log()
