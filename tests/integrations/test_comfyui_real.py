"""The node package in the real ComfyUI: `COMFYUI_PATH` names a checkout whose requirements are installed."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comfyui import TOKENS, write_twin
from sws_export import ExportOptions, export
from tests import export_runs

COMFYUI = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH is not set to a checkout of ComfyUI")

# A source of conditionings that needs no text encoder.
CONDITIONING_NODE = """
import torch

class RandomConditioning:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed):
        random = torch.Generator().manual_seed(seed)
        return ([[torch.randn(1, %d, 768, generator=random), {}]],)

NODE_CLASS_MAPPINGS = {"RandomConditioning": RandomConditioning}
"""


def test_samplers_states_inputs_and_memory(tmp_path: Path) -> None:
    """See benchmarks/comfyui.py; the limits are those of float32."""
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.comfyui", "--quick", "--out", str(out)]
    subprocess.run(command, cwd=export_runs.ROOT, check=True, stdout=subprocess.DEVNULL)
    cases = json.loads(out.read_text("utf-8"))["cases"]
    assert {case["model"] for case in cases} == {"sd15", "sdxl"}
    for case in cases:
        assert _is_right(case), case


def _is_right(case: dict[str, Any]) -> bool:
    name, found = case["case"], case["difference"]
    if "effect)" in name:
        return found > 1e-3
    if name.startswith(("second run", "FreeU")):
        return found == 0.0
    if "border" in name:
        return found < 1.0
    return found < (1e-3 if "intensity 1" in name or "joins" in name else 1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base directory of ComfyUI with the package, linked under another name, and an artefact."""
    twin, sws = tmp_path / "twin", tmp_path / "models" / "sws"
    write_twin(twin, "sd15")
    sws.mkdir(parents=True)
    export(twin, sws / "unet.onnx", ExportOptions(validate=False))
    nodes = tmp_path / "custom_nodes"
    nodes.mkdir()
    (nodes / "any-name").symlink_to(export_runs.ROOT / "integrations" / "comfyui")
    (nodes / "conditioning.py").write_text(CONDITIONING_NODE % TOKENS)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """The address of a running ComfyUI."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (folder / "log.txt").open("w")
    command = [sys.executable, str(Path(COMFYUI or "") / "main.py"), "--cpu", "--port", str(port)]
    command += ["--listen", "127.0.0.1", "--base-directory", str(folder), "--disable-api-nodes"]
    command += ["--database-url", "sqlite:///:memory:"]
    paths = os.pathsep.join(filter(None, [str(export_runs.ROOT), os.environ.get("PYTHONPATH")]))
    running = subprocess.Popen(
        command, stdout=log, stderr=log, cwd=COMFYUI, env=os.environ | {"PYTHONPATH": paths}
    )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if running.poll() is not None:
                break
            try:
                _get(f"{address}/system_stats")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
            else:
                yield address
                return
        pytest.fail((folder / "log.txt").read_text()[-3000:])
    finally:
        running.kill()
        running.wait()
        log.close()


def _get(address: str, body: Any = None) -> Any:
    request = urllib.request.Request(address, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())


def _prompt(intensity: float) -> dict[str, Any]:
    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    return {
        "load": node("LoadSwsEngine", engine="unet.onnx"),
        "strength": node("SetSwsIntensity", model=["load", 0], intensity=intensity),
        "positive": node("RandomConditioning", seed=1),
        "negative": node("RandomConditioning", seed=2),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "sample": node(
            "KSampler",
            model=["strength", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=3,
            steps=3,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix=f"at_{intensity}"),
    }


def _run(server: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """The history of a prompt when it has ended."""
    number = _get(f"{server}/prompt", {"prompt": prompt})["prompt_id"]
    for _ in range(300):
        history = _get(f"{server}/history/{number}")
        if number in history:
            found: dict[str, Any] = history[number]
            return found
        time.sleep(0.2)
    raise AssertionError("the prompt did not end within a minute")


def test_over_http(server: str, folder: Path) -> None:
    listed = _get(f"{server}/object_info/LoadSwsEngine")["LoadSwsEngine"]
    assert listed["input"]["required"]["engine"][0] == ["unet.onnx"]
    assert listed["output_name"] == ["model", "info"]
    cached = []
    for intensity in (0.0, 1.0):
        history = _run(server, _prompt(intensity))
        assert history["status"]["status_str"] == "success", history["status"]
        messages = dict(history["status"]["messages"])
        cached.append(messages["execution_cached"]["nodes"])
    # Another intensity runs the sampler again, and loads nothing.
    assert "load" not in cached[0]
    assert "load" in cached[1]
    assert not {"strength", "sample"} & set(cached[1])
    latents = [path.read_bytes() for path in sorted((folder / "output").glob("at_*.latent"))]
    assert len(latents) == 2
    assert latents[0] != latents[1]
    pages = f"{server}/extensions/any-name/docs"
    page = urllib.request.urlopen(f"{pages}/LoadSwsEngine.md", timeout=10).read()
    assert page.startswith(b"# Load SWS engine")
