"""The device memory of one stream in ONNX Runtime, and its steps as CUDA graphs."""

import itertools
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, ParamSpec, TypeVar

import numpy as np

from sws_export.errors import EngineError
from sws_export.runtime.backend import StateShapes
from sws_export.runtime.contract import Contract
from sws_export.runtime.cuda_device import Device, Memory, fetch, fill
from sws_export.runtime.inputs import Array, Buffer, GpuTensor, numpy_dtype

_GPU = "cuda"
"""Name of NVIDIA GPUs in ONNX Runtime, whichever provider uses them."""
_BFLOAT16 = 16
"""Element type in ONNX; numpy has none."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class OnnxRuntimeLoop:
    """Two I/O bindings over two sets of buffers: one reads A and writes B, the other reads B and writes A."""

    def __init__(self, session: Any, contract: Contract, device: str, states: StateShapes) -> None:
        from onnxruntime import OrtValue

        self._device = device
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
            binding.bind_input(name, *_place(array))
        for name, array in outputs.items():
            binding.bind_output(name, *_place(array))
        self._launch()
        self._current = 1 - self._current

    def _launch(self, options: Any = None) -> None:
        """Run the model on what is bound; `options` are ONNX Runtime's `RunOptions`."""
        try:
            self._session.run_with_iobinding(self._bindings[self._current], options)
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise EngineError(f"ONNX Runtime failed in this step; the state is unchanged: {error}") from error

    def read(self, name: str) -> Array:
        """A copy of a state; see `Loop`."""
        return np.array(self._sets[self._current][name].numpy(), copy=True)

    def write(self, name: str, values: Array) -> None:
        """Replace a state; see `Loop`."""
        self._sets[self._current][name].update_inplace(np.ascontiguousarray(values, np.float32))


class CaptureThread:
    """The thread that runs all steps of a session whose steps are captured, and reads and writes its states.

    ONNX Runtime keeps CUDA graphs for each thread, and fails to capture one while another thread of the
    process allocates or frees GPU memory.
    """

    def __init__(self, gpu: Device, make_options: Callable[[], Any]) -> None:
        """Start no thread yet.

        Args:
            gpu: The GPU that the session runs on.
            make_options: Makes ONNX Runtime's `RunOptions`.
        """
        self.gpu = gpu
        self._make_options = make_options
        self._numbers = itertools.count(1)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cuda-graphs")

    def call(
        self, work: Callable[_Arguments, _Result], *arguments: _Arguments.args, **named: _Arguments.kwargs
    ) -> _Result:
        """The result of `work`, done in the thread; also after an interrupt the work is complete."""
        future = self._thread.submit(work, *arguments, **named)
        try:
            return future.result()
        finally:
            # Work that goes on would write to buffers that an interrupted caller has freed.
            wait([future])

    def free_later(self, owner: object, buffers: dict[str, Memory]) -> None:
        """Free the memory in `buffers` in the thread, when `owner` is gone."""
        weakref.finalize(owner, self._thread.submit, buffers.clear).atexit = False

    def new_graph(self) -> Any:
        """Options for runs of one step: the first captures it as a new CUDA graph, the others launch that."""
        options = self._make_options()
        options.add_run_config_entry("gpu_graph_id", str(next(self._numbers)))
        return options


class CapturedLoop(OnnxRuntimeLoop):
    """The steps from A to B and from B to A as CUDA graphs, for a graph with static shapes.

    A CUDA graph contains the addresses of its buffers. So inputs and outputs have buffers on the GPU, from
    and to which arrays and tensors are copied. ONNX Runtime keeps what it captured until the session ends.
    """

    def __init__(
        self, session: Any, contract: Contract, device: str, states: StateShapes, thread: CaptureThread
    ) -> None:
        self._thread = thread
        self._gpu = thread.gpu
        self._buffers: dict[str, Memory] = {}
        thread.free_later(self, self._buffers)
        thread.call(super().__init__, session, contract, device, states)
        self._stream = thread.call(self._gpu.stream)
        self._graphs = [thread.new_graph() for _ in self._bindings]

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run one step; see `Loop`."""
        self._thread.call(self._run, inputs, outputs)
        self._current = 1 - self._current

    def read(self, name: str) -> Array:
        """A copy of a state; see `Loop`."""
        return self._thread.call(super().read, name)

    def write(self, name: str, values: Array) -> None:
        """Replace a state; see `Loop`."""
        self._thread.call(super().write, name, values)

    def _run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        self._gpu.activate()
        if not self._buffers:
            self._bind_buffers(inputs, outputs)
        for name, array in inputs.items():
            fill(self._gpu, self._buffers[name], array, self._stream)
        self._gpu.synchronize(self._stream)
        self._launch(self._graphs[self._current])
        for name, array in outputs.items():
            fetch(self._gpu, array, self._buffers[name], self._stream)
        self._gpu.synchronize(self._stream)

    def _bind_buffers(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Allocate buffers for inputs and outputs and bind them to both directions."""
        arrays = {**inputs, **outputs}
        self._buffers |= {name: self._gpu.allocate(array.nbytes) for name, array in arrays.items()}
        for name, array in arrays.items():
            place = (self._device, 0, _element_type(array), array.shape, self._buffers[name].address)
            for binding in self._bindings:
                (binding.bind_input if name in inputs else binding.bind_output)(name, *place)


def _place(array: Buffer) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Where an input or output is, as ONNX Runtime binds it: device, its number, dtype, shape and address."""
    device, address = (_GPU, array.address) if isinstance(array, GpuTensor) else ("cpu", array.ctypes.data)
    return device, 0, _element_type(array), array.shape, address


def _element_type(array: Buffer) -> Any:
    """The dtype as ONNX Runtime takes it."""
    if str(array.dtype) == "bfloat16":
        return _BFLOAT16
    return numpy_dtype(array.dtype) if isinstance(array, GpuTensor) else array.dtype
