"""The manifest of an export: a description of the graph, and how the artefact was made."""

import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import onnx_ir as ir

from graph_passes.debug_outputs import PREFIX, debug_output_names
from graph_passes.grids import TEXT
from graph_passes.guard import GuardOptions
from graph_passes.insert_sws import StatePair
from graph_passes.parameters import SwsParameters
from graph_passes.target import Target
from sws_export.engines.build import EngineReport
from sws_export.files import FileDigest
from sws_export.manifest import (
    FORMAT_VERSION,
    METADATA_KEY,
    DebugOutputsEntry,
    EngineEntry,
    GraphDescription,
    Manifest,
    ProfileEntry,
    QuantizationEntry,
    SourceEntry,
    StageEntry,
    StateEntry,
    SwsEntry,
    TensorEntry,
    ValidationEntry,
)
from sws_export.manifest.schema import Dtype
from sws_export.pipeline.rewrite import RewriteReport
from sws_export.presets import Preset
from sws_export.stage_timings import StageTiming
from sws_export.tensors import Precision, ProfileShapes, TensorSpec
from sws_export.validation import ValidationReport

_LIBRARIES = ("sws-export", "torch", "diffusers", "onnx", "onnx-ir", "onnxscript")


def describe_graph(
    *,
    source: SourceEntry,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    parameters: SwsParameters | None,
    rewrite: RewriteReport | None,
    precision: Precision,
    target: Target,
    guard: GuardOptions | None,
    opset: int,
    quantization: QuantizationEntry | None = None,
) -> GraphDescription:
    """The part of the manifest that depends on the graph alone; equal arguments give equal text.

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
        quantization: The 8-bit weights; None without.
    """
    preset = rewrite.preset if rewrite else None
    description: GraphDescription = {
        "format": FORMAT_VERSION,
        "precision": precision,
        "target": target.name,
        "guard": {"form": guard.form, "rows": guard.rows_text} if guard else None,
        "opset": opset,
        "inputs": [_tensor_entry(spec) for spec in inputs],
        "outputs": [_tensor_entry(spec) for spec in outputs],
        "states": [_state_entry(pair, rewrite.preset) for pair in rewrite.states] if rewrite else [],
        "preset": preset.name if preset else None,
        "sws": cast(SwsEntry, preset.used_parameters(parameters)) if preset and parameters else None,
        "shared_inputs": list(preset.shared_inputs) if preset else [],
        "sites": {grid.name: list(names) for grid, names in rewrite.sites.items()} if rewrite else {},
        "skipped_sites": [
            {"name": site.name, "reason": site.reason} for site in (rewrite.skipped if rewrite else ())
        ],
        "source": source,
        "versions": library_versions(),
        "debug_outputs": _debug_outputs(rewrite.debug_sites) if rewrite and rewrite.debug_sites else None,
    }
    if quantization is not None:
        description["quantization"] = quantization
    return description


def _debug_outputs(sites: Sequence[str]) -> DebugOutputsEntry:
    outputs = {name.removeprefix(PREFIX): name for name in debug_output_names()}
    return {"outputs": outputs, "sites": list(sites)}


def _tensor_entry(spec: TensorSpec) -> TensorEntry:
    return {"name": spec.name, "dtype": cast(Dtype, spec.dtype), "shape": list(spec.shape)}


def _state_entry(pair: StatePair, preset: Preset) -> StateEntry:
    reset = preset.reset_rule
    if pair.grid == TEXT:
        reset += ", and when the number of text tokens changes from one step to the next"
    return {
        "input": pair.input,
        "output": pair.output,
        "grid": pair.grid.name if pair.grid else "none",
        "downsampling": pair.grid.factor if pair.grid else None,
        "initial": "zeros",
        "persistent": preset.persistent_state,
        "reset": reset,
    }


def library_versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions of the libraries that affect the graph, and of `more`."""
    return {name: library_version(name) for name in (*_LIBRARIES, *more)}


@functools.cache
def library_version(name: str) -> str:
    """The version of an installed library, read once a process: metadata take a millisecond to parse."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def complete(
    description: GraphDescription,
    out: Path,
    files: Mapping[Path, FileDigest],
    validation: ValidationReport | None,
    engine: EngineReport | None,
    profiles: Sequence[ProfileShapes] | None,
    stages: Sequence[StageTiming],
) -> Manifest:
    """The manifest of an artefact.

    Args:
        description: Of the graph.
        out: The artefact.
        files: All files of the artefact, with their digests.
        validation: None where it was skipped.
        engine: None for a graph.
        profiles: Smallest, optimal and largest shape of each input, by profile; None for a graph.
        stages: Timings of the export.
    """
    skipped = {"passed": None, "reason": "skipped by --no-validate"}
    return {
        **description,
        "artefact": out.name,
        "files": [
            {"name": file.name, "bytes": digest.bytes, "sha256": digest.sha256}
            for file, digest in files.items()
        ],
        "validation": cast(ValidationEntry, validation.as_dict() if validation else skipped),
        "engine": cast(EngineEntry, dataclasses.asdict(engine)) if engine else None,
        "profiles": None if profiles is None else [_profile_entry(shapes) for shapes in profiles],
        "stages": [cast(StageEntry, dataclasses.asdict(timing)) for timing in stages],
    }


def _profile_entry(shapes: ProfileShapes) -> dict[str, ProfileEntry]:
    return {
        name: {"min": list(smallest), "opt": list(optimal), "max": list(largest)}
        for name, (smallest, optimal, largest) in shapes.items()
    }


def embed(model: ir.Model, description: GraphDescription) -> None:
    """Store the description as a metadata property of the ONNX model."""
    model.metadata_props[METADATA_KEY] = json.dumps(description, sort_keys=True)
