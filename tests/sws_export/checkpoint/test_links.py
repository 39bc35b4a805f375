"""Checkpoints behind symbolic and hard links, as in the caches of model hubs."""

import os
from pathlib import Path

import pytest

from sws_export.checkpoint import Checkpoint, open_checkpoint
from sws_export.errors import CheckpointError
from sws_export.onnx_files import save_onnx
from sws_export.progress import SilentProgress
from sws_export.tracing.export_unet import export_plain

WEIGHTS = "diffusion_pytorch_model.safetensors"


def link_into(directory: Path, blobs: Path, files: list[Path]) -> Path:
    """`directory` with a link for each of `files`, which are copied to `blobs` under numbers."""
    directory.mkdir(parents=True)
    blobs.mkdir(parents=True, exist_ok=True)
    for file in files:
        blob = blobs / str(len(list(blobs.iterdir())))
        blob.write_bytes(file.read_bytes())
        (directory / file.name).symlink_to(os.path.relpath(blob, directory))
    return directory


@pytest.fixture
def snapshot(random_unet: Path, tmp_path: Path) -> Path:
    """A pipeline in the layout of the Hugging Face cache."""
    files = [random_unet / "config.json", random_unet / WEIGHTS]
    link_into(tmp_path / "snapshots/abc/unet", tmp_path / "blobs", files)
    scheduler = tmp_path / "scheduler_config.json"
    scheduler.write_text('{"prediction_type": "v_prediction"}')
    link_into(tmp_path / "snapshots/abc/scheduler", tmp_path / "blobs", [scheduler])
    return tmp_path / "snapshots/abc"


def exported(checkpoint: Checkpoint, file: Path) -> bytes:
    save_onnx(export_plain(checkpoint), file, SilentProgress())
    return file.read_bytes()


@pytest.fixture(scope="module")
def expected(random_unet: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return exported(open_checkpoint(random_unet), tmp_path_factory.mktemp("expected") / "m.onnx")


def test_a_snapshot_of_symbolic_links(snapshot: Path, expected: bytes, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.prediction.type == "v_prediction"
    assert exported(checkpoint, tmp_path / "m.onnx") == expected


def test_a_file_behind_a_symbolic_link(random_unet: Path, expected: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.symlink_to(random_unet / WEIGHTS)
    assert exported(open_checkpoint(file, random_unet / "config.json"), tmp_path / "m.onnx") == expected


def test_a_file_with_two_hard_links(random_unet: Path, expected: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes((random_unet / WEIGHTS).read_bytes())
    (tmp_path / "b.safetensors").hardlink_to(file)
    checkpoint = open_checkpoint(tmp_path / "b.safetensors", random_unet / "config.json")
    assert exported(checkpoint, tmp_path / "m.onnx") == expected


def test_a_directory_behind_a_symbolic_link_belongs_to_its_pipeline(snapshot: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other/models/weights"
    elsewhere.parent.mkdir(parents=True)
    (snapshot / "unet").rename(elsewhere)
    (snapshot / "unet").symlink_to(elsewhere)
    assert open_checkpoint(snapshot / "unet").prediction.type == "v_prediction"


def test_the_working_directory_belongs_to_its_pipeline(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(snapshot / "unet")
    assert open_checkpoint(Path()).prediction.type == "v_prediction"


@pytest.mark.parametrize("named", ["file", "directory"])
def test_a_broken_link_is_named(snapshot: Path, named: str) -> None:
    file = snapshot / "unet" / WEIGHTS
    target = file.readlink()
    file.resolve().unlink()
    with pytest.raises(CheckpointError, match=f"{file} is a broken symbolic link to {target}; download"):
        open_checkpoint(file if named == "file" else snapshot)
