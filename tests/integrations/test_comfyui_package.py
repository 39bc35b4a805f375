"""The node package as files, and its nodes where stand-ins of ComfyUI's modules are enough."""

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from sws_export.errors import OptionError
from tests import export_runs

PACKAGE = export_runs.ROOT / "integrations" / "comfyui"
NODES = ("LoadSwsEngine", "SetSwsIntensity", "SigmaWeightedShuffleLive", "ConvertToSwsEngine")


class FakePatcher:
    """A MODEL with as much of ModelPatcher as the nodes use."""

    def __init__(self, model: Any, **_: Any) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.installed: list[tuple[Any, ...]] = []

    def clone(self) -> "FakePatcher":
        clone = type(self)(self.model)
        clone.model_options = json.loads(json.dumps(self.model_options))
        return clone

    def add_callback_with_key(self, kind: str, key: str, _: Any) -> None:
        self.installed.append((kind, key))

    def add_wrapper_with_key(self, kind: str, key: str, _: Any) -> None:
        self.installed.append((kind, key))

    def set_model_attn1_replace(self, _: Any, block: str, number: int) -> None:
        self.installed.append((block, number))


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    """ComfyUI's registry of folders; that of `extra_model_paths.yaml` has no suffixes."""
    extra = tmp_path / "elsewhere"
    extra.mkdir()
    for name in ("sws", "tensorrt"):
        (tmp_path / "models" / name).mkdir(parents=True)
    return {"sws": ([str(extra)], set())}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folders: dict[str, Any]) -> ModuleType:
    """The package, imported under a name of its own."""

    def found(name: str, file: str) -> str | None:
        return next((str(p) for folder in folders[name][0] if (p := Path(folder) / file).is_file()), None)

    def listed(name: str) -> list[str]:
        paths, suffixes = folders[name]
        files = [file.name for path in paths for file in Path(path).iterdir()]
        return sorted(file for file in files if Path(file).suffix in suffixes)

    device = torch.device("cpu")
    parts: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.hooks": {},
        "comfy.latent_formats": {},
        "comfy.model_base": {},
        "comfy.model_management": {"get_torch_device": lambda: device, "unet_offload_device": lambda: device},
        "comfy.model_patcher": {"ModelPatcher": FakePatcher},
        "comfy.model_sampling": {},
        "comfy.patcher_extension": {
            "CallbacksMP": SimpleNamespace(ON_PRE_RUN="pre", ON_CLEANUP="cleanup"),
            "WrappersMP": SimpleNamespace(DIFFUSION_MODEL="unet"),
        },
        "comfy.supported_models": {},
        "comfy.utils": {},
        "folder_paths": {
            "models_dir": str(tmp_path / "models"),
            "folder_names_and_paths": folders,
            "get_filename_list": listed,
            "get_full_path": found,
        },
    }
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    spec = importlib.util.spec_from_file_location(
        "linked_under_any_name", PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, package)
    spec.loader.exec_module(package)
    for name in [name for name in sys.modules if name.startswith(f"{spec.name}.")]:
        # Each test imports the modules again, with its own stand-ins.
        monkeypatch.setitem(sys.modules, name, sys.modules.pop(name))
    return package


def test_nodes_have_tooltips_and_pages(nodes: ModuleType) -> None:
    assert tuple(nodes.NODE_CLASS_MAPPINGS) == tuple(nodes.NODE_DISPLAY_NAME_MAPPINGS) == NODES
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        assert node.CATEGORY == "model_patches"
        assert node.DESCRIPTION
        assert callable(getattr(node, node.FUNCTION))
        page = (PACKAGE / nodes.WEB_DIRECTORY / "docs" / f"{name}.md").read_text("utf-8")
        assert page.startswith(f"# {nodes.NODE_DISPLAY_NAME_MAPPINGS[name]}\n")
        required = json.loads(json.dumps(node.INPUT_TYPES()["required"]))
        for given, (_, options) in required.items():
            assert options["tooltip"]
            assert f"`{given}`" in page


def test_artefacts_are_found_and_manifests_are_not(
    nodes: ModuleType, tmp_path: Path, folders: dict[str, Any]
) -> None:
    models = tmp_path / "models"
    paths, suffixes = folders["sws"]
    assert paths == [str(tmp_path / "elsewhere"), str(models / "sws"), str(models / "tensorrt")]
    assert suffixes == {".onnx", ".plan", ".engine"}
    for file in ("a.plan", "a.plan.json", "b.onnx", "b.onnx.data", "b.onnx.json", "plain.onnx"):
        (models / "sws" / file).touch()
    # An engine of another program has no manifest.
    for file in ("other.engine", "ours.engine", "ours.engine.json"):
        (models / "tensorrt" / file).touch()
    (engines, _) = nodes.NODE_CLASS_MAPPINGS["LoadSwsEngine"].INPUT_TYPES()["required"]["engine"]
    assert engines == ["a.plan", "b.onnx", "ours.engine"]


def test_the_live_node_patches_every_block_of_a_unet(nodes: ModuleType) -> None:
    node = nodes.NODE_CLASS_MAPPINGS["SigmaWeightedShuffleLive"]()
    unet = SimpleNamespace(input_blocks=[0, 1], output_blocks=[0])
    (patched,) = node.patch(FakePatcher(SimpleNamespace(diffusion_model=unet)), 0.5)
    assert patched.installed == [
        *(("pre", "sws_live"), ("cleanup", "sws_live"), ("unet", "sws_live")),
        *(("middle", 0), ("input", 0), ("input", 1), ("output", 0)),
    ]
    with pytest.raises(
        ValueError, match="SimpleNamespace is not a UNet; connect an SD 1, SD 2 or SDXL model"
    ):
        node.patch(FakePatcher(SimpleNamespace(diffusion_model=SimpleNamespace())), 0.5)


def test_an_intensity_is_set_on_engines_only(nodes: ModuleType) -> None:
    node = nodes.NODE_CLASS_MAPPINGS["SetSwsIntensity"]()
    with pytest.raises(ValueError, match=r"expected a MODEL from 'Load SWS engine' .* found SimpleNamespace"):
        node.set(FakePatcher(SimpleNamespace()), 0.5)


def test_what_an_engine_does_not_have_is_refused(nodes: ModuleType) -> None:
    patcher = nodes.nodes.patcher
    contract = SimpleNamespace(path=Path("unet.plan"))
    model = SimpleNamespace(
        diffusion_model=SimpleNamespace(engine=SimpleNamespace(contract=contract)),
    )
    with pytest.raises(ValueError, match=r"unet\.plan is an engine, whose weights cannot be merged or read"):
        patcher.SwsModelPatcher(model).get_key_patches("diffusion_model.")
    config = patcher._RecordedConfig({"model_channels": 320}, "unet.plan")
    assert config["model_channels"] == 320
    assert config.get("context_dim") is None
    with pytest.raises(ValueError, match=r"unet\.plan: a node reads 'context_dim' .* does not have"):
        config["context_dim"]


@pytest.mark.parametrize(
    ("backend", "height", "expected"),
    [
        (None, "512", {"height": "512"}),
        (None, "512:512:1024", {}),
        ("tensorrt-rtx", "512:512:1024", {"height": "512:512:1024"}),
        (None, " ", {}),
    ],
)
def test_sizes_of_a_conversion(
    nodes: ModuleType, backend: str | None, height: str, expected: dict[str, str]
) -> None:
    config = {"num_head_channels": 64, "model_channels": 64, "channel_mult": [1, 2]}
    model = SimpleNamespace(
        model=SimpleNamespace(model_config=SimpleNamespace(unet_config=config)),
        model_dtype=lambda: torch.float16,
    )
    settings = {"precision": "as the model", "controlnet": False, "batch": "", "width": "", "tokens": ""}
    request = nodes.nodes.convert._request(model, backend, settings | {"height": height})
    assert request["sizes"] == {"vae_scale": 8} | expected
    assert request["source"] == {"precision": "fp16", "controlnet": False, "attention_head_dim": [1, 2]}
    with pytest.raises(OptionError, match="height 512:256: expected one number or MIN:OPT:MAX"):
        nodes.nodes.convert._request(model, backend, settings | {"height": "512:256"})


def test_files_that_the_registry_reads() -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text("utf-8"))
    assert {"PublisherId", "DisplayName", "requires-comfyui"} == project["tool"]["comfy"].keys()
    lines = (PACKAGE / "requirements.txt").read_text("utf-8").splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert requirements == project["project"]["dependencies"]
    main = tomllib.loads((export_runs.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["project"]["version"] == main["version"]
    # ComfyUI's torch must stay: neither the base package nor the extra requires one.
    lean = [*requirements, *main["dependencies"], *main["optional-dependencies"]["cpu"]]
    assert not any(re.match(r"torch\b", requirement) for requirement in lean)


@pytest.mark.parametrize("name", ["txt2img_sd15", "txt2img_sdxl", "convert"])
def test_workflows(nodes: ModuleType, name: str) -> None:
    file = PACKAGE / "example_workflows" / f"{name}.json"
    workflow = json.loads(file.read_text("utf-8"))
    picture = Image.open(file.with_suffix(".png"))
    assert json.loads(picture.text["workflow"]) == workflow  # type: ignore[attr-defined]
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for number, source, output, target, slot, kind in workflow["links"]:
        assert number in by_id[source]["outputs"][output]["links"]
        assert by_id[target]["inputs"][slot] == {
            "name": by_id[target]["inputs"][slot]["name"],
            "type": kind,
            "link": number,
        }
    ours = [node for node in workflow["nodes"] if node["type"] in NODES]
    assert ours
    for node in ours:
        inputs = nodes.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()["required"]
        widgets = [given for given, (kind, _) in inputs.items() if kind != "MODEL"]
        assert len(node["widgets_values"]) == len(widgets)
