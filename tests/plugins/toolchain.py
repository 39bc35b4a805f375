"""Compiles the test programs: once for each state of their sources, whichever worker needs them first."""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest

from sws_export.engines.plugin_library import build_plugins, source_hash
from sws_export.errors import PluginError
from sws_export.files import user_cache

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
HARNESS = ROOT / "tests" / "plugins" / "harness"
CONTRACT = ROOT / "tests" / "plugins" / "contract"
LAUNCHES = ROOT / "tests" / "plugins" / "launches"
BUILDS = Path(os.environ.get("SWS_TEST_BUILDS") or user_cache() / "test-builds")
"""Everything compiled or fetched; keyed by content, so that runs, workers and checkouts share it."""
SANITIZER_FLAGS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
STRICT_FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Wconversion", "-Werror")


def require_compiler() -> str:
    """Path of the C++ compiler ($CXX, else g++ or clang++); skips the test if there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    pytest.skip("no C++ compiler: set CXX or install g++")


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[bool]:
    """Hold the lock of `target`; whether it is still to be made.

    Of several workers the first one makes the target while the others wait here.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.with_name(f"{target.name}.lock")):
        yield not target.exists()


def source_key(files: Iterable[Path], command: Sequence[str]) -> str:
    """Hash of a command line and of the names and contents of all files that it may read."""
    digest = hashlib.sha256("\0".join(command).encode())
    for file in sorted(files):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Objects:
    """Compiled C++ sources, in a folder that is keyed by everything they depend on."""

    folder: Path
    files: tuple[Path, ...]
    flags: tuple[str, ...]

    def link(self, name: str, *flags: str) -> Path:
        """The program or shared library `name` of these objects."""
        target = self.folder / name
        with exclusive(target) as missing:
            if missing:
                partial = target.with_name(f"{name}.partial")
                run([require_compiler(), *self.flags, *map(str, self.files), *flags, "-o", str(partial)])
                partial.replace(target)
        return target


def compile_objects(
    name: str, flags: Sequence[str], sources: Sequence[Path], headers: Iterable[Path]
) -> Objects:
    """Compiles each source, several at a time."""
    command = [require_compiler(), *STRICT_FLAGS, *flags]
    folder = BUILDS / f"{name}-{source_key([*sources, *headers], command)}"
    files = tuple(folder / f"{source.stem}.o" for source in sources)

    def compile_one(source: Path, target: Path) -> None:
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        run([*command, *language, "-c", str(source), "-o", str(target)])

    with exclusive(folder) as missing:
        if missing:
            partial = folder.with_name(f"{folder.name}.partial")
            partial.mkdir(exist_ok=True)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, sources, [partial / file.name for file in files]))
            partial.rename(folder)
    return Objects(folder, files, tuple(flags))


def build_harness(*, sanitized: bool) -> Path:
    """The program that runs kernel bodies on the CPU; see harness/main.cpp."""
    return _harness_objects(sanitized=sanitized).link("harness")


def build_emulated_kernels() -> Path:
    """The C functions of benchmarks/gpu/kernels_api.cu on the CPU: kernel bodies on the emulated block."""
    include = ["-isystem", str(cuda_headers())]
    sources = [HARNESS / "library" / "emulated_launches.cpp", ROOT / "benchmarks" / "gpu" / "kernels_api.cu"]
    flags = ["-O2", "-fPIC", *include, f"-I{HARNESS}", f"-I{PLUGINS}"]
    own = compile_objects("emulated-kernels", flags, sources, [*PLUGINS.rglob("*.h"), *HARNESS.glob("*.h")])
    harness = _harness_objects(sanitized=False)
    objects = [str(file) for file in harness.files if file.stem != "main"]
    return own.link("libkernels.so", "-shared", *objects)


def _harness_objects(*, sanitized: bool) -> Objects:
    # nvcc contracts a * b + c too; without it the CPU would be slightly more exact than the device.
    flags = [*(("-O0", *SANITIZER_FLAGS) if sanitized else ("-O2", "-fPIC")), "-ffp-contract=fast"]
    return compile_objects(
        "harness-sanitized" if sanitized else "harness",
        [*flags, f"-I{HARNESS}", f"-I{PLUGINS}"],
        sorted(HARNESS.glob("*.cpp")),
        [*PLUGINS.rglob("*.h"), *HARNESS.glob("*.h")],
    )


def build_contract_program() -> Path:
    """The program that calls the plugin library as TensorRT does; see contract/main.cpp."""
    include = ["-isystem", str(tensorrt_headers()), "-isystem", str(cuda_headers())]
    flags = ["-Wno-deprecated-declarations", *include]
    objects = compile_objects("contract", flags, sorted(CONTRACT.glob("*.cpp")), CONTRACT.glob("*.h"))
    # Exported symbols: the library looks up getInferLibVersion in the program.
    return objects.link("contract", "-rdynamic", "-ldl")


def build_launch_program() -> Path:
    """The program that runs the host side of the launches; see launches/main.cpp."""
    flags = ["-O1", "-pthread", f"-I{HARNESS}", f"-I{PLUGINS}", "-isystem", str(cuda_headers())]
    headers = [*PLUGINS.rglob("*.h"), *HARNESS.glob("*.h")]
    return compile_objects("launches", flags, sorted(LAUNCHES.glob("*.cpp")), headers).link("launches")


def run(command: Sequence[str], **options: object) -> str:
    """Runs a command; its output, or a test failure that shows it."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if result.returncode != 0:
        pytest.fail(f"{' '.join(command)}\nexit {result.returncode}\n{result.stdout}{result.stderr}")
    return str(result.stdout) + str(result.stderr)


def build_library(architectures: Sequence[str] = ("90",)) -> Path:
    """The plugin library, by default for one architecture; skips where a tool is missing."""
    folder = BUILDS / f"library-{source_hash(PLUGINS)}-{'-'.join(architectures)}"
    try:
        return build_plugins(architectures=architectures, output=folder, jobs=os.cpu_count() or 1).path
    except PluginError as error:
        if "not found" in str(error):
            pytest.skip(str(error))
        raise


def tensorrt_headers() -> Path:
    """Folder of NvInferRuntime.h: that of an SDK, else of the wheel that plugins/cmake fetches too."""
    for folder in (Path("/usr/include"), *Path("/usr/include").glob("*-linux-gnu")):
        if (folder / "NvInferRuntime.h").is_file():
            return folder
    return fetch_from_pypi("kernel-lens==2.0.1") / "kernel_lens" / "include" / "tensorrt"


def cuda_headers() -> Path:
    """Folder of cuda_runtime_api.h, beside the nvcc on the path or in the usual place."""
    nvcc = shutil.which("nvcc")
    beside = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for root in (*beside, Path("/usr/local/cuda")):
        if (root / "include" / "cuda_runtime_api.h").is_file():
            return root / "include"
    pytest.skip("no CUDA headers: install a CUDA toolkit")


def cuobjdump(*arguments: str) -> str:
    """Output of NVIDIA's disassembler, taken from the path, from the CUDA toolkit, or from PyPI."""
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    if not shutil.which("nvdisasm", path=search) or not shutil.which("cuobjdump", path=search):
        for package in ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"):
            program = next(fetch_from_pypi(package).glob("nvidia/*/bin/*"))
            program.chmod(0o755)
            search = os.pathsep.join([str(program.parent), search])
    program_path = shutil.which("cuobjdump", path=search)
    assert program_path is not None
    return run([program_path, *arguments], env=os.environ | {"PATH": search})


def fetch_from_pypi(requirement: str) -> Path:
    """The unpacked wheel of a package whose files are needed; skips the test if it cannot be fetched."""
    folder = BUILDS / requirement.replace("==", "-")
    with exclusive(folder) as missing:
        if missing:
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
            result = subprocess.run(
                [*command, requirement, "--dest", str(partial)], capture_output=True, text=True, check=False
            )
            if result.returncode != 0:
                pytest.skip(f"{requirement} cannot be fetched: {result.stderr.strip().splitlines()[-1]}")
            for wheel in partial.glob("*.whl"):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(partial)
            partial.rename(folder)
    return folder
