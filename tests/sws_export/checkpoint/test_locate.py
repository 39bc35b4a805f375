"""Finding the files that belong to a path."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sws_export.checkpoint import open_checkpoint
from sws_export.errors import CheckpointError
from tests.export_runs import check_names

STEM = "diffusion_pytorch_model"


def write_shards(
    directory: Path, tiny_unet: Path, shapes: dict[str, Any], write_sparse: Any, variant: str = ""
) -> Path:
    """The tiny UNet in two shards, as diffusers writes them."""
    names = list(shapes)
    parts = {
        f"{STEM}{variant}-00001-of-00002.safetensors": names[:40],
        f"{STEM}{variant}-00002-of-00002.safetensors": names[40:],
    }
    for file, part in parts.items():
        write_sparse(directory / file, {name: shapes[name] for name in part})
    index = directory / f"{STEM}.safetensors.index{variant}.json"
    weight_map = {name: file for file, part in parts.items() for name in part}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (directory / "config.json").write_text((tiny_unet / "config.json").read_text())
    return index


@pytest.fixture
def shapes(tiny_config: dict[str, Any], unet_shapes: Any) -> dict[str, Any]:
    return unet_shapes(tiny_config)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards(
    variant: str, tmp_path: Path, tiny_unet: Path, shapes: dict[str, Any], write_sparse: Any
) -> None:
    index = write_shards(tmp_path / "sharded", tiny_unet, shapes, write_sparse, variant)
    for path in (index, index.parent):
        checkpoint = open_checkpoint(path)
        assert [file.name[-22:] for file in checkpoint.files] == [
            "00001-of-00002.safetensors"[-22:],
            "00002-of-00002.safetensors"[-22:],
        ]
        assert check_names(checkpoint) == 0
        assert set(checkpoint.tensors) == set(shapes)


def test_one_shard_alone(tmp_path: Path, tiny_unet: Path, shapes: dict[str, Any], write_sparse: Any) -> None:
    index = write_shards(tmp_path / "sharded", tiny_unet, shapes, write_sparse)
    with pytest.raises(CheckpointError, match="is one shard of a model; pass its index"):
        open_checkpoint(index.parent / f"{STEM}-00001-of-00002.safetensors")


def test_missing_shard(tmp_path: Path, tiny_unet: Path, shapes: dict[str, Any], write_sparse: Any) -> None:
    index = write_shards(tmp_path / "sharded", tiny_unet, shapes, write_sparse)
    (index.parent / f"{STEM}-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"names .*-00002-of-00002.safetensors, which does not exist \(2 shards\)"
    ):
        open_checkpoint(index)


def test_shards_behind_symbolic_links(
    tmp_path: Path, tiny_unet: Path, shapes: dict[str, Any], write_sparse: Any
) -> None:
    index = write_shards(tmp_path / "sharded", tiny_unet, shapes, write_sparse)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, shard in enumerate(sorted(index.parent.glob("*.safetensors"))):
        shard.rename(blobs / str(number))
        shard.symlink_to(blobs / str(number))
    assert set(open_checkpoint(index).tensors) == set(shapes)
    (blobs / "1").unlink()
    with pytest.raises(CheckpointError, match=r"-00002-of-00002\.safetensors is a broken symbolic link"):
        open_checkpoint(index)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/secret.safetensors", "D:secret.safetensors", "weights.bin"]
)
def test_index_that_leads_elsewhere(name: str, tmp_path: Path) -> None:
    index = tmp_path / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"expected .* in the same directory"):
        open_checkpoint(index)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "it has no field 'weight_map'"),
        ({"weight_map": {}}, "weight_map: expected an object of length >= 1, found {}"),
        ({"weight_map": []}, r"weight_map: expected an object, found \[\]"),
        ({"weight_map": {"a": 1}}, r"weight_map\[a\]: expected a string, found 1"),
    ],
)
def test_index_without_a_map(content: Any, message: str, tmp_path: Path) -> None:
    index = tmp_path / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(index)


def test_index_that_is_wrong(
    tmp_path: Path, tiny_unet: Path, shapes: dict[str, Any], write_sparse: Any
) -> None:
    index = write_shards(tmp_path / "sharded", tiny_unet, shapes, write_sparse)
    content = json.loads(index.read_text())
    content["weight_map"]["conv_in.weight"] = f"{STEM}-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tensor 'conv_in.weight' is not in"):
        open_checkpoint(index)


def test_tensor_in_two_shards(
    tmp_path: Path, tiny_unet: Path, shapes: dict[str, Any], write_sparse: Any
) -> None:
    index = write_shards(tmp_path / "sharded", tiny_unet, shapes, write_sparse)
    write_sparse(index.parent / f"{STEM}-00002-of-00002.safetensors", shapes)
    with pytest.raises(CheckpointError, match="is in both"):
        open_checkpoint(index)


def copy_as(tiny_unet: Path, name: str) -> None:
    (tiny_unet / name).write_bytes((tiny_unet / f"{STEM}.safetensors").read_bytes())


def test_variants(tiny_unet: Path) -> None:
    copy_as(tiny_unet, f"{STEM}.fp16.safetensors")
    plain = open_checkpoint(tiny_unet)
    assert plain.files[0].name == f"{STEM}.safetensors"
    assert "other variants: fp16" in plain.remarks[0]
    assert open_checkpoint(tiny_unet, variant="fp16").files[0].name == f"{STEM}.fp16.safetensors"
    (tiny_unet / f"{STEM}.safetensors").rename(tiny_unet / f"{STEM}.non_ema.safetensors")
    with pytest.raises(CheckpointError, match="several variants: fp16, non_ema; choose one with --variant"):
        open_checkpoint(tiny_unet)
    (tiny_unet / f"{STEM}.non_ema.safetensors").unlink()
    only = open_checkpoint(tiny_unet)
    assert "using the only weights, variant 'fp16'" in only.remarks[0]
    with pytest.raises(CheckpointError, match=f"expected unet/{STEM}.bf16.safetensors"):
        open_checkpoint(tiny_unet, variant="bf16")


def test_directory_with_files_of_other_names(tiny_unet: Path) -> None:
    (tiny_unet / f"{STEM}.safetensors").rename(tiny_unet / "a.safetensors")
    assert open_checkpoint(tiny_unet).files[0].name == "a.safetensors"
    (tiny_unet / "b.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"several models: a.safetensors, b.safetensors; pass one"):
        open_checkpoint(tiny_unet)


def test_directory_without_a_unet(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"contains no UNet: expected unet/{STEM}.safetensors"):
        open_checkpoint(tmp_path)


def test_pipeline_with_a_transformer(tmp_path: Path) -> None:
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="this is a FluxPipeline, which uses a FluxTransformer2DModel"):
        open_checkpoint(tmp_path)


def test_directory_with_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / f"{STEM}.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"found {STEM}.bin.*executes the code.*use_safetensors=False"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
def test_pickles_are_refused_with_a_way_out(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"\x80\x04")
    with pytest.raises(
        CheckpointError, match=r"executes the code in it, so it is not supported; .*python -c"
    ):
        open_checkpoint(file)


def test_the_way_out_for_a_ckpt_works(tmp_path: Path) -> None:
    import re
    import shlex
    import subprocess
    import sys

    import torch

    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"conv_in.weight": torch.ones(2)}, "epoch": 3}, file)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(file)
    command = re.search(r'python -c (".*")$', str(caught.value))
    assert command is not None
    subprocess.run([sys.executable, "-c", *shlex.split(command[1])], check=True, cwd=tmp_path)
    with pytest.raises(CheckpointError, match=r"its 1 tensors \(conv_in.weight, ...\)"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "none")


def test_other_file_types(tmp_path: Path) -> None:
    for name, message in (("model.gguf", "is a GGUF file"), ("model.txt", "files of type '.txt' are not")):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)


def test_ema_directory(tiny_unet: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(tiny_unet, pipeline / "unet")
    tiny_unet.rename(pipeline / "unet_ema")
    averages = pipeline / "unet_ema" / f"{STEM}.safetensors"
    assert open_checkpoint(pipeline).files == (pipeline / "unet" / f"{STEM}.safetensors",)
    found = open_checkpoint(pipeline, ema=True)
    assert found.files == (averages,)
    assert found.remarks[0] == f"using the exponential moving averages in {averages.parent}"
    assert open_checkpoint(averages.parent).files == (averages,)
    shutil.rmtree(pipeline / "unet")
    assert open_checkpoint(pipeline).remarks[0] == found.remarks[0]


def test_file_that_may_not_be_read(tiny_unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(CheckpointError, match=r"cannot read .*Permission denied"):
        open_checkpoint(tiny_unet)
