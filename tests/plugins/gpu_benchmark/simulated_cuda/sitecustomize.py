"""Answers calls of torch.cuda on the CPU.

Python imports this module at start-up if its folder is on PYTHONPATH. Packages that a GPU machine need not
have cannot be imported.
"""

import contextlib
import sys
import types

# diffusers imports the last three, for seconds, where it finds them.
NOT_NEEDED = "sws_export onnx onnx_ir onnxscript onnxruntime tensorrt_rtx psutil transformers peft scipy"
sys.modules |= dict.fromkeys(NOT_NEEDED.split())

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402


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
