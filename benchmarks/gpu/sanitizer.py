"""compute-sanitizer on a small case of every kernel.

`python -m benchmarks.gpu.sanitizer FOLDER` computes the case, with the kernels of a build folder.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.kernels import ROOT, Kernels, build_kernels
from benchmarks.gpu.parts import stop_group
from benchmarks.gpu.references import make_guard_inputs, make_weights, one_hot_guard_inputs

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_FOUND = 9


def run_small_case(kernels: Kernels, device: str) -> None:
    """Ragged shapes, every number format, both tensor-core reaches, every launch.

    Tensors are created on the CPU: the sanitizer is slow, and torch's kernels are not to be checked.
    """
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for channels, radius in ((40, 8), (40, 4), (33, 8)):
            weights = make_weights(2, (9, 11), radius, device)
            x = torch.randn(2, 99, channels).to(dtype).to(device)
            kernels.banded_transport(weights, [x, x], radius)
        for head_size in (40, 41):
            q, k, k_perm, scalars = make_guard_inputs(
                2, 99, 2 * head_size, dtype, device, kappa=1e-3, sharpness=2
            )
            kernels.key_guard(q, k, k_perm, scalars, 2)
        # Logits of this size need the search rounds.
        q, k, k_perm, scalars = one_hot_guard_inputs(3000.0, dtype, device)
        kernels.key_guard(q, k, k_perm, scalars, 1)
    torch.cuda.synchronize()


def sanitize(folder: Path, seconds: float, least: float = 5.0) -> Iterator[tuple[str, str]]:
    """Each tool and its verdict on the small case, all of them within `seconds`.

    `folder` is that of the kernels. A tool with less than `least` seconds left is not run.
    """
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    program = shutil.which("compute-sanitizer", path=search)
    deadline = time.monotonic() + seconds
    for done, tool in enumerate(TOOLS):
        if program is None:
            yield tool, "not run: compute-sanitizer is not installed"
            continue
        left = (deadline - time.monotonic()) / (len(TOOLS) - done)
        yield tool, _verdict(program, tool, folder, left) if left >= least else "not run: no time left"


def _verdict(program: str, tool: str, folder: Path, seconds: float) -> str:
    command = [program, "--tool", tool, "--error-exitcode", str(_FOUND)]
    command += [sys.executable, "-m", "benchmarks.gpu.sanitizer", str(folder)]
    # Every tensor gets its own allocation: in torch's memory pools an access beyond a tensor is not an error.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # A group of its own: the tool starts further processes, which must end with it.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True, **pipes
    ) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"not finished in {seconds:.0f} s"
        finally:
            stop_group(process.pid)
    lines = [line.strip("= ") for line in output.splitlines() if line.startswith("=========")]
    details = "" if process.returncode == 0 else " | " + " | ".join(lines[:12]) + errors[-500:]
    return f"exit {process.returncode}: {lines[-1] if lines else 'no summary'}{details}"


def found_nothing(verdict: str) -> bool:
    """Whether a verdict is no failure: nothing found, or the tool did not finish."""
    return verdict.startswith(("exit 0", "not "))


if __name__ == "__main__":
    run_small_case(build_kernels(Path(sys.argv[1])), "cuda")
