"""The TensorRT plugin library: find it, build it from source, and read its build information."""

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

from sws_export.engines.library_trust import check_library, digest_file, library_digest
from sws_export.errors import PluginError
from sws_export.files import user_cache
from sws_export.progress import Progress, SilentProgress

LIBRARY_NAME = "libsws_plugins.so"
DEFAULT_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
"""Default compute capabilities, without the point, that a library is built for."""

_SOURCE_PATTERNS = ("*.h", "*.cpp", "*.cu", "*.map", "*.cmake", "CMakeLists.txt")
_LOG_NAME = "build.log"
_LOCK_NAME = "build.lock"
_SCRATCH_PREFIX = ".build-"
_HASH_DIGITS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """Build information of a plugin library.

    Attributes:
        path: The library.
        operators: Plugin names.
        namespaces: Plugin namespaces in which each operator is registered.
        plugin_version: Plugin version of all operators.
        architectures: Compute capabilities with machine code; 90 and the last one also have PTX.
        cuda: Version of the CUDA compiler.
        tensorrt_headers: Version of the TensorRT headers.
        source_hash: Hash of the sources that the library was built from.
        is_current: Whether this is the hash of the available sources; None without sources.
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
    """Build the plugin library, unless it was already built from these sources for these architectures.

    Of several concurrent builds of one library, the first compiles and the others wait for it.

    Args:
        architectures: Compute capabilities without the point, ascending, such as "90".
        output: Folder for the library; by default one in the cache of the user, which
            `find_plugin_library` searches.
        tensorrt_include: Folder of NvInferRuntime.h; by default it is searched for, then downloaded from
            PyPI.
        jobs: Number of parallel compilations; each takes about 1 GB.
        force: Build even if the library exists.
        progress: Receives the stages.

    Raises:
        PluginError: Sources, CMake, nvcc or the TensorRT headers are missing, the compiler failed, or the
            folder is not writable.
    """
    source = _require_sources()
    for architecture in architectures:
        if not re.fullmatch(r"[1-9]\d{1,2}[af]?", architecture):
            raise PluginError(
                f"architecture '{architecture}': expected a compute capability without the point, such as 90"
            )
    if not architectures:
        raise PluginError("no architecture given: expected one or more compute capabilities, such as 90")
    folder = output or _cached_folder(source, architectures)
    library = folder / LIBRARY_NAME
    if force or not _is_built(library, source, architectures):
        progress = progress or SilentProgress()
        try:
            with _build_lock(folder, progress):
                # Another process may have built it in the meantime.
                if force or not _is_built(library, source, architectures):
                    _build(source, folder, architectures, tensorrt_include, jobs, progress)
        except OSError as error:
            raise PluginError(
                f"cannot write to {folder}: {error.strerror or error}; choose another folder with --output"
            ) from error
    return plugin_info(library)


def plugin_info(library: Path | None = None) -> PluginInfo:
    """Build information of a plugin library.

    Args:
        library: The library; by default the one that `find_plugin_library` finds.

    Raises:
        PluginError: There is no library, it is not a plugin library of this project, others can write to it,
            or it is not the file that was built.
    """
    path = library or find_plugin_library()
    if path is None:
        raise PluginError(
            "no plugin library: build one with `sws-export plugins build`, "
            "or install with SWS_BUILD_PLUGINS=1"
        )
    build_info = _read_build_info(path)
    source = find_sources()
    return PluginInfo(
        path=path,
        operators=tuple(build_info["operators"]),
        namespaces=tuple(build_info["namespaces"]),
        plugin_version=build_info["plugin_version"],
        architectures=tuple(build_info["architectures"].split(",")),
        cuda=build_info["cuda"],
        tensorrt_headers=build_info["tensorrt_headers"],
        source_hash=build_info["source_hash"],
        is_current=None if source is None else build_info["source_hash"] == source_hash(source),
    )


def find_plugin_library() -> Path | None:
    """The library installed with the package, otherwise the newest one built from the available sources."""
    if installed := _installed_library():
        return installed
    source = find_sources()
    if source is None:
        return None
    built = _cache_root().glob(f"{source_hash(source)}-*/{LIBRARY_NAME}")
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


def find_sources() -> Path | None:
    """The folder with the CMakeLists.txt of the plugins: in a checkout, or installed with the package."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "plugins", package / "plugins"):
        if (folder / "CMakeLists.txt").is_file() and (folder / "registry.cpp").is_file():
            return folder
    return None


def source_hash(source: Path) -> str:
    """Hash of the names and contents of the sources, as in plugins/cmake/SourceHash.cmake."""
    files = {path.relative_to(source).as_posix() for name in _SOURCE_PATTERNS for path in source.rglob(name)}
    lines = [f"{name} {hashlib.sha256((source / name).read_bytes()).hexdigest()}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:_HASH_DIGITS]


def _installed_library() -> Path | None:
    # In an editable install, build results are not in the folder of the sources.
    library = importlib.resources.files("sws_export") / "_plugins" / LIBRARY_NAME
    return Path(str(library)) if library.is_file() else None


def _require_sources() -> Path:
    if not sys.platform.startswith("linux"):
        raise PluginError(f"the plugin library is built on Linux only, found {sys.platform}")
    source = find_sources()
    if source is None:
        raise PluginError(
            "the plugin sources are not part of this installation: run from a checkout of the repository, "
            "or install with SWS_BUILD_PLUGINS=1"
        )
    return source


def _cache_root() -> Path:
    return user_cache() / "plugins"


def _cached_folder(source: Path, architectures: Sequence[str]) -> Path:
    return _cache_root() / f"{source_hash(source)}-{'-'.join(architectures)}"


def _is_built(library: Path, source: Path, architectures: Sequence[str]) -> bool:
    if not library.is_file():
        return False
    try:
        build_info = _read_build_info(library)
    except PluginError:
        return False
    built = (build_info["source_hash"], build_info["architectures"])
    return built == (source_hash(source), ",".join(architectures))


def _read_build_info(library: Path) -> dict[str, str]:
    if not library.is_file():
        raise PluginError(f"no plugin library at {library}; build one with `sws-export plugins build`")
    check_library(library)
    try:
        function = ctypes.CDLL(str(library)).sws_plugins_build_info
    except (OSError, AttributeError) as error:
        raise PluginError(
            f"{library} is not a plugin library of this project or is damaged ({error}); build it again with "
            "`sws-export plugins build --force`"
        ) from error
    function.restype = ctypes.c_char_p
    build_info: dict[str, str] = json.loads(function())
    return build_info


@contextlib.contextmanager
def _build_lock(folder: Path, progress: Progress) -> Iterator[None]:
    """Create the folder and lock it; the lock is released when the process ends for any reason."""
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / _LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        with progress.stage("wait for another build of the plugin library"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


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
    # Left by killed builds.
    for orphan in folder.glob(f"{_SCRATCH_PREFIX}*"):
        shutil.rmtree(orphan, ignore_errors=True)
    # After an interrupt, compilers may still write while the folder is removed.
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
        with progress.stage("configure the plugin library"):
            _run(configure, log)
        with progress.stage(f"compile the plugin library for {', '.join(architectures)}"):
            _run([cmake, "--build", scratch, "--parallel", str(jobs)], log)
        built = Path(scratch) / LIBRARY_NAME
        digest = digest_file(built)
        digest.write_text(f"{library_digest(built)}\n", "ascii")
        # A library whose digest is another one is built again.
        digest.replace(digest_file(folder / LIBRARY_NAME))
        built.replace(folder / LIBRARY_NAME)


def _require_cmake() -> str:
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cmake = shutil.which("cmake", path=search)
    if cmake is None:
        raise PluginError(
            "CMake was not found: install it (3.24 or later), for example with `pip install cmake`"
        )
    return cmake


def _run(command: Sequence[str], log: Path) -> None:
    # Without the number of jobs of a make that runs this.
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    with log.open("a", encoding="utf-8") as output:
        print("$", *command, file=output, flush=True)
        result = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, check=False, env=environment
        )
    if result.returncode != 0:
        raise PluginError(f"the plugin library was not built: {_reason(log.read_text())} (log: {log})")


def _reason(log: str) -> str:
    """The error message of CMake, otherwise the first compiler error, otherwise the last line."""
    if match := re.search(r"CMake Error at .*?:\n\n?((?:  .*\n?|\n)+)", log):
        return " ".join(match.group(1).split())
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)), lines[-1])
