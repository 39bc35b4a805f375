"""The plugin kernels on torch tensors: compiled with nvcc for this GPU, called through ctypes."""

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "plugins/banded_transport/kernel.cu",
    "plugins/key_guard/kernel.cu",
    "benchmarks/gpu/kernels_api.cu",
)
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class KernelError(RuntimeError):
    """The kernels cannot be compiled, or CUDA rejected a launch."""


def find_nvcc() -> str:
    """Path of nvcc, from PATH or the usual directories."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), f"{home}/bin", "/usr/local/cuda/bin"])
    nvcc = shutil.which("nvcc", path=search)
    if nvcc is None:
        raise KernelError("nvcc was not found: put the CUDA toolkit's bin folder on the PATH")
    return nvcc


def compile_kernels(architecture: str, folder: Path) -> Path:
    """Compile the C functions of kernels_api.cu to a shared library, once per state of the sources.

    Args:
        architecture: Compute capability without the point, like "90".
        folder: Directory of the library and of nvcc's output (`build.log`).
    """
    plugins = ROOT / "plugins"
    command = [find_nvcc(), "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas=-v", "-lineinfo"]
    command += ["-shared", "-Xcompiler=-fPIC", "-cudart=static", "--threads=0", f"-I{plugins}"]
    digest = hashlib.sha256("\0".join(command).encode())
    for path in sorted([*plugins.rglob("*.h"), *plugins.rglob("*.cu"), ROOT / SOURCES[-1]]):
        digest.update(path.read_bytes())
    library = folder / f"kernels-{architecture}-{digest.hexdigest()[:12]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(".partial")
        result = subprocess.run(
            [*command, *(str(ROOT / source) for source in SOURCES), "-o", str(partial)],
            capture_output=True,
            text=True,
            check=False,
        )
        (folder / "build.log").write_text(result.stdout + result.stderr)
        if result.returncode != 0:
            raise KernelError(f"nvcc failed; see {folder / 'build.log'}:\n{result.stderr[-2000:]}")
        partial.replace(library)
    return library


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    if tensor is None:
        return ctypes.c_void_p(None)
    if not tensor.is_contiguous():
        raise KernelError("the kernels take contiguous tensors")
    return ctypes.c_void_p(tensor.data_ptr())


def _stream(tensor: torch.Tensor) -> ctypes.c_void_p:
    if not tensor.is_cuda:
        return ctypes.c_void_p(None)
    return ctypes.c_void_p(torch.cuda.current_stream(tensor.device).cuda_stream)


class Kernels:
    """Both kernels; calls run on torch's current stream and can be captured in a CUDA graph."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.sws_key_guard_workspace.restype = ctypes.c_size_t
        self._library.sws_error_name.restype = ctypes.c_char_p

    def banded_transport(
        self,
        weights: torch.Tensor,
        tensors: list[torch.Tensor],
        radius: int,
        outputs: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """P x for one or two tensors x [B, T, C] with weights [B, K(radius), H, W]."""
        results = outputs or [torch.empty_like(x) for x in tensors]
        second = (tensors[1], results[1]) if len(tensors) == 2 else (None, None)
        batch, _, height, width = weights.shape
        self._check(
            self._library.sws_banded_transport(
                _pointer(weights),
                _pointer(tensors[0]),
                _pointer(second[0]),
                _pointer(results[0]),
                _pointer(second[1]),
                *(batch, height, width, tensors[0].shape[2], radius, FORMATS[tensors[0].dtype]),
                _stream(weights),
            )
        )
        return results

    def guard_workspace(self, q: torch.Tensor, heads: int, bisection_steps: int) -> torch.Tensor:
        """Memory for `key_guard` on tensors shaped like q."""
        size = self._library.sws_key_guard_workspace(q.shape[0], q.shape[1], heads, bisection_steps)
        return torch.empty(size, dtype=torch.uint8, device=q.device)

    def key_guard(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        k_perm: torch.Tensor,
        scalars: list[torch.Tensor],
        heads: int,
        *,
        key_cap: float = 0.3,
        bisection_steps: int = 7,
        workspace: torch.Tensor | None = None,
        outputs: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """alpha_k and a_v, [B], from tau_q, amplitude, kappa, key_gate, value_gain, each [B] float32."""
        batch, tokens, channels = q.shape
        head_size = channels // heads
        memory = workspace if workspace is not None else self.guard_workspace(q, heads, bisection_steps)
        results = outputs or [torch.empty(batch, device=q.device) for _ in range(2)]
        self._check(
            self._library.sws_key_guard(
                *(_pointer(q), _pointer(k), _pointer(k_perm)),
                (ctypes.c_void_p * 5)(*(tensor.data_ptr() for tensor in scalars)),
                (ctypes.c_void_p * 2)(*(tensor.data_ptr() for tensor in results)),
                *(batch, tokens, k.shape[1], heads, head_size),
                ctypes.c_float(1 / math.sqrt(head_size)),
                ctypes.c_float(key_cap),
                *(bisection_steps, FORMATS[q.dtype]),
                _pointer(memory),
                _stream(q),
            )
        )
        return results

    def _check(self, error: int) -> None:
        if error != 0:
            raise KernelError(f"CUDA: {self._library.sws_error_name(error).decode()}")


def build_kernels(folder: Path) -> Kernels:
    """The kernels for the current GPU; `folder` keeps the library and nvcc's output."""
    major, minor = torch.cuda.get_device_capability()
    return Kernels(compile_kernels(f"{major}{minor}", folder))
