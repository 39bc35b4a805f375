"""What a deployer needs to drive an artefact, as JSON beside it and inside the ONNX file."""

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graph_passes.debug_outputs import PREFIX, debug_output_names
from graph_passes.grids import TEXT
from graph_passes.insert_sws import StatePair
from graph_passes.parameters import SwsParameters
from sws_export.cache import FileDigest
from sws_export.engines import EngineReport
from sws_export.parameters import Preset, described_parameters
from sws_export.pipeline.rewrite import GuardOptions, RewriteReport, Target
from sws_export.stage_timings import StageTiming
from sws_export.tensors import Precision, Shapes, TensorSpec
from sws_export.validation import ValidationReport

METADATA_KEY = "sws_export.manifest"
FORMAT_VERSION = 1
_LIBRARIES = ("sws-export", "torch", "diffusers", "onnx", "onnx-ir", "onnxscript")


def manifest_path(out: Path) -> Path:
    """`<out>.json`, beside the artefact."""
    return out.with_name(out.name + ".json")


def describe_graph(
    *,
    source: dict[str, Any],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    parameters: SwsParameters | None,
    rewrite: RewriteReport | None,
    precision: Precision,
    target: Target,
    guard: GuardOptions | None,
    opset: int,
) -> dict[str, Any]:
    """The part of the manifest that the graph alone decides; the same input gives the same text.

    Args:
        source: Architecture, layout and sha256 of what was exported.
        inputs: All inputs of the graph, states included.
        outputs: All outputs.
        parameters: Constants of SWS; None for a plain export.
        rewrite: Sites and states; None for a plain export.
        precision: Precision of the UNet.
        target: Runtime that the graph was lowered for.
        guard: Form of the key guard; None for a plain export.
        opset: Opset of the graph.
    """
    preset: Preset = rewrite.preset if rewrite else "sws"
    return {
        "format": FORMAT_VERSION,
        "precision": precision,
        "target": target,
        "guard": {"form": guard.form, "rows": str(guard.rows)} if guard else None,
        "opset": opset,
        "inputs": [_spec(spec) for spec in inputs],
        "outputs": [_spec(spec) for spec in outputs],
        "states": [_state(pair, preset) for pair in rewrite.states] if rewrite else [],
        "preset": preset if rewrite else None,
        "sws": described_parameters(preset, parameters) if parameters else None,
        # Inputs of which the first sample's value counts for the whole batch.
        "batch_wide": ["sigma", "intensity"] if preset == "node" else [],
        "sites": {grid.name: list(names) for grid, names in rewrite.sites.items()} if rewrite else {},
        "skipped_sites": [dataclasses.asdict(site) for site in rewrite.skipped] if rewrite else [],
        "source": source,
        "versions": library_versions(),
        **(_debug_outputs(rewrite.debug_sites) if rewrite and rewrite.debug_sites else {}),
    }


def _debug_outputs(sites: Sequence[str]) -> dict[str, Any]:
    """Which output holds which figure, and the sites that its columns are of."""
    outputs = {name.removeprefix(PREFIX): name for name in debug_output_names()}
    return {"debug_outputs": {"outputs": outputs, "sites": list(sites)}}


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _state(pair: StatePair, preset: Preset) -> dict[str, Any]:
    reset = "feed zeros at the first step of every image"
    if preset == "node":
        reset = "never: all sites and samples share it, from image to image; feed zeros for a fresh start"
    if pair.grid == TEXT:
        reset += ", and where the number of text tokens is another than at the step before"
    return {
        "input": pair.input,
        "output": pair.output,
        "grid": pair.grid.name,
        "downsampling": pair.grid.factor,
        "initial": "zeros",
        "resets": "never" if preset == "node" else "image",
        "reset": reset,
    }


def library_versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions of the libraries that shape the graph, and of `more`."""
    versions = {}
    for name in (*_LIBRARIES, *more):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def describe_profile(shapes: Shapes) -> dict[str, dict[str, list[int]]]:
    """The engine's profile: smallest, best and largest shape of each input."""
    return {
        name: {"min": list(low), "opt": list(best), "max": list(high)}
        for name, (low, best, high) in shapes.items()
    }


def complete(
    description: dict[str, Any],
    out: Path,
    files: Mapping[Path, FileDigest],
    validation: ValidationReport | None,
    engine: EngineReport | None,
    profile: dict[str, Any] | None,
    stages: Sequence[StageTiming],
) -> dict[str, Any]:
    """The manifest of an artefact: the graph's description and how this file came about."""
    return description | {
        "artefact": out.name,
        "files": [{"name": file.name, **dataclasses.asdict(found)} for file, found in files.items()],
        "validation": validation.as_dict()
        if validation
        else {"passed": None, "reason": "skipped by --no-validate"},
        "engine": dataclasses.asdict(engine) if engine else None,
        "profile": profile,
        "stages": [dataclasses.asdict(figures) for figures in stages],
    }


def embed(model: ir.Model, description: dict[str, Any]) -> None:
    """Store the description inside the ONNX model."""
    model.metadata_props[METADATA_KEY] = json.dumps(description, sort_keys=True)


def embedded(model: ir.Model) -> dict[str, Any] | None:
    """The description inside an ONNX model; None where sws-export did not write it."""
    text = model.metadata_props.get(METADATA_KEY)
    return dict(json.loads(text)) if text else None


def write_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Write a manifest; the caller stages it."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
