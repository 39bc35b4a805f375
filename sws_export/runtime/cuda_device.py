"""The calls of the CUDA driver API that a session needs, without torch or a CUDA toolkit.

Names and meaning are those of docs.nvidia.com/cuda/cuda-driver-api. Tests without a GPU run sessions on a
fake device in host memory; `tests/sws_export/runtime/test_cuda.py` ran all but `zero` and `capture` on a GPU.
"""

import ctypes
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from sws_export.engines.gpu import load_driver
from sws_export.errors import EngineError
from sws_export.runtime.inputs import Array, Buffer, GpuTensor

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_OUT_OF_MEMORY = 2
_NON_BLOCKING = 1
_CAPTURE_THREAD_LOCAL = 1


class Memory:
    """Device memory, freed with this object."""

    def __init__(self, address: int, free: Callable[[int], None]) -> None:
        self.address = address
        weakref.finalize(self, free, address)


class Device(Protocol):
    """The interface of a GPU; see `CudaDevice`."""

    name: str
    capability: str

    def activate(self) -> None: ...  # noqa: D102
    def stream(self) -> int: ...  # noqa: D102
    def allocate(self, nbytes: int) -> Memory: ...  # noqa: D102
    def zero(self, memory: Memory, nbytes: int, stream: int) -> None: ...  # noqa: D102
    def upload(self, memory: Memory, array: Array, stream: int) -> None: ...  # noqa: D102
    def download(self, array: Array, memory: Memory, stream: int) -> None: ...  # noqa: D102
    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None: ...  # noqa: D102
    def synchronize(self, stream: int) -> None: ...  # noqa: D102
    def capture(self, stream: int, enqueue: Callable[[], None]) -> Callable[[], None]: ...  # noqa: D102


def fill(gpu: Device, memory: Memory, array: Buffer, stream: int) -> None:
    """Copy an array or a tensor on the GPU into device memory, asynchronously in `stream`."""
    if isinstance(array, GpuTensor):
        gpu.copy(memory.address, array.address, array.nbytes, stream)
    else:
        gpu.upload(memory, array, stream)


def fetch(gpu: Device, array: Buffer, memory: Memory, stream: int) -> None:
    """Copy device memory into an array or a tensor on the GPU, asynchronously in `stream`."""
    if isinstance(array, GpuTensor):
        gpu.copy(array.address, memory.address, array.nbytes, stream)
    else:
        gpu.download(array, memory, stream)


class CudaDevice:
    """The first GPU of this machine, through its primary context, which torch and TensorRT use too.

    Thread-safe.
    """

    def __init__(self) -> None:
        """Find the GPU.

        Raises:
            EngineError: There is no driver or no GPU.
        """
        try:
            self._driver = load_driver()
            self._call("cuInit", 0)
            device = ctypes.c_int()
            self._call("cuDeviceGet", ctypes.byref(device), 0)
        except (OSError, EngineError) as error:
            raise EngineError(
                f"engines and CUDA graphs need an NVIDIA GPU with its driver, and none was found ({error}): "
                "check with nvidia-smi, or load an .onnx graph on the CPU (an engine's: --keep-onnx)"
            ) from error
        major, minor = (self._attribute(device, code) for code in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR))
        self.capability = f"{major}.{minor}"
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), device)
        self.name = name.value.decode()
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def activate(self) -> None:
        """Make the context current in the calling thread, which TensorRT requires."""
        self._call("cuCtxSetCurrent", self._context)

    def stream(self) -> int:
        """Handle of a new stream, which is never destroyed."""
        self.activate()
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return int(stream.value or 0)

    def allocate(self, nbytes: int) -> Memory:
        """Uninitialized memory.

        Raises:
            EngineError: The GPU has too little memory.
        """
        self.activate()
        address = ctypes.c_uint64()
        # The driver rejects 0 bytes.
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(nbytes, 1)))
        return Memory(address.value, self._free)

    def zero(self, memory: Memory, nbytes: int, stream: int) -> None:
        """Set `nbytes` bytes to zero, asynchronously in `stream`."""
        self._call(
            "cuMemsetD8Async",
            ctypes.c_uint64(memory.address),
            ctypes.c_ubyte(0),
            ctypes.c_size_t(nbytes),
            ctypes.c_void_p(stream),
        )

    def upload(self, memory: Memory, array: Array, stream: int) -> None:
        """Copy a contiguous host array to the device, asynchronously in `stream`."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(memory.address),
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(stream),
        )

    def download(self, array: Array, memory: Memory, stream: int) -> None:
        """Copy device memory to a contiguous host array, asynchronously in `stream`."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(memory.address),
            ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(stream),
        )

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy `nbytes` bytes between two addresses of the device, asynchronously in `stream`."""
        self._call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(target),
            ctypes.c_uint64(source),
            ctypes.c_size_t(nbytes),
            ctypes.c_void_p(stream),
        )

    def synchronize(self, stream: int) -> None:
        """Wait for all work in `stream`."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Capture the work that `enqueue` adds to `stream` as a CUDA graph; returns the function to launch.

        The graph contains the addresses of its buffers and is invalid when a buffer is replaced.
        """
        handle, graph, executable = ctypes.c_void_p(stream), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", handle, _CAPTURE_THREAD_LOCAL)
        try:
            enqueue()
        finally:
            self._call("cuStreamEndCapture", handle, ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        self._call("cuGraphDestroy", graph)

        def launch() -> None:
            self._call("cuGraphLaunch", executable, handle)

        weakref.finalize(launch, self._driver.cuGraphExecDestroy, executable)
        return launch

    def _attribute(self, device: ctypes.c_int, code: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), code, device)
        return value.value

    def _free(self, address: int) -> None:
        # Errors are ignored: at the end of the process the driver may be shut down before the last buffer.
        self._driver.cuCtxSetCurrent(self._context)
        self._driver.cuMemFree_v2(ctypes.c_uint64(address))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code == 0:
            return
        if code == _OUT_OF_MEMORY:
            raise EngineError(
                "the GPU has too little memory; close other programs on it, use fewer streams, or export for "
                "smaller sizes"
            )
        text = ctypes.c_char_p()
        self._driver.cuGetErrorName(code, ctypes.byref(text))
        raise EngineError(f"the NVIDIA driver failed in {name}: {(text.value or b'unknown error').decode()}")
