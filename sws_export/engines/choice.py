"""Selection of the engine backend."""

import importlib.util

from sws_export.engines import tensorrt, tensorrt_rtx
from sws_export.engines.backend import EngineBackend
from sws_export.engines.gpu import gpu_count
from sws_export.errors import EngineError, OptionError

BACKENDS = {backend.name: backend for backend in (tensorrt_rtx.BACKEND, tensorrt.BACKEND)}

GRAPH_BACKENDS = ("onnxruntime-cuda",)
"""Runtimes of ONNX graphs: they build no engine."""


def choose_backend(name: str | None = None) -> EngineBackend:
    """The backend called `name`, or the default for this machine.

    The default is `tensorrt` if it is installed and there is a GPU, otherwise `tensorrt-rtx`.

    Raises:
        OptionError: There is no backend with that name.
        EngineError: The library is not installed, or it needs a GPU and there is none.
    """
    if name is None:
        usable = importlib.util.find_spec(tensorrt.BACKEND.module) is not None and gpu_count() > 0
        name = tensorrt.BACKEND.name if usable else tensorrt_rtx.BACKEND.name
    backend = get_backend(name)
    backend.load()
    if backend.needs_gpu and gpu_count() == 0:
        raise EngineError(
            f"backend {backend.name} needs an NVIDIA GPU with a driver, found none; "
            f"use --backend {tensorrt_rtx.BACKEND.name}, which builds without one, or --out FILE.onnx"
        )
    return backend


def get_backend(name: str) -> EngineBackend:
    """The backend called `name`, without checking that it can be used on this machine.

    Raises:
        OptionError: There is no backend with that name.
    """
    if name in GRAPH_BACKENDS:
        raise OptionError(f"--backend {name} runs an ONNX graph and builds no engine; use --out FILE.onnx")
    if name not in BACKENDS:
        known = ", ".join((*BACKENDS, *GRAPH_BACKENDS))
        raise OptionError(f"--backend {name} is unknown; choose one of {known}")
    return BACKENDS[name]


def engine_memory_estimate(weights_bytes: int, backend: EngineBackend) -> int:
    """Estimated peak memory of a build in bytes.

    Measured with TensorRT for RTX 1.7 on float16 UNets: 5.7 GB for a plain and 6.4 GB for an SWS graph of the
    size of SD1.5 (weights 1.72 GB), 16.0 GB for a plain graph of the size of SDXL (5.14 GB), 0.9 GB for the
    SWS example (0.01 GB). This includes the memory-mapped weights file once, which the kernel can evict if
    memory is short. The factor of `tensorrt` is the same, not measured.

    Args:
        weights_bytes: Size of the weights in the graph.
        backend: The backend that builds the engine.
    """
    # The libraries, and the structure of a graph with thousands of layers.
    fixed = 900_000_000
    return fixed + int(backend.memory_factor * weights_bytes)
