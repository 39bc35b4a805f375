"""Errors of users: one line, exit code 1, and neither a file nor a scratch directory left behind."""

import errno
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file
from sws_export.cli import main

from tests.export_runs import COMMAND, error_line, listing, make_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = ("--sites", "mid_block.*.attn1", "--guard", "literal", "--no-validate", "--quiet")

pytestmark = pytest.mark.usefixtures("quick_trace")

Refuse = Callable[..., str]


@pytest.fixture
def refuse(out: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run the command, expect it to fail, and return its error line."""

    def run(model: Path | str, *options: str, name: str = "graph.onnx") -> str:
        before = listing(out)
        destination = name if name.startswith("/") else str(out / name)
        code = main([str(model), "--out", destination, "--quiet", *options])
        captured = capsys.readouterr()
        assert code == 1
        assert captured.out == ""
        assert listing(out) == before
        lines = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, captured.err
        return error_line(captured.err)

    return run


@pytest.fixture
def copied(random_unet: Path, tmp_path: Path) -> Path:
    """A copy of the random UNet to damage."""
    return Path(shutil.copytree(random_unet, tmp_path / "copied"))


def change_weight(directory: Path, value: float) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors["mid_block.resnets.0.conv1.weight"][1, 2, 0, 1] = value
    save_file(tensors, directory / WEIGHTS)


# The model


def test_a_missing_file(refuse: Refuse, tmp_path: Path) -> None:
    message = refuse(tmp_path / "absent.safetensors")
    assert (
        message
        == f"{tmp_path}/absent.safetensors does not exist; pass a .safetensors file or a diffusers directory"
    )


def test_a_missing_graph(refuse: Refuse, tmp_path: Path) -> None:
    assert refuse(tmp_path / "absent.onnx") == f"{tmp_path}/absent.onnx: no such file"


def test_a_directory_without_a_unet(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "model" / "vae").mkdir(parents=True)
    assert f"{tmp_path}/model" in refuse(tmp_path / "model")


def test_a_truncated_file(refuse: Refuse, copied: Path) -> None:
    file = copied / WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert f"{file} is truncated: expected {len(content)} bytes, found {len(content) // 2}" in refuse(copied)


def test_a_header_of_2_to_the_63_bytes(refuse: Refuse, copied: Path) -> None:
    (copied / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert f"are a header length of {2**63} bytes" in refuse(copied)


def test_another_architecture(refuse: Refuse, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"_class_name": "FluxTransformer2DModel"}))
    assert "is the configuration of a FluxTransformer2DModel; expected a UNet2DConditionModel" in refuse(
        copied
    )


def test_a_configuration_that_does_not_fit(refuse: Refuse, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 24}))
    message = refuse(copied)
    assert "does not fit its configuration" in message
    assert "--config FILE" in message


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
def test_weights_that_are_not_finite(refuse: Refuse, copied: Path, value: float, kind: str) -> None:
    change_weight(copied, value)
    message = refuse(copied)
    assert "tensor 'mid_block.resnets.0.conv1.weight'" in message
    assert f"contains {kind} at index [1, 2, 0, 1]" in message


def test_a_weight_out_of_the_range_of_the_precision(refuse: Refuse, copied: Path) -> None:
    change_weight(copied, 1e5)
    message = refuse(copied, "--precision", "fp16")
    assert "mid_block.resnets.0.conv1.weight: a weight of 1e+05 exceeds the range of fp16" in message
    assert "--precision bf16" in message


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_pickle_files(refuse: Refuse, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"\x80\x04.")
    message = refuse(file)
    assert "code" in message
    assert "safetensors" in message


def test_a_file_that_is_not_onnx(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"<!DOCTYPE html>")
    assert "model.onnx is not an ONNX model or is damaged" in refuse(tmp_path / "model.onnx")


def test_a_graph_without_attention(refuse: Refuse, traced: Path, tmp_path: Path) -> None:
    model = ir.load(traced)
    for node in model.graph:
        if node.op_type == "Attention":
            node.domain = "elsewhere"
    ir.save(model, tmp_path / "none.onnx")
    assert "the graph has neither Attention nodes nor attention of MatMul, Softmax and" in refuse(
        tmp_path / "none.onnx"
    )


# Options


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--sws", "betta=0.5"), "--sws: unknown parameter 'betta'; known are sigma_min, sigma_max, tau"),
        (("--sws", "beta=1.5"), "--sws beta: 1.5 is out of range; allowed is 0 to 0.999"),
        (("--sws", "tau=nan"), "--sws tau: nan is out of range"),
        (("--sws", "tau"), "--sws tau: a value is missing"),
        (("--sws", "bisection_steps=2.5"), "--sws bisection_steps: expected an integer, found '2.5'"),
        (("--sws", "sigma_min=30"), "--sws sigma_min: 30 must be below sigma_max (25)"),
        (("--sws", "schedule=fast"), "--sws schedule: 'fast' is unknown; use progress or noise"),
        (("--sws", "scales=2,4,9"), "--sws scales: expected three integers from 1 to 8, none below"),
        (("--sites", "nowhere.*"), "--sites 'nowhere.*' matches no attention site; there are down_blocks.1"),
        (("--config", "/absent.json"), "cannot read /absent.json: No such file"),
        (("--variant", "fp17"), "fp17"),
        (("--ema",), "has no EMA weights"),
        (
            ("--backend", "openvino"),
            "--backend openvino is unknown; choose one of tensorrt-rtx, tensorrt, onnxruntime-cuda",
        ),
        (("--plain", "--guard-rows", "1/8"), "--guard-rows has no meaning with --plain"),
        (("--plain", "--sws", "beta=0.5"), "--sws has no meaning with --plain"),
        (("--prediction-type", "v"), "--prediction-type: expected one of epsilon, v_prediction, sample"),
        (("--trust-code",), "--trust-code has no meaning without --calibration PIPELINE; leave it out"),
        (("--preset", "node", "--plain"), "--plain has no meaning with --preset comfyui-node"),
        (
            ("--preset", "node", "--guard", "fused"),
            "--guard has no meaning with --preset comfyui-node: its guard has",
        ),
        (
            ("--preset", "node", "--guard-rows", "1/8"),
            "--guard-rows has no meaning with --preset comfyui-node",
        ),
        (
            ("--preset", "node", "--sws", "scales=1,2,3"),
            "--sws scales has no meaning with --preset comfyui-node",
        ),
        (("--refit",), "--refit has no meaning for an ONNX graph: it is an option of engine builds"),
        (("--compute-capability", "8.9"), "--compute-capability has no meaning for an ONNX graph"),
        (("--max-gpu-memory", "8GB"), "--max-gpu-memory has no meaning for an ONNX graph"),
        (("--keep-onnx",), "--keep-onnx has no meaning for an ONNX graph: it is what is written"),
        (
            ("--preset", "node", "--sites", "*.attn1"),
            "--sites '*.attn1' matches no attention site; there are",
        ),
    ],
)
def test_graph_options(refuse: Refuse, random_unet: Path, option: tuple[str, ...], message: str) -> None:
    assert message in refuse(random_unet, *option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--batch", "4:2:8"), "--batch 4:2:8: expected MIN <= OPT <= MAX, found 4, 2, 8"),
        (("--tokens", "8:4:2"), "--tokens 8:4:2: expected MIN <= OPT <= MAX, found 8, 4, 2"),
        (("--batch", "0"), "--batch 0: sizes start at 1, found 0"),
        (("--batch", "1:2"), "--batch 1:2: expected one number or MIN:OPT:MAX"),
        (
            ("--vae-scale", "8", "--height", "502"),
            "502 pixels is not a multiple of 8, the pixels of one latent",
        ),
        (("--compute-capability", "8"), "8"),
        (
            ("--backend", "openvino"),
            "--backend openvino is unknown; choose one of tensorrt-rtx, tensorrt, onnxruntime-cuda",
        ),
        (("--backend", "tensorrt"), "tensorrt"),
        (("--builder-optimization-level", "9"), "9"),
        (("--vae-scale", "0"), "--vae-scale"),
    ],
)
def test_engine_options(refuse: Refuse, random_unet: Path, option: tuple[str, ...], message: str) -> None:
    given = ("--vae-scale", "1") if "--vae-scale" not in option else ()
    assert message in refuse(random_unet, *given, *option, name="engine.plan")


def test_pixels_without_a_vae_scale(refuse: Refuse, random_unet: Path) -> None:
    assert "add --vae-scale 8" in refuse(random_unet, "--height", "64", name="engine.plan")


def test_options_without_meaning_for_an_onnx_source(refuse: Refuse, traced: Path) -> None:
    assert "is a graph already: --controlnet applies" in refuse(traced, "--controlnet")


# The destination


def test_an_unknown_suffix(refuse: Refuse, random_unet: Path) -> None:
    message = refuse(random_unet, name="engine.trt")
    assert "expected a name ending in .onnx, .plan or .engine, found '.trt'" in message


@pytest.mark.parametrize("place", ["absent/graph.onnx", "file/graph.onnx"])
def test_a_missing_directory(refuse: Refuse, random_unet: Path, out: Path, place: str) -> None:
    (out / "file").write_text("")
    message = refuse(random_unet, name=place)
    assert f"cannot write {out / place}: " in message
    assert "choose an --out" in message


def test_a_directory_that_is_not_writable(refuse: Refuse, random_unet: Path) -> None:
    assert "cannot write /proc/graph.onnx" in refuse(random_unet, name="/proc/graph.onnx")


def test_out_is_a_directory(refuse: Refuse, random_unet: Path, out: Path) -> None:
    (out / "graph.onnx").mkdir()
    assert "graph.onnx: it is a directory" in refuse(random_unet)


def test_the_manifest_is_a_directory(refuse: Refuse, random_unet: Path, out: Path) -> None:
    (out / "graph.onnx.json").mkdir()
    assert "graph.onnx.json: it is a directory" in refuse(random_unet)


def test_the_kept_graph_is_a_directory(refuse: Refuse, random_unet: Path, out: Path) -> None:
    (out / "engine.onnx").mkdir()
    message = refuse(random_unet, "--keep-onnx", "--vae-scale", "1", name="engine.plan")
    assert "engine.onnx: it is a directory" in message


def test_the_model_itself_is_not_overwritten(refuse: Refuse, traced: Path, out: Path) -> None:
    shutil.copy(traced, out / "graph.onnx")
    assert "would overwrite the model" in refuse(out / "graph.onnx")
    assert "would overwrite the model" in refuse(
        out / "graph.onnx",
        "--keep-onnx",
        "--vae-scale",
        "1",
        "--height",
        "16",
        "--width",
        "16",
        name="graph.plan",
    )


# The disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    "function",
    [
        "onnx_ir.save",
        "json.dump",
        "os.fsync",
    ],
)
def test_a_full_disk(
    refuse: Refuse,
    random_unet: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    number: int,
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(number, "no room")

    monkeypatch.setattr(function, full)
    message = refuse(random_unet, *SMALL)
    assert message.startswith(f"cannot write {out}/graph.onnx: the disk is full (")
    assert "free some space or choose another --out" in message


def test_a_full_disk_in_the_engine_build(
    refuse: Refuse, random_unet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    message = refuse(random_unet, *SMALL, "--vae-scale", "1", name="engine.plan")
    assert "engine.plan: the disk is full (" in message


def test_a_limit_on_the_size_of_files(refuse: Refuse, random_unet: Path, out: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        message = refuse(random_unet, *SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write {out}/graph.onnx: " in message


@pytest.mark.skipif(
    sys.platform != "linux" or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0,
    reason="no namespaces in which a small disk could be mounted",
)
@pytest.mark.parametrize(
    ("name", "megabytes"), [("graph.onnx", 2), pytest.param("engine.plan", 12, marks=pytest.mark.slow)]
)
def test_a_disk_that_is_too_small(traced: Path, out: Path, name: str, megabytes: int) -> None:
    command = f"""
        mount -t tmpfs -o size={megabytes}m none {out}
        {COMMAND} {traced} --out {out}/{name} {" ".join(SMALL)} --vae-scale 1 --height 16 --width 16
        echo "exit code $?"
        ls -A {out}
    """
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "exit code 1\n"
    assert "the disk is full" in error_line(done.stderr)


def test_a_shortage_of_disk_is_a_warning(
    random_unet: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(out)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    assert main([str(random_unet), "--out", str(out / "graph.onnx"), "--dry-run", "--quiet"]) == 0
    assert "GB of disk are needed" in capsys.readouterr().err


def test_the_random_unet_is_exported_otherwise(random_unet: Path, out: Path) -> None:
    """The tests above fail for the reason that they name."""
    assert main([str(random_unet), "--out", str(out / "graph.onnx"), *SMALL]) == 0
    assert sorted(listing(out)) == ["graph.onnx", "graph.onnx.json"]


def test_a_unet_with_an_unsupported_input(refuse: Refuse, tmp_path: Path) -> None:
    unet = make_unet(tmp_path / "unet", encoder_hid_dim_type="text_proj", encoder_hid_dim=12)
    assert "encoder_hid_dim_type = 'text_proj'" in refuse(unet)


# Files that are not regular, and limits of the machine


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
@pytest.mark.parametrize("kind", ["FIFO", "device"])
@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_file_of_the_model_that_is_not_regular(name: str, kind: str, refuse: Refuse, copied: Path) -> None:
    (copied / name).unlink()
    if kind == "FIFO":
        os.mkfifo(copied / name)
    else:
        (copied / name).symlink_to("/dev/zero")
    message = refuse(copied)
    if name == WEIGHTS:
        assert f"{copied} contains no UNet" in message
        message = refuse(copied / name)
        assert f"cannot read {copied / name}: it is a {kind}, not a file" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
@pytest.mark.parametrize("verb", ["inspect", "export"])
def test_a_graph_that_is_a_fifo(
    verb: str, tmp_path: Path, refuse: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "g.onnx")
    if verb == "export":
        assert f"{tmp_path}/g.onnx" in refuse(tmp_path / "g.onnx")
    else:
        assert main(["inspect", str(tmp_path / "g.onnx")]) == 1
        assert "g.onnx: it is a FIFO" in error_line(capsys.readouterr().err)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_a_destination_that_is_a_fifo(
    random_unet: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(out / "graph.onnx")
    assert main([str(random_unet), "--out", str(out / "graph.onnx")]) == 1
    assert "graph.onnx: it is a FIFO, device or socket; choose" in error_line(capsys.readouterr().err)
    assert [file.name for file in out.iterdir()] == ["graph.onnx"]


def test_names_that_are_too_long(refuse: Refuse, random_unet: Path, tmp_path: Path) -> None:
    assert "File name too long; choose an --out" in refuse(random_unet, name="a" * 251 + ".onnx")
    assert "File name too long" in refuse(tmp_path / ("a" * 300 + ".safetensors"))


def test_too_few_open_files(random_unet: Path, out: Path) -> None:
    command = f"ulimit -n 8; exec {COMMAND} {random_unet} --out {out}/graph.onnx {' '.join(SMALL)}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "Too many open files; raise the limit with ulimit -n" in error_line(done.stderr)
    assert listing(out) == {}
