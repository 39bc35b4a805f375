"""Answers the CUDA calls of benchmarks/gpu on the CPU, on small sizes.

Python imports this module at start-up if its folder is on PYTHONPATH. Packages that a GPU machine need not
have cannot be imported.
"""

import contextlib
import dataclasses
import os
import sys
import types
from pathlib import Path

for package in ("sws_export", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt_rtx", "psutil"):
    sys.modules[package] = None

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from benchmarks.gpu import correctness, kernels, sites, timing, unet_step  # noqa: E402
from tests.plugins.gpu_benchmark.plain_kernels import PlainKernels  # noqa: E402


def on_cpu(value):
    is_cuda = str(value).startswith("cuda") if isinstance(value, str | torch.device) else False
    return "cpu" if is_cuda else value


class OnCpu(TorchFunctionMode):
    """Replaces the device `cuda` in calls of torch by `cpu`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*map(on_cpu, args), **{name: on_cpu(value) for name, value in (kwargs or {}).items()})


class Event:
    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self): ...

    def synchronize(self): ...

    def elapsed_time(self, end):  # noqa: ARG002
        return 2.0


class Stream:
    cuda_stream = 0

    def wait_stream(self, other): ...


class Graph:
    captured = False

    def replay(self):
        assert self.captured


@contextlib.contextmanager
def capture(graph):
    yield
    graph.captured = True


OnCpu().__enter__()
torch.set_num_threads(1)
properties = types.SimpleNamespace(major=9, minor=0, L2_cache_size=2**14)
simulated = {
    "is_available": lambda: True,
    "get_device_capability": lambda: (9, 0),
    "get_device_name": lambda: "simulated GPU",
    "get_device_properties": lambda _: properties,
    "current_stream": lambda *_: Stream(),
    "stream": lambda _: contextlib.nullcontext(),
    "synchronize": lambda: None,
    "empty_cache": lambda: None,
    "graph": capture,
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": Graph,
}
for name, value in simulated.items():
    setattr(torch.cuda, name, value)

BUILD = Path(os.environ["SIMULATED_BUILD"])


def build_kernels():
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.log").write_text(
        "ptxas info    : Compiling entry function '_ZN3sws13finish_kernelEv' for 'sm_90'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 48 registers, used 1 barriers\n"
    )
    return PlainKernels()


kernels.BUILD = BUILD
kernels.build_kernels = build_kernels
sites.SITES = tuple(
    dataclasses.replace(site, side=site.side // 8, heads=2, head_size=8 * (site.head_size // 40))
    for site in sites.SITES
)
few = correctness.Sweep(
    grids=((5, 7),),
    radii=(2, 8),
    channels=(8, 33),
    budgets=(5e-3,),
    guard_shapes=(correctness.GuardShape(24, 2, 16, 40),),
    fused_shapes=(correctness.GuardShape(256, 2, 40, 256),),
    search_logits=(700.0,),
)
for check in (correctness.check_transport, correctness.check_guard, correctness.check_fused_guard):
    check.__defaults__ = (few,)
timing.SAMPLES = 1
timing.MAX_SETS = 3
timing.copy_bandwidth.__defaults__ = (2**10,)
timing.matmul_rate.__defaults__ = (2**5,)
small = {
    "sample_size": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "transformer_layers_per_block": 1,
}
unet_step.SD15 |= small
unet_step.SDXL |= small | {
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 1280 + 6 * 8,
}
