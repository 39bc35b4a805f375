"""TensorRT: builds on the GPU that the engine will run on, and supports plugins."""

from sws_export.engines.backend import EngineBackend

BACKEND = EngineBackend(
    name="tensorrt",
    module="tensorrt",
    extra="gpu",
    needs_gpu=True,
    plugins=True,
    default_capabilities=(),
    # The available kernels depend on the GPU and cannot be queried before the build. A decomposable
    # attention still uses a dedicated kernel if there is one, so no head size is listed.
    fused_head_sizes=range(0),
    memory_factor=3.4,
    unsupported={
        "compute_capabilities": (
            "TensorRT builds for the GPU of this machine; with --hardware-compatible the engine runs on "
            "every GPU since Ampere"
        ),
    },
)
