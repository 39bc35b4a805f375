"""Build and build information of the plugin library, as far as possible without a CUDA compiler."""

import importlib.resources
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sws_export.engines import plugin_library as plugin_build
from sws_export.engines.library_trust import digest_file, library_digest
from sws_export.engines.plugin_library import (
    LIBRARY_NAME,
    build_plugins,
    find_plugin_library,
    plugin_info,
    source_hash,
)
from sws_export.errors import PluginError

BUILD_INFO = (
    r"{\"operators\": [\"BandedTransport\", \"KeyGuard\"], \"namespaces\": [\"sws\", \"\"], "
    r"\"plugin_version\": \"1\", \"architectures\": \"80,90\", \"source_hash\": \"HASH\", "
    r"\"cuda\": \"13.0\", \"tensorrt_headers\": \"10.14.1\"}"
)

FAKE_CMAKE = """#!/bin/sh
echo "cmake was called" >> CALLS
case "$1" in
-S) mkdir -p "$4" && exit 0 ;;
--build) cp PREBUILT "$2/libsws_plugins.so" && exit 0 ;;
esac
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # The package has no library.
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    return tmp_path / "cache" / "sws-export" / "plugins"


def make_cmake(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "cmake"
    program.write_text(script)
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: str(program))


@pytest.fixture
def prebuilt(tmp_path: Path) -> Path:
    """A library with build information and nothing else."""
    from tests.plugins.toolchain import require_compiler, run

    source = plugin_build.find_sources()
    assert source is not None
    info = BUILD_INFO.replace("HASH", source_hash(source))
    code = tmp_path / "info.c"
    code.write_text(f'const char* sws_plugins_build_info(void) {{ return "{info}"; }}\n')
    library = tmp_path / "prebuilt.so"
    run([require_compiler(), "-x", "c", "-shared", "-fPIC", str(code), "-o", str(library)])
    return library


@pytest.fixture
def fake_cmake(tmp_path: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake CMake that installs the prebuilt library; returns the file with its calls."""
    calls = tmp_path / "calls"
    script = FAKE_CMAKE.replace("CALLS", str(calls)).replace("PREBUILT", str(prebuilt))
    make_cmake(tmp_path, script, monkeypatch)
    return calls


def test_a_second_build_is_skipped(cache: Path, fake_cmake: Path) -> None:
    first = build_plugins(architectures=["80", "90"])
    second = build_plugins(architectures=["80", "90"])

    assert first == second
    assert first.path.parent.parent == cache
    assert first.architectures == ("80", "90")
    assert first.is_current is True
    assert len(fake_cmake.read_text().splitlines()) == 2
    assert find_plugin_library() == first.path
    assert [path.name for path in first.path.parent.iterdir() if path.name.startswith(".build")] == []


def test_force_builds_again(cache: Path, fake_cmake: Path) -> None:
    build_plugins(architectures=["80", "90"])
    build_plugins(architectures=["80", "90"], force=True)

    assert len(fake_cmake.read_text().splitlines()) == 4


def test_a_damaged_library_is_built_again(tmp_path: Path, fake_cmake: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LIBRARY_NAME).write_bytes(b"not an ELF file")

    info = build_plugins(architectures=["80", "90"], output=tmp_path / "out")

    assert info.path == tmp_path / "out" / LIBRARY_NAME


def test_concurrent_builds_compile_once(cache: Path, tmp_path: Path, fake_cmake: Path) -> None:
    slow = tmp_path / "cmake"
    slow.write_text(slow.read_text().replace("mkdir -p", "sleep 0.5 && mkdir -p"))
    with ThreadPoolExecutor() as pool:
        infos = list(pool.map(lambda _: build_plugins(architectures=["80", "90"]), range(2)))

    assert infos[0] == infos[1]
    assert len(fake_cmake.read_text().splitlines()) == 2


def test_scratch_of_a_killed_build_is_removed(tmp_path: Path, fake_cmake: Path) -> None:
    orphan = tmp_path / "out" / ".build-killed"
    orphan.mkdir(parents=True)

    build_plugins(architectures=["80", "90"], output=tmp_path / "out")

    assert not orphan.exists()


@pytest.mark.parametrize("place", ["a file/out", "/proc/out"])
def test_a_folder_that_is_not_writable(tmp_path: Path, fake_cmake: Path, place: str) -> None:
    (tmp_path / "a file").write_text("")

    with pytest.raises(PluginError, match=r"cannot write to .*out: .*; choose another folder with --output"):
        build_plugins(architectures=["80", "90"], output=tmp_path / place)


@pytest.mark.parametrize("architecture", ["9.0", "sm_90", "", "1234"])
def test_a_malformed_architecture(architecture: str) -> None:
    with pytest.raises(PluginError, match=r"expected a compute capability without the point, such as 90"):
        build_plugins(architectures=[architecture])


def test_no_architecture() -> None:
    with pytest.raises(PluginError, match="no architecture"):
        build_plugins(architectures=[])


def test_the_message_of_cmake_is_the_reason(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = (
        "CMake Error at FindCudaCompiler.cmake:30 (message):\n"
        "  The CUDA compiler nvcc was not\n  found.  Install one.\nCall Stack (most recent call first):\n"
    )
    make_cmake(tmp_path, f"#!/bin/sh\nprintf '%s' '{message}'\nexit 1\n", monkeypatch)

    with pytest.raises(
        PluginError, match=r"not built: The CUDA compiler nvcc was not found\. Install one\. "
    ) as e:
        build_plugins(architectures=["90"])

    assert "build.log" in str(e.value)
    assert "Call Stack" not in str(e.value)


def test_the_first_compiler_error_is_the_reason(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = "building\nkernel.cu(3): error: expected a semicolon\ngmake: *** [all] Error 2\n"
    make_cmake(tmp_path, f"#!/bin/sh\nprintf '%s' '{log}'\nexit 2\n", monkeypatch)

    with pytest.raises(PluginError, match=r"not built: kernel\.cu\(3\): error: expected a semicolon \("):
        build_plugins(architectures=["90"])


def test_cmake_is_missing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)

    with pytest.raises(PluginError, match="CMake was not found"):
        build_plugins(architectures=["90"])


def test_info_without_a_library(cache: Path) -> None:
    assert find_plugin_library() is None
    with pytest.raises(PluginError, match="sws-export plugins build"):
        plugin_info()


def test_info_of_another_file(tmp_path: Path) -> None:
    foreign = tmp_path / "other.so"
    foreign.write_bytes(b"something else")

    with pytest.raises(PluginError, match=r"other\.so is not loaded: neither other\.so\.sha256 nor the inst"):
        plugin_info(foreign)
    digest_file(foreign).write_text(library_digest(foreign))
    with pytest.raises(PluginError, match="is not a plugin library of this project or is damaged"):
        plugin_info(foreign)
    with pytest.raises(PluginError, match="no plugin library at"):
        plugin_info(tmp_path / "absent.so")


def test_a_library_that_was_changed(cache: Path, fake_cmake: Path) -> None:
    library = build_plugins(architectures=["80", "90"]).path
    with library.open("ab") as file:
        file.write(b"more")
    with pytest.raises(PluginError, match=r"is not loaded: its sha256 is \w{12}…, \w{12}… was recorded when"):
        plugin_info(library)
    assert build_plugins(architectures=["80", "90"]).path == library
    assert plugin_info(library).path == library


@pytest.mark.parametrize("place", ["library", "folder", "folder above"])
def test_a_library_that_others_can_write(place: str, cache: Path, fake_cmake: Path) -> None:
    library = build_plugins(architectures=["80", "90"]).path
    path = {"library": library, "folder": library.parent, "folder above": library.parent.parent}[place]
    mode = path.stat().st_mode
    path.chmod(mode | 0o002)
    with pytest.raises(
        PluginError, match=f"is not loaded, because other users can write to {path}: build it"
    ):
        plugin_info(library)
    path.chmod(mode | 0o1002)
    if path.is_dir():
        # With the sticky bit others cannot replace what is in the folder.
        assert plugin_info(library).path == library


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")
def test_a_library_of_another_user(cache: Path, fake_cmake: Path) -> None:
    library = build_plugins(architectures=["80", "90"]).path
    os.chown(library.parent, 12345, 0)
    with pytest.raises(PluginError, match=f"is not loaded, because {library.parent} belongs to another user"):
        plugin_info(library)


def test_the_hash_depends_on_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text("x")
    once = source_hash(tmp_path)
    (tmp_path / "a.cu").write_text("y")
    changed = source_hash(tmp_path)
    (tmp_path / "a.cu").rename(tmp_path / "b.cu")
    renamed = source_hash(tmp_path)
    (tmp_path / "README.md").write_text("no source")

    assert len({once, changed, renamed}) == 3
    assert source_hash(tmp_path) == renamed


@pytest.mark.slow
def test_headers_are_downloaded_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an isolated build of pip, where PYTHONPATH hides pip."""
    cmake = shutil.which("cmake")
    source = plugin_build.find_sources()
    if cmake is None or source is None or find_sdk_headers():
        pytest.skip("no cmake, or headers of an SDK")
    (tmp_path / "pip.py").write_text("raise ImportError('hidden')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(headers NONE)\n"
        f"include({source}/cmake/FindTensorRTHeaders.cmake)\n"
    )

    command = [cmake, "-S", str(tmp_path), "-B", str(tmp_path / "b"), f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert "hidden" not in done.stderr
    assert "No module named pip" not in done.stderr
    if done.returncode != 0:
        assert "The download from PyPI failed: " in done.stderr
        pytest.skip("PyPI cannot be reached")
    assert (tmp_path / "b/tensorrt-headers/kernel_lens/include/tensorrt/NvInferRuntime.h").is_file()


def find_sdk_headers() -> bool:
    return any(Path("/usr").glob("include/**/NvInferRuntime.h"))
