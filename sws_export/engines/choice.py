"""Which backend builds the engine."""

import importlib.util

from sws_export.engines import tensorrt, tensorrt_rtx
from sws_export.engines.backend import Backend
from sws_export.engines.gpu import gpu_count
from sws_export.errors import EngineError, OptionError

BACKENDS = {backend.name: backend for backend in (tensorrt_rtx.BACKEND, tensorrt.BACKEND)}


def choose_backend(name: str | None = None) -> Backend:
    """The backend called `name`, or the one that suits this machine.

    The default is `tensorrt` where it is installed and a GPU is found, otherwise `tensorrt-rtx`.

    Raises:
        OptionError: There is no backend of that name.
        EngineError: It is not installed, or needs a GPU and there is none.
    """
    if name is None:
        usable = importlib.util.find_spec(tensorrt.BACKEND.module) is not None and gpu_count() > 0
        name = tensorrt.BACKEND.name if usable else tensorrt_rtx.BACKEND.name
    backend = named_backend(name)
    backend.load()
    if backend.needs_gpu and gpu_count() == 0:
        raise EngineError(
            f"backend {backend.name} needs an NVIDIA GPU with its driver and found none; "
            f"use --backend {tensorrt_rtx.BACKEND.name}, which builds without one, or --out FILE.onnx"
        )
    return backend


def named_backend(name: str) -> Backend:
    """The backend called `name`, whether it can be used here or not.

    Raises:
        OptionError: There is no backend of that name.
    """
    if name not in BACKENDS:
        raise OptionError(f"--backend {name} is unknown; choose {' or '.join(BACKENDS)}")
    return BACKENDS[name]


def engine_memory_estimate(weights_bytes: int, backend: Backend) -> int:
    """Bytes of memory that a build takes at its peak, from the bytes of the weights in the graph.

    Measured with TensorRT-RTX 1.7 on float16 UNets: SD1.5-size 5.7 GB plain and 6.4 GB with SWS (weights
    1.72 GB), SDXL-size 16.0 GB plain (5.14 GB), the SWS example 0.9 GB (0.01 GB). Of this, once the weights
    are the mapped file, which the kernel can drop when memory is short. For `tensorrt` it is the same
    figure, not measured.
    """
    # The libraries, and a graph of thousands of layers without its weights.
    fixed = 900_000_000
    return fixed + int(backend.memory_factor * weights_bytes)
