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
    """A little of everything: ragged shapes, every number format, both tensor-core reaches, every launch.

    Tensors are made on the CPU: the sanitizer is slow, and torch's kernels are not what it is to watch.
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
    """Each tool and its verdict on the small case."""
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    program = shutil.which("compute-sanitizer", path=search)
    for tool in TOOLS:
        yield tool, _verdict(program, tool) if program else "not run: compute-sanitizer is not installed"


def _verdict(program: str, tool: str) -> str:
    command = [program, "--tool", tool, "--error-exitcode", str(_FOUND)]
    command += [sys.executable, "-m", "benchmarks.gpu.run", "--small-case"]
    # Every tensor gets an allocation of its own: in torch's pools an access beyond one would go unseen.
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
    """Whether a verdict is no reason to fail: nothing found, or the tool did not get to the end."""
    return verdict.startswith(("exit 0", "not "))
