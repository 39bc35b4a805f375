"""TensorRT for RTX: builds on any machine, for GPUs given by compute capability."""

from sws_export.engines.backend import EngineBackend

_NEEDS_GPU = (
    "without a GPU, TensorRT for RTX 1.7 fails to build such an engine; "
    "use --backend tensorrt on a machine with the GPU"
)

BACKEND = EngineBackend(
    name="tensorrt-rtx",
    module="tensorrt_rtx",
    extra="rtx",
    needs_gpu=False,
    plugins=False,
    # Ampere and later. Each target adds little to the plan, except 7.5, which adds a fifth of its size.
    default_capabilities=("8.0", "8.6", "8.9", "12.0"),
    # Measured for every target of 1.7: head sizes 9 to 256 build in float16 and bfloat16, 8 and 257 do not.
    fused_head_sizes=range(9, 257),
    memory_factor=3.4,
    unsupported={
        "refit": _NEEDS_GPU,
        "strip_weights": _NEEDS_GPU,
        "version_compatible": "TensorRT for RTX has no lean runtime; use --backend tensorrt",
        "hardware_compatible": "set the target GPUs with --compute-capability, for example 8.6,8.9,12.0",
        "timing_cache": "TensorRT for RTX selects kernels at run time and does not time them at build time",
        "plugins": "TensorRT for RTX does not support plugins; lower the graph to standard operators",
    },
)
