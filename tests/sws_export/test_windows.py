"""Branches for Windows with the platform replaced, and Windows paths."""

import os
import sys
from pathlib import Path, PureWindowsPath

import pytest

from sws_export.engines.gpu import gpu_count
from sws_export.errors import OutputError
from sws_export.files import (
    common_directory,
    external_data_path,
    output_errors,
    publish,
    stays_below,
    user_cache,
)
from sws_export.lora.fuse import parse_lora
from sws_export.manifest import manifest_path


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")


def test_files_are_flushed_without_directories(
    windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[Path, int]] = []
    open_descriptor = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags: (opened.append((path, flags)), open_descriptor(path, flags))[1]
    )
    (tmp_path / "staged").write_bytes(b"x")
    publish(tmp_path / "staged", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"x"
    assert opened == [(tmp_path / "staged", os.O_RDWR)]


def test_a_file_in_use(windows: None, tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="Permission denied; close programs that use this file, or choose"),
        output_errors(tmp_path / "e.plan"),
    ):
        raise PermissionError(13, "Permission denied")


def test_the_cache_is_in_the_users_local_data(windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("LOCALAPPDATA", "/users/me/local")
    assert user_cache() == Path("/users/me/local/sws-export")


def test_the_driver_has_another_name(windows: None) -> None:
    assert gpu_count() == 0


@pytest.mark.parametrize(
    ("text", "file", "scale"),
    [
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:0.8", r"C:\loras\a.safetensors", 0.8),
        (r"a.safetensors:-1", "a.safetensors", -1.0),
    ],
)
def test_a_drive_letter_is_not_a_scale(text: str, file: str, scale: float) -> None:
    assert parse_lora(text) == (Path(file), scale)


@pytest.mark.parametrize(
    ("location", "below"),
    [
        ("weights.bin", True),
        (r"data\weights.bin", True),
        ("/evil.bin", False),
        (r"\evil.bin", False),
        ("D:evil.bin", False),
        (r"D:\evil.bin", False),
        (r"\\server\share\evil.bin", False),
        (r"data\..\..\evil.bin", False),
    ],
)
def test_locations_that_leave_the_directory_of_a_graph(location: str, below: bool) -> None:
    assert stays_below(PureWindowsPath(location)) == below


def test_a_directory_of_files_on_two_drives() -> None:
    first, second = PureWindowsPath(r"C:\Models\a\w.bin"), PureWindowsPath(r"c:\models\b\w.bin")
    assert common_directory([first, second]) == PureWindowsPath(r"C:\Models")
    assert common_directory([first]) == first.parent
    assert common_directory([first, PureWindowsPath(r"D:\w.bin")]) is None


def test_names_of_files_beside_an_artefact() -> None:
    artefact = PureWindowsPath(r"C:\models\sd 1.5\unet.onnx")
    assert str(manifest_path(artefact)) == r"C:\models\sd 1.5\unet.onnx.json"  # type: ignore[arg-type]
    assert str(external_data_path(artefact)) == r"C:\models\sd 1.5\unet.onnx.data"  # type: ignore[arg-type]
