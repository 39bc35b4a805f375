"""The node package in the real ComfyUI: `COMFYUI_PATH` names a checkout whose requirements are installed."""

import asyncio
import dataclasses
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.comfyui import SMALL_UNETS, TOKENS, difference, write_lora, write_small_unet
from sws_export import ExportOptions, export
from tests import export_runs

COMFYUI = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH is not set to a checkout of ComfyUI")

CLIENT = "tests"
SIZES = {
    "static": {"batch": "2", "height": "128", "width": "128", "tokens": "77"},
    "ranged": {"batch": "1:2:4", "height": "64:128:256", "width": "64:128:256", "tokens": "77:77:154"},
}

# Sources of conditionings and MODELs that need neither a text encoder nor a checkpoint of a known size.
TEST_NODES = f"""
from pathlib import Path

import torch

from benchmarks.comfyui import torch_model


class RandomConditioning:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"seed": ("INT", {{"default": 0}}), "width": ("INT", {{"max": 4096}})}}}}

    def make(self, seed, width):
        random = torch.Generator().manual_seed(seed)
        pooled = torch.randn(1, 1280, generator=random)
        return ([[torch.randn(1, {TOKENS}, width, generator=random), {{"pooled_output": pooled}}]],)


class SmallModel:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        text, number = ("STRING", {{}}), ("INT", {{}})
        return {{"required": {{"directory": text, "family": text, "load": number}}}}

    def make(self, directory, family, load):
        return (torch_model(Path(directory), family),)


NODE_CLASS_MAPPINGS = {{"RandomConditioning": RandomConditioning, "SmallModel": SmallModel}}
"""


def test_samplers_states_inputs_and_memory(tmp_path: Path) -> None:
    """See benchmarks/comfyui.py."""
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
    if name.startswith(("second run", "FreeU", "a LoRA")):
        return found == 0.0
    if "border" in name:
        return found < 1.0
    # In float16 the UNets without SWS differ by as much.
    return found < (5e-3 if "float16" in name else 1e-5)


@dataclasses.dataclass
class Server:
    """A running ComfyUI.

    Attributes:
        address: Its URL.
        folder: Its base directory.
        process: Its process.
        events: JSON messages of its websocket.
    """

    address: str
    folder: Path
    process: "subprocess.Popen[bytes]"
    events: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def get(self, path: str, body: Any = None) -> bytes:
        """The answer to a GET, or to a POST of `body`."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            answer: bytes = response.read()
        return answer

    def start(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt; returns its id."""
        number: str = json.loads(self.get("/prompt", {"prompt": prompt, "client_id": CLIENT}))["prompt_id"]
        return number

    def result(self, number: str) -> dict[str, Any]:
        """The status of a prompt when it has ended, with its messages by their names."""
        history = _wait_for(lambda: json.loads(self.get(f"/history/{number}")).get(number))
        return {"status": history["status"]["status_str"], **dict(history["status"]["messages"])}

    def progress(self, number: str, node: str) -> list[float]:
        """What the progress bar of a node has shown, from 0 to 1."""
        data = [event["data"] for event in self.events if event["type"] == "progress"]
        return [
            entry["value"] / entry["max"]
            for entry in data
            if (entry["prompt_id"], entry["node"]) == (number, node)
        ]

    def latent(self, name: str) -> torch.Tensor:
        """The latent saved last under a name."""
        files = sorted((self.folder / "output").glob(f"{name}_*.latent"))
        return load_file(files[-1])["latent_tensor"]

    def artefacts(self) -> dict[Path, int]:
        """All files in `models/sws`, and when they were changed."""
        return {path: path.stat().st_mtime_ns for path in (self.folder / "models" / "sws").iterdir()}


def _wait_for(condition: Callable[[], Any], seconds: float = 200) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"the condition did not become true within {seconds} seconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory of ComfyUI with the package, linked under another name, an artefact, and LoRAs."""
    folder = tmp_path_factory.mktemp("comfyui")
    sws, extra = folder / "models" / "sws", folder / "extra" / "artefacts" / "sub"
    for name in SMALL_UNETS:
        write_small_unet(folder / name, name)
        write_lora(folder / "models" / "loras" / f"{name}.safetensors", folder / name)
    sws.mkdir(parents=True)
    export(folder / "sd15", sws / "unet.onnx", ExportOptions(validate=False))
    shutil.copytree(sws, extra)
    paths = {"elsewhere": {"base_path": str(folder / "extra"), "sws": "artefacts"}}
    # JSON is YAML.
    (folder / "paths.yaml").write_text(json.dumps(paths))
    nodes = folder / "custom_nodes"
    nodes.mkdir()
    (nodes / "any-name").symlink_to(export_runs.ROOT / "integrations" / "comfyui")
    (nodes / "test_nodes.py").write_text(TEST_NODES)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A running ComfyUI."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(COMFYUI or "") / "main.py"), "--cpu", "--port", str(port)]
    command += ["--listen", "127.0.0.1", "--base-directory", str(folder), "--disable-api-nodes"]
    command += ["--database-url", "sqlite:///:memory:"]
    command += ["--extra-model-paths-config", str(folder / "paths.yaml")]
    paths = os.pathsep.join(filter(None, [str(export_runs.ROOT), os.environ.get("PYTHONPATH")]))
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=COMFYUI, env=os.environ | {"PYTHONPATH": paths}
        )
        server = Server(f"http://127.0.0.1:{port}", folder, process)
        try:
            _wait_for(lambda: _answers(server))
            threading.Thread(target=asyncio.run, args=(_listen(server),), daemon=True).start()
            _wait_for(lambda: server.events)
            yield server
        finally:
            process.kill()
            process.wait()


def _answers(server: Server) -> bool:
    if server.process.poll() is not None:
        pytest.fail((server.folder / "log.txt").read_text()[-3000:])
    try:
        server.get("/system_stats")
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


async def _listen(server: Server) -> None:
    """Collect the events until the server ends."""
    # A requirement of ComfyUI, not of this project.
    aiohttp = importlib.import_module("aiohttp")
    url = f"{server.address}/ws?clientId={CLIENT}"
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                server.events.append(json.loads(message.data))


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _sampled(model: str, name: str, width: int) -> dict[str, Any]:
    """Nodes that sample with a node's MODEL and save the latent under a name."""
    sampler = _node(
        "KSampler",
        model=[model, 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        seed=3,
        steps=3,
        cfg=4.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    return {
        "positive": _node("RandomConditioning", seed=1, width=width),
        "negative": _node("RandomConditioning", seed=2, width=width),
        "latent": _node("EmptyLatentImage", width=128, height=128, batch_size=1),
        f"sample {name}": sampler,
        f"save {name}": _node("SaveLatent", samples=[f"sample {name}", 0], filename_prefix=name),
    }


def _conversion(folder: Path, family: str, **settings: Any) -> dict[str, Any]:
    """Nodes that convert a small UNet with a LoRA, merged with the UNet itself."""
    given = {"format": "ONNX graph", "precision": "as the model", "controlnet": False} | settings
    return {
        "model": _node("SmallModel", directory=str(folder / family), family=family, load=0),
        "lora": _node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name=f"{family}.safetensors", strength_model=0.8
        ),
        "merge": _node("ModelMergeSimple", model1=["lora", 0], model2=["model", 0], ratio=0.5),
        "convert": _node("ConvertToSwsEngine", model=["merge", 0], name=family, **given),
    }


def test_an_engine_over_http(server: Server) -> None:
    listed = json.loads(server.get("/object_info/LoadSwsEngine"))["LoadSwsEngine"]
    assert listed["input"]["required"]["engine"][0] == ["sub/unet.onnx", "unet.onnx"]
    assert listed["output_name"] == ["model", "info"]
    page = "LoadSwsEngine.md"
    assert server.get(f"/extensions/any-name/docs/{page}").startswith(b"# Load SWS engine")
    cached = []
    for intensity in (0.0, 1.0):
        prompt = {
            "load": _node("LoadSwsEngine", engine="unet.onnx"),
            "strength": _node("SetSwsIntensity", model=["load", 0], intensity=intensity),
            **_sampled("strength", f"at_{intensity}", 768),
        }
        result = server.result(server.start(prompt))
        assert result["status"] == "success", result
        cached.append(result["execution_cached"]["nodes"])
    # Another intensity runs the sampler again, and loads nothing.
    assert "load" not in cached[0]
    assert "load" in cached[1]
    assert "strength" not in cached[1]
    assert not torch.equal(server.latent("at_0.0"), server.latent("at_1.0"))


def test_workflows_have_the_widgets_of_their_nodes(server: Server) -> None:
    for file in (export_runs.ROOT / "integrations" / "comfyui" / "example_workflows").glob("*.json"):
        for node in json.loads(file.read_text("utf-8"))["nodes"]:
            kind = node["type"]
            inputs = json.loads(server.get(f"/object_info/{kind}"))[kind]["input"]["required"]
            links = {given["name"] for given in node["inputs"]}
            assert links <= inputs.keys(), kind
            widgets = [options for name, options in inputs.items() if name not in links]
            # The editor adds one after a seed.
            added = sum(bool(len(given) > 1 and given[1].get("control_after_generate")) for given in widgets)
            assert len(node["widgets_values"]) == len(widgets) + added, kind


@pytest.mark.parametrize(("family", "kind"), [("sd15", "ranged"), ("sdxl", "static")])
def test_a_conversion_over_http(server: Server, family: str, kind: str) -> None:
    """LoRA and merge are in the artefact, progress is shown, and the same content is converted once."""
    prompt = {
        **_conversion(server.folder, family, **SIZES[kind]),
        "strength": _node("SetSwsIntensity", model=["convert", 0], intensity=0.0),
        **_sampled("strength", f"{family}_converted", SMALL_UNETS[family]["cross_attention_dim"]),
        **_sampled("merge", f"{family}_merged", SMALL_UNETS[family]["cross_attention_dim"]),
        **_sampled("model", f"{family}_plain", SMALL_UNETS[family]["cross_attention_dim"]),
    }
    number = server.start(prompt)
    result = server.result(number)
    assert result["status"] == "success", result
    shown = server.progress(number, "convert")
    assert shown[-1] == 1.0
    assert any(0 < value < 1 for value in shown)
    found, expected, plain = (server.latent(f"{family}_{part}") for part in ("converted", "merged", "plain"))
    assert difference(found, expected) < 1e-4
    assert difference(plain, expected) > 1e-3

    written = server.artefacts()
    prompt["model"]["inputs"]["load"] += 1
    result = server.result(server.start(prompt))
    assert result["status"] == "success", result
    assert "convert" not in result["execution_cached"]["nodes"]
    assert server.artefacts() == written
    assert torch.equal(server.latent(f"{family}_converted"), found)


def test_an_interrupted_conversion_leaves_nothing(server: Server) -> None:
    before = server.artefacts()
    number = server.start(
        _conversion(server.folder, "sd15", batch="3", height="", width="", tokens="")
        | _sampled("convert", "interrupted", 768)
    )
    _wait_for(lambda: server.progress(number, "convert"))
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert any("sws_export.adapters.convert_process" in child.cmdline() for child in children)
    server.get("/interrupt", {})
    result = server.result(number)
    assert result["status"] == "error"
    assert result["execution_interrupted"]["node_id"] == "convert"
    assert not any(child.is_running() for child in children)
    assert server.artefacts() == before
    assert not list((server.folder / "temp").iterdir())


def test_an_error_of_a_conversion_is_shown_on_the_node(server: Server) -> None:
    before = server.artefacts()
    prompt = _conversion(server.folder, "sd15", batch="2", height="64:128", width="128", tokens="77")
    result = server.result(server.start(prompt | _sampled("convert", "failed", 768)))
    assert result["status"] == "error"
    assert result["execution_error"]["node_id"] == "convert"
    assert (
        "height 64:128: expected one number or MIN:OPT:MAX" in result["execution_error"]["exception_message"]
    )
    assert server.artefacts() == before
