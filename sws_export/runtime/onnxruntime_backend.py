"""Graphs in ONNX Runtime."""

import itertools
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sws_export.errors import EngineError, OptionError
from sws_export.manifest import METADATA_KEY
from sws_export.runtime.backend import StateShapes
from sws_export.runtime.contract import Contract
from sws_export.runtime.cuda_device import CudaDevice, Device, Memory
from sws_export.runtime.inputs import Array, Buffer, GpuTensor, numpy_dtype
from sws_export.runtime.integrity import FoundTensor, check_embedded, check_tensors
from sws_export.runtime.providers import PROVIDERS, ProviderName, create_session

# Errors are raised as well; ONNX Runtime would print them raw, with names from the graph.
_FATAL_ONLY = 4
_GPU = "cuda"
"""Name of NVIDIA GPUs in ONNX Runtime, whichever provider uses them."""
_BFLOAT16 = 16
"""Element type in ONNX; numpy has none."""


class OnnxRuntimeBackend:
    """A graph loaded in ONNX Runtime."""

    def __init__(
        self,
        contract: Contract,
        provider: ProviderName | None,
        threads: int | None,
        *,
        cuda_graphs: bool = False,
    ) -> None:
        """Load the graph.

        Args:
            contract: Of the graph.
            provider: None is `cuda` if ONNX Runtime has this provider and it can start, otherwise `cpu`.
            threads: Threads of one operator on the CPU; None is ONNX Runtime's default.
            cuda_graphs: Capture the step of each stream as two CUDA graphs.

        Raises:
            EngineError: ONNX Runtime or the provider is not installed or cannot start, ONNX Runtime cannot
                load the graph, or its steps cannot be captured.
            OptionError: CUDA graphs are asked for and the provider is another one than `cuda`.

        Warns:
            RuntimeWarning: The graph was exported for another target.
        """
        runtime = _import_onnxruntime()
        options = runtime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session, used = create_session(
                runtime, contract, provider, options, cuda_graphs=cuda_graphs
            )
        except (EngineError, OptionError):
            raise
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise EngineError(_rejection(contract, error)) from error
        self.device: str = PROVIDERS[used].device
        if mismatch := contract.target_mismatch(used):
            warnings.warn(mismatch, RuntimeWarning, stacklevel=2)
        embedded = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        check_embedded(contract.path, contract.manifest, embedded)
        check_tensors(
            contract.path,
            contract.manifest,
            [_found(node) for node in self._session.get_inputs()],
            [_found(node) for node in self._session.get_outputs()],
        )
        self._contract = contract
        self._capturing = Capturing(CudaDevice(), runtime.RunOptions) if cuda_graphs else None

    def loop(self, states: StateShapes) -> "OnnxRuntimeLoop":
        """Buffers for one stream, all zero."""
        if self._capturing is not None:
            return CapturedLoop(self._session, self._contract, self.device, states, self._capturing)
        return OnnxRuntimeLoop(self._session, self._contract, self.device, states)


class OnnxRuntimeLoop:
    """Two I/O bindings over two sets of buffers: one reads A and writes B, the other reads B and writes A."""

    def __init__(self, session: Any, contract: Contract, device: str, states: StateShapes) -> None:
        from onnxruntime import OrtValue

        self._device = _GPU if device == "cuda" else device
        self._session = session
        self._sets = tuple(
            {
                name: OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32), self._device, 0)
                for name, shape in states.items()
            }
            for _ in range(2)
        )
        self._current = 0
        outputs = {pair.spec.name: pair.output for pair in contract.states}
        self._bindings = [self._bind(self._sets[i], self._sets[1 - i], outputs) for i in range(2)]

    def _bind(self, read: Mapping[str, Any], written: Mapping[str, Any], outputs: Mapping[str, str]) -> Any:
        binding = self._session.io_binding()
        for name, value in read.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in written.items():
            binding.bind_ortvalue_output(outputs[name], value)
        return binding

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run one step; see `Loop`."""
        binding = self._bindings[self._current]
        for name, array in inputs.items():
            if isinstance(array, GpuTensor):
                binding.bind_input(name, _GPU, 0, _element_type(array), array.shape, array.address)
            else:
                binding.bind_cpu_input(name, array)
        for name, array in outputs.items():
            if isinstance(array, GpuTensor):
                binding.bind_output(name, _GPU, 0, _element_type(array), array.shape, array.address)
            else:
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._launch(None)

    def _launch(self, options: Any) -> None:
        """Run the step on what is bound; `options` are ONNX Runtime's `RunOptions`."""
        try:
            self._session.run_with_iobinding(self._bindings[self._current], options)
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise EngineError(f"ONNX Runtime failed in this step; the state is unchanged: {error}") from error
        self._current = 1 - self._current

    def read(self, name: str) -> Array:
        """A copy of a state; see `Loop`."""
        return np.array(self._sets[self._current][name].numpy(), copy=True)

    def write(self, name: str, values: Array) -> None:
        """Replace a state; see `Loop`."""
        self._sets[self._current][name].update_inplace(np.ascontiguousarray(values, np.float32))


class Capturing:
    """What the captured steps of a session share.

    Attributes:
        gpu: The GPU that it runs on.
        lock: ONNX Runtime captures and launches one step of a session at a time.
    """

    def __init__(self, gpu: Device, make_options: Callable[[], Any]) -> None:
        """`make_options` makes ONNX Runtime's `RunOptions`."""
        self.gpu = gpu
        self.lock = threading.Lock()
        self._make_options = make_options
        self._numbers = itertools.count(1)

    def new_graph(self) -> Any:
        """Options of the runs that a further CUDA graph is captured from, and then launched by."""
        options = self._make_options()
        options.add_run_config_entry("gpu_graph_id", str(next(self._numbers)))
        return options


class CapturedLoop(OnnxRuntimeLoop):
    """The two steps, from A to B and from B to A, as CUDA graphs.

    A CUDA graph contains the addresses of its buffers. So inputs and outputs have buffers on the GPU, from
    and to which arrays and tensors are copied. ONNX Runtime captures a step when it runs for the first time,
    and cannot be told to drop it: sizes that change often cost memory.
    """

    def __init__(
        self, session: Any, contract: Contract, device: str, states: StateShapes, capturing: Capturing
    ) -> None:
        super().__init__(session, contract, device, states)
        self._capturing = capturing
        self._gpu = capturing.gpu
        self._stream = self._gpu.stream()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._buffers: dict[str, Memory] = {}
        self._graphs: list[Any] = []

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run one step; see `Loop`."""
        self._gpu.activate()
        shapes = {name: array.shape for name, array in {**inputs, **outputs}.items()}
        if shapes != self._shapes:
            self._bind_buffers(inputs, outputs)
            self._shapes = shapes
        for name, array in inputs.items():
            if isinstance(array, GpuTensor):
                self._gpu.copy(self._buffers[name].address, array.address, array.nbytes, self._stream)
            else:
                self._gpu.upload(self._buffers[name], array, self._stream)
        self._gpu.synchronize(self._stream)
        with self._capturing.lock:
            self._launch(self._graphs[self._current])
        for name, array in outputs.items():
            if isinstance(array, GpuTensor):
                self._gpu.copy(array.address, self._buffers[name].address, array.nbytes, self._stream)
            else:
                self._gpu.download(array, self._buffers[name], self._stream)
        self._gpu.synchronize(self._stream)

    def _bind_buffers(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Bind new buffers of these sizes to both directions, which are then captured again."""
        arrays = {**inputs, **outputs}
        self._buffers = {name: self._gpu.allocate(array.nbytes) for name, array in arrays.items()}
        for name, array in arrays.items():
            place = (self._device, 0, _element_type(array), array.shape, self._buffers[name].address)
            for binding in self._bindings:
                (binding.bind_input if name in inputs else binding.bind_output)(name, *place)
        self._graphs = [self._capturing.new_graph() for _ in self._bindings]


def _element_type(array: Buffer) -> Any:
    """The dtype as ONNX Runtime takes it."""
    if not isinstance(array, GpuTensor):
        return array.dtype
    return _BFLOAT16 if array.dtype == "bfloat16" else numpy_dtype(array.dtype)


def _found(node: Any) -> FoundTensor:
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    return FoundTensor(node.name, {"float": "float32", "double": "float64"}.get(kind, kind), node.shape)


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise EngineError(
            "an .onnx graph runs in ONNX Runtime, which is not installed; install it with: "
            "pip install 'sws-export[cpu]'"
        ) from error
    return onnxruntime


def _rejection(contract: Contract, error: Exception) -> str:
    if contract.manifest["precision"] == "bf16":
        return (
            f"ONNX Runtime cannot run {contract.path}: it has no bfloat16 kernels for this graph; "
            f"export with --precision fp16 or fp32, or build an engine ({error})"
        )
    return f"ONNX Runtime cannot load {contract.path}: {error}; export it again"
