"""What the manifest of an export contains."""

import dataclasses
import json
from pathlib import Path

import onnx_ir as ir

from graph_passes.find_sites import SkippedSite
from graph_passes.grids import TEXT, Grid
from graph_passes.guard import GuardOptions
from graph_passes.insert_sws import state_pair
from graph_passes.parameters import SwsParameters
from graph_passes.target import TARGETS
from sws_export.files import file_digest
from sws_export.manifest import GraphDescription, parse_manifest, read_embedded
from sws_export.pipeline.describe import complete, describe_graph, embed, library_versions
from sws_export.pipeline.rewrite import RewriteReport
from sws_export.presets import preset_named
from sws_export.stage_timings import StageTiming
from sws_export.tensors import TensorSpec

SAMPLE = TensorSpec("sample", "float16", ("batch", 4, "height", "width"))
SMALL, LARGE = (1, 4, 8, 8), (4, 4, 16, 8)
REWRITE = RewriteReport(
    sites={Grid(1): ("a.attn1",), Grid(4): ("b.attn1", "c.attn1"), TEXT: ("b.attn2",)},
    skipped=(SkippedSite("a.attn2", "cross-attention"),),
    states=(state_pair(Grid(1)), state_pair(Grid(4)), state_pair(TEXT)),
    nodes=10,
)
INPUTS = [
    dataclasses.replace(SAMPLE, name=name)
    for name in ("sample", "sigma", "intensity", *(pair.input for pair in REWRITE.states))
]
OUTPUTS = [
    dataclasses.replace(SAMPLE, name=name)
    for name in ("out_sample", *(pair.output for pair in REWRITE.states))
]


def described(sws: bool = True, rewrite: RewriteReport = REWRITE) -> GraphDescription:
    return describe_graph(
        source={"kind": "checkpoint", "file": "unet", "sha256": "0" * 64},
        inputs=INPUTS,
        outputs=OUTPUTS,
        parameters=SwsParameters() if sws else None,
        rewrite=rewrite if sws else None,
        precision="fp16",
        target=TARGETS["tensorrt-rtx"],
        guard=GuardOptions() if sws else None,
        opset=23,
    )


def test_fields_from_the_graph() -> None:
    found = described()
    assert found["format"] == 2
    assert found["target"] == "tensorrt-rtx"
    assert found["inputs"][0] == {
        "name": "sample",
        "dtype": "float16",
        "shape": ["batch", 4, "height", "width"],
    }
    assert found["sites"] == {
        "d1": ["a.attn1"],
        "d4": ["b.attn1", "c.attn1"],
        "text": ["b.attn2"],
    }
    assert found["skipped_sites"] == [{"name": "a.attn2", "reason": "cross-attention"}]
    assert found["states"][1] == {
        "input": "sws_state_d4",
        "output": "sws_state_d4_out",
        "grid": "d4",
        "downsampling": 4,
        "initial": "zeros",
        "persistent": False,
        "reset": "feed zeros at the first step of every image",
    }
    assert found["states"][2] == {
        "input": "sws_state_text",
        "output": "sws_state_text_out",
        "grid": "text",
        "downsampling": None,
        "initial": "zeros",
        "persistent": False,
        "reset": "feed zeros at the first step of every image, and when the number of text tokens changes "
        "from one step to the next",
    }
    assert found["sws"]["scales"] == (2, 4, 8)
    assert (found["preset"], found["shared_inputs"]) == ("sws", [])


def test_fields_of_comfyui_node() -> None:
    rewrite = RewriteReport(
        {TEXT: ("b.attn2",)}, (), (state_pair(TEXT),), 10, preset=preset_named("comfyui-node", "sigma")
    )
    found = described(rewrite=rewrite)
    assert (found["preset"], found["shared_inputs"]) == ("comfyui-node", ["sigma", "intensity"])
    assert found["sws"].keys() == dataclasses.asdict(SwsParameters()).keys() - {"scales", "schedule"}
    (state,) = found["states"]
    assert state["persistent"]
    assert state["reset"] == (
        "never; all sites share it, across the batch and from image to image; feed zeros to start over, and "
        "when the number of text tokens changes from one step to the next"
    )


def test_a_plain_graph() -> None:
    found = described(sws=False)
    assert (found["sws"], found["states"], found["sites"], found["skipped_sites"]) == (None, [], {}, [])
    assert (found["preset"], found["shared_inputs"]) == (None, [])


def test_the_description_is_embedded_in_the_graph(tmp_path: Path) -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], name="empty"), ir_version=10)
    ir.save(model, tmp_path / "g.onnx")
    assert read_embedded(tmp_path / "g.onnx") is None
    embed(model, described())
    ir.save(model, tmp_path / "g.onnx")
    assert read_embedded(tmp_path / "g.onnx") == json.loads(json.dumps(described()))


def test_versions_are_those_installed() -> None:
    versions = library_versions()
    assert versions["torch"].startswith("2.")
    assert "not installed" not in versions.values()


def test_a_manifest_is_complete(tmp_path: Path) -> None:
    artefact = tmp_path / "e.plan"
    artefact.write_bytes(b"plan")
    found = complete(
        described(),
        artefact,
        {artefact: file_digest(artefact)},
        None,
        None,
        [{spec.name: (SMALL, SMALL, LARGE) for spec in INPUTS}],
        [StageTiming("export", 1.5, 10**9)],
    )
    assert found["artefact"] == "e.plan"
    assert found["files"] == [
        {
            "name": "e.plan",
            "bytes": 4,
            "sha256": "64879f7d6b960a01909762d911a32d4582c20010c5641ee90278b644a9e3b525",
        }
    ]
    (profile,) = found["profiles"]
    assert profile["sample"] == {"min": [1, 4, 8, 8], "opt": [1, 4, 8, 8], "max": [4, 4, 16, 8]}
    assert found["validation"]["passed"] is None
    assert found["stages"] == [{"name": "export", "seconds": 1.5, "peak_memory": 10**9, "cached": False}]
    assert parse_manifest(json.dumps(found), "e.plan.json") == json.loads(json.dumps(found))
