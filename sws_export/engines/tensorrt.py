"""TensorRT proper: builds on the GPU that the engine will run on, and runs plugins."""

from sws_export.engines.backend import Backend

BACKEND = Backend(
    name="tensorrt",
    module="tensorrt",
    extra="gpu",
    needs_gpu=True,
    plugins=True,
    default_capabilities=(),
    # Which kernels there are depends on the GPU and cannot be asked before the build. A decomposable
    # attention still gets its dedicated kernel where there is one, so none is taken for granted.
    fused_head_sizes=range(0),
    memory_factor=3.4,
    refused={
        "compute_capabilities": (
            "TensorRT builds for the GPU of this machine; --hardware-compatible makes the engine run on "
            "every GPU from Ampere on"
        ),
    },
)
