"""Compiles the test programs once for each state of the sources."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from sws_export.engines.plugin_library import build_plugins, source_hash
from sws_export.errors import PluginError

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
HARNESS = ROOT / "tests" / "plugins" / "harness"
CONTRACT = ROOT / "tests" / "plugins" / "contract"
BUILDS = ROOT / "build" / "tests-plugins"
SANITIZER_FLAGS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
STRICT_FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Wconversion", "-Werror")


def require_compiler() -> str:
    """Path of the C++ compiler ($CXX, else g++ or clang++); skips the test where there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    pytest.skip("no C++ compiler: set CXX or install g++")


def source_key(files: Iterable[Path], command: Sequence[str]) -> str:
    """Hash of a command line and of the contents of all files it may read."""
    digest = hashlib.sha256("\0".join(command).encode())
    for file in sorted(files):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def build_harness(*, sanitized: bool) -> Path:
    """The program that runs kernel bodies on the CPU; see harness/main.cpp."""
    compiler = require_compiler()
    flags = [*STRICT_FLAGS, *(("-O0", *SANITIZER_FLAGS) if sanitized else ("-O2",))]
    # nvcc contracts a * b + c as well; without it the CPU would be a little more exact than the device.
    command = [compiler, *flags, "-ffp-contract=fast", f"-I{HARNESS}", f"-I{PLUGINS}"]
    headers = [*PLUGINS.rglob("*.h"), *HARNESS.glob("*.h")]
    sources = sorted(HARNESS.glob("*.cpp"))
    program = BUILDS / f"harness-{source_key([*headers, *sources], command)}"
    if not program.exists():
        BUILDS.mkdir(parents=True, exist_ok=True)
        partial = program.with_suffix(f".{os.getpid()}")
        run([*command, *map(str, sources), "-o", str(partial)])
        partial.replace(program)
    return program


def run(command: Sequence[str], **options: object) -> str:
    """Runs a command; its output, or a test failure that shows it."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if result.returncode != 0:
        pytest.fail(f"{' '.join(command)}\nexit {result.returncode}\n{result.stdout}{result.stderr}")
    return str(result.stdout) + str(result.stderr)


def build_library(architectures: Sequence[str] = ("90",)) -> Path:
    """The plugin library for one architecture, unless more are asked for; skips where a tool is missing."""
    folder = BUILDS / f"library-{source_hash(PLUGINS)}-{'-'.join(architectures)}"
    try:
        return build_plugins(architectures=architectures, output=folder).path
    except PluginError as error:
        if "not found" in str(error):
            pytest.skip(str(error))
        raise


def build_contract_program() -> Path:
    """The program that plays TensorRT's part; see contract/main.cpp."""
    headers, cuda = tensorrt_headers(), cuda_headers()
    warnings = [*STRICT_FLAGS, "-Wno-deprecated-declarations"]
    command = [require_compiler(), *warnings, "-isystem", str(headers), "-isystem", str(cuda)]
    sources = sorted(CONTRACT.glob("*.cpp"))
    program = BUILDS / f"contract-{source_key([*sources, *CONTRACT.glob('*.h')], command)}"
    if not program.exists():
        BUILDS.mkdir(parents=True, exist_ok=True)
        partial = program.with_suffix(f".{os.getpid()}")
        run([*command, *map(str, sources), "-ldl", "-o", str(partial)])
        partial.replace(program)
    return program


def tensorrt_headers() -> Path:
    """Folder of NvInferRuntime.h: an SDK's, else those of the wheel that plugins/cmake fetches as well."""
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
    """What NVIDIA's disassembler prints; taken from the path, from the CUDA toolkit, or from PyPI."""
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
    """The unpacked wheel of a package that is needed for its files only; skips where it cannot be had."""
    folder = BUILDS / requirement.replace("==", "-")
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
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
