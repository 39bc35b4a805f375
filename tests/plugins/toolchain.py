"""Compiles the test programs once for each state of the sources."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
HARNESS = ROOT / "tests" / "plugins" / "harness"
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
