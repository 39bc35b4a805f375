"""The TensorRT plugin library: find it, build it once for each state of its sources, ask what it holds."""

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sws_export.errors import PluginError
from sws_export.progress import Progress, Silent

LIBRARY_NAME = "libsws_plugins.so"
DEFAULT_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
"""Compute capabilities, without the point, that a library is built for unless told otherwise."""

_SOURCE_PATTERNS = ("*.h", "*.cpp", "*.cu", "*.map", "*.cmake", "CMakeLists.txt")
_LOG_NAME = "build.log"
_LOCK_NAME = "build.lock"
_SCRATCH_PREFIX = ".build-"
_HASH_DIGITS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """What a plugin library says about itself.

    Attributes:
        path: The library.
        operators: Plugin names.
        namespaces: Plugin namespaces that each operator is registered under.
        plugin_version: Plugin version of every operator.
        architectures: Compute capabilities with machine code; PTX is included for the last one.
        cuda: Version of the CUDA compiler.
        tensorrt_headers: Version of the TensorRT headers.
        source_hash: Hash of the sources it was built from.
        is_current: Whether that is the hash of the sources at hand; None where there are none.
    """

    path: Path
    operators: tuple[str, ...]
    namespaces: tuple[str, ...]
    plugin_version: str
    architectures: tuple[str, ...]
    cuda: str
    tensorrt_headers: str
    source_hash: str
    is_current: bool | None


def build_plugins(
    *,
    architectures: Sequence[str] = DEFAULT_ARCHITECTURES,
    output: Path | None = None,
    tensorrt_include: Path | None = None,
    jobs: int = 1,
    force: bool = False,
    progress: Progress | None = None,
) -> PluginInfo:
    """Build the plugin library, unless these sources have been built for these architectures before.

    Of several builds of one library at a time, the first compiles and the others wait for it.

    Args:
        architectures: Compute capabilities without the point, ascending, like "90".
        output: Folder for the library; by default one in the user's cache, where `find_plugin_library` looks.
        tensorrt_include: Folder of NvInferRuntime.h; by default it is looked for, then fetched from PyPI.
        jobs: Compilations at a time; each takes about 1 GB.
        force: Build even if there is a library already.
        progress: Receives one stage for configuring, one for compiling, one for waiting if need be.

    Raises:
        PluginError: No sources, no CMake, no nvcc, no TensorRT headers, the compiler failed, or the folder
            cannot be written to.
    """
    source = _require_sources()
    for architecture in architectures:
        if not re.fullmatch(r"[1-9]\d{1,2}[af]?", architecture):
            raise PluginError(
                f"architecture '{architecture}': expected a compute capability without its point, like 90"
            )
    if not architectures:
        raise PluginError("no architecture to build for: name one or more, like 90")
    folder = output or _cached_folder(source, architectures)
    library = folder / LIBRARY_NAME
    if force or not _is_built(library, source, architectures):
        progress = progress or Silent()
        try:
            with _alone_in(folder, progress):
                # Another build may have made it meanwhile.
                if force or not _is_built(library, source, architectures):
                    _build(source, folder, architectures, tensorrt_include, jobs, progress)
        except OSError as error:
            raise PluginError(
                f"cannot write to {folder}: {error.strerror or error}; choose another folder with --output"
            ) from error
    return plugin_info(library)


def plugin_info(library: Path | None = None) -> PluginInfo:
    """What a plugin library holds; by default the one that `find_plugin_library` finds.

    Raises:
        PluginError: There is no library, or it is not one of this project's.
    """
    path = library or find_plugin_library()
    if path is None:
        raise PluginError(
            "no plugin library: build one with `sws-export plugins build`, "
            "or install with SWS_BUILD_PLUGINS=1"
        )
    facts = _read_facts(path)
    source = find_sources()
    return PluginInfo(
        path=path,
        operators=tuple(facts["operators"]),
        namespaces=tuple(facts["namespaces"]),
        plugin_version=facts["plugin_version"],
        architectures=tuple(facts["architectures"].split(",")),
        cuda=facts["cuda"],
        tensorrt_headers=facts["tensorrt_headers"],
        source_hash=facts["source_hash"],
        is_current=None if source is None else facts["source_hash"] == source_hash(source),
    )


def find_plugin_library() -> Path | None:
    """The library installed with the package, else the newest one built from the sources at hand."""
    if installed := _installed_library():
        return installed
    source = find_sources()
    if source is None:
        return None
    built = _cache_root().glob(f"{source_hash(source)}-*/{LIBRARY_NAME}")
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


def find_sources() -> Path | None:
    """The folder of the plugins' CMakeLists.txt: in a checkout, or installed with the package."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "plugins", package / "plugins"):
        if (folder / "CMakeLists.txt").is_file() and (folder / "registry.cpp").is_file():
            return folder
    return None


def source_hash(source: Path) -> str:
    """Hash of the sources' names and contents, as plugins/cmake/SourceHash.cmake computes it."""
    files = {path.relative_to(source).as_posix() for name in _SOURCE_PATTERNS for path in source.rglob(name)}
    lines = [f"{name} {hashlib.sha256((source / name).read_bytes()).hexdigest()}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:_HASH_DIGITS]


def _installed_library() -> Path | None:
    # Not beside this file in an editable install: the build's part of the package lies elsewhere.
    library = importlib.resources.files("sws_export") / "_plugins" / LIBRARY_NAME
    return Path(str(library)) if library.is_file() else None


def _require_sources() -> Path:
    if not sys.platform.startswith("linux"):
        raise PluginError(f"the plugin library is built on Linux only, found {sys.platform}")
    source = find_sources()
    if source is None:
        raise PluginError(
            "the plugins' sources are not part of this installation: run from a checkout of the repository, "
            "or install with SWS_BUILD_PLUGINS=1"
        )
    return source


def _cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "sws-export" / "plugins"


def _cached_folder(source: Path, architectures: Sequence[str]) -> Path:
    return _cache_root() / f"{source_hash(source)}-{'-'.join(architectures)}"


def _is_built(library: Path, source: Path, architectures: Sequence[str]) -> bool:
    if not library.is_file():
        return False
    try:
        facts = _read_facts(library)
    except PluginError:
        return False
    built = (facts["source_hash"], facts["architectures"])
    return built == (source_hash(source), ",".join(architectures))


def _read_facts(library: Path) -> dict[str, str]:
    if not library.is_file():
        raise PluginError(f"no plugin library at {library}; build one with `sws-export plugins build`")
    try:
        build_info = ctypes.CDLL(str(library)).sws_plugins_build_info
    except (OSError, AttributeError) as error:
        raise PluginError(
            f"{library} is no plugin library of this project, or is damaged ({error}); build it again with "
            "`sws-export plugins build --force`"
        ) from error
    build_info.restype = ctypes.c_char_p
    facts: dict[str, str] = json.loads(build_info())
    return facts


@contextlib.contextmanager
def _alone_in(folder: Path, progress: Progress) -> Iterator[None]:
    """Make the folder and keep other builds out of it; a build that died keeps nobody out."""
    import fcntl  # Linux, which the caller has made sure of.

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with progress.stage("waiting for another build of the plugin library"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(
    source: Path,
    folder: Path,
    architectures: Sequence[str],
    tensorrt_include: Path | None,
    jobs: int,
    progress: Progress,
) -> None:
    cmake = _require_cmake()
    log = folder / _LOG_NAME
    log.unlink(missing_ok=True)
    for left_behind in folder.glob(f"{_SCRATCH_PREFIX}*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    # Compilers that outlive an interrupt by a moment may still write while it is removed.
    with tempfile.TemporaryDirectory(
        prefix=_SCRATCH_PREFIX, dir=folder, ignore_cleanup_errors=True
    ) as scratch:
        configure = [
            *(cmake, "-S", str(source), "-B", scratch),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DSWS_ARCHITECTURES={';'.join(architectures)}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        if tensorrt_include is not None:
            configure.append(f"-DSWS_TENSORRT_INCLUDE_DIR={tensorrt_include}")
        with progress.stage("configuring the plugin library"):
            _run(configure, log)
        with progress.stage(f"compiling the plugin library for {', '.join(architectures)}"):
            _run([cmake, "--build", scratch, "--parallel", str(jobs)], log)
        (Path(scratch) / LIBRARY_NAME).replace(folder / LIBRARY_NAME)


def _require_cmake() -> str:
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cmake = shutil.which("cmake", path=search)
    if cmake is None:
        raise PluginError(
            "CMake was not found: install it (3.24 or later), for example with `pip install cmake`"
        )
    return cmake


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as output:
        print("$", *command, file=output, flush=True)
        result = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if result.returncode != 0:
        raise PluginError(f"the plugin library was not built: {_reason(log.read_text())} (whole log: {log})")


def _reason(log: str) -> str:
    """CMake's own error message, else the first compiler error, else the last line."""
    if match := re.search(r"CMake Error at .*?:\n\n?((?:  .*\n?|\n)+)", log):
        return " ".join(match.group(1).split())
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)), lines[-1])
