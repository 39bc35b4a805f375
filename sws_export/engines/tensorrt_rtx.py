"""TensorRT for RTX: builds on any machine, for GPUs named by their compute capability."""

from sws_export.engines.backend import Backend

_NEEDS_GPU = (
    "without a GPU the build of such an engine fails in TensorRT-RTX 1.7; "
    "use --backend tensorrt on a machine with the GPU"
)

BACKEND = Backend(
    name="tensorrt-rtx",
    module="tensorrt_rtx",
    extra="rtx",
    needs_gpu=False,
    plugins=False,
    # Ampere and later. Further targets hardly add to the plan, but 7.5 costs a fifth of its size.
    default_capabilities=("8.0", "8.6", "8.9", "12.0"),
    # Measured for every target of 1.7: 9 to 256 build in float16 and bfloat16, 8 and 257 do not.
    fused_head_sizes=range(9, 257),
    memory_factor=3.4,
    refused={
        "refit": _NEEDS_GPU,
        "strip_weights": _NEEDS_GPU,
        "version_compatible": "TensorRT-RTX has no lean runtime; use --backend tensorrt",
        "hardware_compatible": "name the GPUs with --compute-capability, for example 8.6,8.9,12.0",
        "timing_cache": "TensorRT-RTX times no kernels at build time; they are chosen where the engine runs",
        "plugins": "TensorRT-RTX runs no plugins; the graph must be lowered to standard operators",
    },
)
