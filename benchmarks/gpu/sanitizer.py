"""compute-sanitizer on a small case of everything."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks.gpu.kernels import ROOT, Kernels
from benchmarks.gpu.references import make_guard_inputs, make_weights

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_FOUND = 9
_SECONDS = 100


def run_small_case(kernels: Kernels, device: str) -> None:
    """Run every launch once: ragged shapes, every dtype, both radii of the tensor-core kernel.

    Tensors are created on the CPU: the sanitizer is slow, and torch's own kernels need no check.
    """
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for channels, radius in ((40, 8), (40, 4), (33, 8)):
            weights = make_weights(2, (9, 11), radius, device)
            x = torch.randn(2, 99, channels).to(dtype).to(device)
            kernels.banded_transport(weights, [x, x], radius)
        for head_size in (40, 41):
            # Logits of this size in one of the samples send it to the search rounds.
            for sharpness in (2, 2000):
                q, k, k_perm, scalars = make_guard_inputs(
                    2, 99, 2 * head_size, dtype, device, kappa=1e-3, sharpness=sharpness
                )
                kernels.key_guard(q, k, k_perm, scalars, 2)
    torch.cuda.synchronize()


def sanitize() -> Iterator[tuple[str, str]]:
    """Yield each tool and its result on the small case."""
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    program = shutil.which("compute-sanitizer", path=search)
    for tool in TOOLS:
        yield tool, _verdict(program, tool) if program else "not run: compute-sanitizer is not installed"


def _verdict(program: str, tool: str) -> str:
    command = [program, "--tool", tool, "--error-exitcode", str(_FOUND)]
    command += [sys.executable, "-m", "benchmarks.gpu.run", "--small-case"]
    # One allocation per tensor: in torch's pools an access out of bounds would not be detected.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"not finished in {_SECONDS} s"
    lines = [line.strip("= ") for line in result.stdout.splitlines() if line.startswith("=========")]
    details = "" if result.returncode == 0 else " | " + " | ".join(lines[:12]) + result.stderr[-500:]
    return f"exit {result.returncode}: {lines[-1] if lines else 'no summary'}{details}"


def found_nothing(verdict: str) -> bool:
    """Whether a result is no failure: nothing found, or the tool did not finish."""
    return verdict.startswith(("exit 0", "not "))
