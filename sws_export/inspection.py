"""Describing a file, a checkpoint, ONNX graph, manifest or engine, without loading its weights."""

import contextlib
from pathlib import Path
from typing import Any

from sws_export.documents import parse_json, read_text
from sws_export.errors import CheckpointError, EngineError, ExportError
from sws_export.files import ENGINE_SUFFIXES
from sws_export.manifest import Manifest, manifest_path, read_embedded, read_embedded_text, read_manifest

_SHOWN = (
    "precision",
    "quantization",
    "preset",
    "states",
    "sites",
    "sws",
    "guard",
    "profiles",
    "validation",
    "source",
    "versions",
)


def inspect_file(path: Path) -> dict[str, Any]:
    """Describe `path` as plain values.

    Raises:
        SwsExportError: It is of none of these kinds, or is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.suffix == ".onnx":
        return _inspect_graph(path)
    if path.suffix in ENGINE_SUFFIXES:
        return _inspect_engine(path)
    if path.suffix == ".json" and _is_manifest(path):
        manifest = read_manifest(path)
        return {"kind": "manifest", **manifest} | _warnings(path.with_suffix(""), manifest)
    return _inspect_checkpoint(path)


def _is_manifest(path: Path) -> bool:
    """Whether this JSON file is a manifest rather than the configuration of a model."""
    try:
        found = parse_json(read_text(path))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "artefact" in found


def _shown(manifest: Manifest) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name in _SHOWN}


def _warnings(artefact: Path, manifest: Manifest) -> dict[str, list[str]]:
    """A warning if the manifest was written for another artefact than the one beside it."""
    from sws_export.runtime.contract import read_contract
    from sws_export.runtime.integrity import check_embedded

    try:
        read_contract(artefact)
        if artefact.suffix == ".onnx":
            check_embedded(artefact, manifest, read_embedded_text(artefact))
    except EngineError as error:
        return {"warnings": [str(error)]}
    return {}


def _inspect_graph(path: Path) -> dict[str, Any]:
    # Imports are local because each kind of file needs other modules, some of them slow to import.
    from graph_passes.find_sites import find_sites
    from graph_passes.grids import sorted_grids
    from graph_passes.name_nodes import NameNodes
    from sws_export.onnx_files import graph_specs, load_onnx
    from sws_export.sources.other_exporters import adapt, rename_inputs

    model = load_onnx(path)
    manifest = read_embedded(path)
    facts: dict[str, Any] = {
        "kind": "onnx",
        "opset": model.graph.opset_imports.get("", 0),
        "nodes": sum(1 for _ in model.graph.all_nodes()),
        "producer": f"{model.producer_name} {model.producer_version or ''}".strip(),
        "inputs": [
            f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in graph_specs(model.graph.inputs)
        ],
        "outputs": [
            f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in graph_specs(model.graph.outputs)
        ],
    }
    if manifest is not None:
        beside = manifest_path(path)
        if not beside.is_file():
            warning = f"{beside.name} is missing: the graph cannot be loaded for running without it"
            return facts | _shown(manifest) | {"warnings": [warning]}
        return facts | _shown(manifest) | _warnings(path, read_manifest(beside))
    with contextlib.suppress(ExportError):
        # A graph that an export would reject is described, too.
        NameNodes()(model)
        adapt(path, model, rename_inputs(model))
    sites, skipped = find_sites(model, cross_attention=True)
    return facts | {
        "sites": {
            grid.name: [site.name for site in sites if site.key_grid == grid]
            for grid in sorted_grids(site.key_grid for site in sites)
        },
        "skipped_sites": [f"{site.name}: {site.reason}" for site in skipped],
    }


def _inspect_engine(path: Path) -> dict[str, Any]:
    import dataclasses

    from sws_export.engines.header import plan_header

    facts = {"kind": "engine"} | dataclasses.asdict(plan_header(path))
    beside = manifest_path(path)
    if not beside.is_file():
        return facts | {
            "manifest": f"{beside.name} is missing: the inputs and states of this engine are not known"
        }
    manifest = read_manifest(beside)
    return facts | _shown(manifest) | _gpu_memory(manifest) | _warnings(path, manifest)


def _gpu_memory(manifest: Manifest) -> dict[str, Any]:
    """The GPU memory of an engine with each profile, in words; nothing where it was not recorded."""
    from sws_export.engines.gpu_memory import GpuMemory

    engine = manifest.get("engine")
    recorded = engine.get("gpu_memory") if engine else None
    if recorded is None:
        return {}
    memory = GpuMemory.from_json(recorded)
    return {"gpu_memory": [memory.describe(index) for index in range(len(memory.profiles))]}


def _inspect_checkpoint(path: Path) -> dict[str, Any]:
    from sws_export.checkpoint import open_checkpoint

    found = open_checkpoint(path)
    return {
        "kind": "checkpoint",
        "family": found.family,
        "layout": found.layout,
        "files": [str(file) for file in found.files],
        "parameters": found.parameter_count,
        "bytes": found.nbytes,
        "dtypes": found.dtypes,
        "configuration": found.config_source,
        "prediction_type": found.prediction.type,
        "prediction_source": found.prediction.source or "assumed",
        "sampling": found.prediction.sampling(),
        "vae_scale": found.vae_scale,
        "ignored": found.ignored,
        "remarks": list(found.remarks),
        "config": found.config,
    }
