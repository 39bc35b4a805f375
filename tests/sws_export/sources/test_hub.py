"""Models of the Hugging Face Hub, from a server that speaks its protocol and from a cache in its layout."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from sws_export.cli import main

from sws_export.checkpoint.locate import locate
from sws_export.errors import CheckpointError
from sws_export.progress import SilentProgress
from sws_export.sources.hub import HubModel, fetch_hub_model, is_hub_id
from tests.export_runs import error_line

REPO = "someone/tiny-sd"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
INDEX = "unet/diffusion_pytorch_model.bf16.safetensors.index.json"
SHARDS = [f"diffusion_pytorch_model.bf16-0000{number}-of-00002.safetensors" for number in (1, 2)]
USED = {"model_index.json", "scheduler/scheduler_config.json", "vae/config.json", "unet/config.json", WEIGHTS}


@pytest.fixture(scope="module")
def files(random_unet: Path) -> dict[str, bytes]:
    """A pipeline's repository, with more than the UNet."""
    weights = (random_unet / "diffusion_pytorch_model.safetensors").read_bytes()
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    return {
        "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
        "scheduler/scheduler_config.json": json.dumps(scheduler).encode(),
        "vae/config.json": json.dumps({"block_out_channels": [1, 2, 3]}).encode(),
        "vae/diffusion_pytorch_model.safetensors": b"weights of the VAE",
        "text_encoder/model.safetensors": b"weights of the text encoder",
        "unet/config.json": (random_unet / "config.json").read_bytes(),
        WEIGHTS: weights,
        "unet/diffusion_pytorch_model.fp16.safetensors": weights,
        "unet/diffusion_pytorch_model.bin": b"a pickle",
        INDEX: json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode(),
        f"unet/{SHARDS[0]}": b"first shard",
        f"unet/{SHARDS[1]}": b"second shard",
        "tiny.safetensors": weights,
    }


class Hub(BaseHTTPRequestHandler):
    """The requests of huggingface_hub that a download makes."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path in (f"/api/models/{REPO}/revision/main", f"/api/models/{REPO}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.files]
            self._send({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                for name, content in self.files.items()
            ]
            self._send(entries)
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
            self.asked.append(name)
            content = self.files[name]
            self._send(content, {"ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT})
        else:
            code = "RevisionNotFound" if path.startswith(f"/api/models/{REPO}/") else "RepoNotFound"
            self._send({"error": "not found"}, {"X-Error-Code": code}, 404)

    def _send(self, content: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Write nothing to stderr."""


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A server on this machine; the names of the files that were requested."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"files": files, "asked": asked}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "hub")
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE do in a process of their own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("quick_trace")
def test_a_repository_is_downloaded_once(
    hub: list[str], out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    options = ("--guard", "literal", "--no-validate", "--sites", "mid_block.*.attn1")
    assert main([f"{REPO}@main", "--out", str(out / "g.onnx"), *options]) == 0
    assert set(hub) == USED
    assert f"downloading {REPO}: {WEIGHTS}" in " ".join(capsys.readouterr().err.split())
    source = json.loads((out / "g.onnx.json").read_text())["source"]
    assert (source["file"], source["revision"], source["vae_scale"]) == (REPO, COMMIT, 4)
    assert source["prediction_type"] == "v_prediction"

    hub.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main([f"{REPO}@main", "--out", str(out / "h.onnx"), "--dry-run", "--quiet"]) == 0
    assert hub == []
    assert main(["someone/else", "--out", str(out / "h.onnx")]) == 1
    assert error_line(capsys.readouterr().err) == (
        "someone/else does not exist here, is not in the Hugging Face cache and cannot be downloaded: "
        "HF_HUB_OFFLINE is set; connect to the network, or give the path of a model"
    )


def test_a_variant_in_shards(hub: list[str]) -> None:
    directory = fetch("bf16").directory
    assert set(hub) == USED - {WEIGHTS} | {INDEX} | {f"unet/{name}" for name in SHARDS}
    assert [file.name for file in locate(directory, "bf16").weights] == SHARDS


@pytest.mark.usefixtures("hub")
def test_a_shard_index_that_leads_elsewhere(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(files, INDEX, b'{"weight_map": {"a": "../../model.safetensors"}}')
    with pytest.raises(
        CheckpointError, match=r"index\.json: weight_map\[a\]: expected the name of a file in the"
    ):
        fetch("bf16")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("someone/else", "the Hugging Face Hub has no such repository, or it is private; check the name"),
        ("some--one/else", "some--one/else does not exist here, and is no name of a repository of the Hugg"),
        (f"{REPO}@other", f"{REPO} on the Hugging Face Hub has no revision 'other'"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_the_hub_does_not_have(model: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        fetch_hub_model(Path(model), None, ema=False, progress=SilentProgress())


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"cannot be downloaded: .*[Cc]onnect.*; connect to the network"
    ):
        fetch()


@pytest.fixture
def cache(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a cache with some files, as huggingface_hub lays it out; nothing can be downloaded."""
    use_endpoint(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def make(*names: str) -> Path:
        folder = tmp_path / "models--someone--tiny-sd"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "blobs").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(COMMIT)
        for name in names:
            blob = folder / "blobs" / digest(files[name])
            blob.write_bytes(files[name])
            link = folder / "snapshots" / COMMIT / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        return folder / "snapshots" / COMMIT

    return make


def fetch(variant: str | None = None, revision: str = "") -> HubModel:
    return fetch_hub_model(Path(REPO + revision), variant, ema=False, progress=SilentProgress())


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_cached_repository(cache: Callable[..., Path], revision: str) -> None:
    snapshot = cache(*USED)
    model = fetch(revision=revision)
    assert (model.directory, model.commit) == (snapshot, COMMIT)
    assert model.remarks == (f"{REPO}: from the local cache",)
    assert locate(model.directory).pipeline == snapshot


def test_a_variant_that_was_not_asked_for_is_used_with_a_remark(cache: Callable[..., Path]) -> None:
    fp16 = "unet/diffusion_pytorch_model.fp16.safetensors"
    cache(*(USED - {WEIGHTS} | {fp16}))
    assert fetch("fp16").remarks == (f"{REPO}: from the local cache",)
    (remark,) = fetch().remarks
    assert "from the local cache, which is not complete; it cannot be downloaded: HF_HUB_OFFLINE" in remark
    with pytest.raises(CheckpointError, match="is not in the Hugging Face cache and cannot be downloaded"):
        fetch("other")


def test_a_cache_without_the_unet(cache: Callable[..., Path]) -> None:
    cache("model_index.json", "text_encoder/model.safetensors")
    with pytest.raises(CheckpointError, match=f"{REPO} does not exist here, is not in the Hugging Face ca"):
        fetch()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("stabilityai/sdxl-turbo", True),
        ("stabilityai/sdxl-turbo@refs/pr/4", True),
        ("a/b.safetensors", False),
        ("a/b.onnx", False),
        ("here/unte", False),
        ("a/b/c", False),
        ("model", False),
        ("../unet", False),
    ],
)
def test_names_that_are_repositories(
    model: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(Path(model)) is expected
