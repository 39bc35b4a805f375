"""The manifest of an artefact: its schema, its reader and its only validator.

A manifest is the JSON file `<artefact>.json`. The part that depends on the graph alone (`GraphDescription`)
is also stored in the ONNX file, as the metadata property `METADATA_KEY`. Only msgspec is needed here, so that
a machine that runs an artefact needs nothing else to read its manifest.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sws_export.documents import check_document, open_regular, parse_json, read_text, short
from sws_export.errors import ManifestError, reading_onnx
from sws_export.manifest.onnx_metadata import metadata_property
from sws_export.manifest.schema import (
    DebugOutputsEntry,
    EngineEntry,
    FileEntry,
    GraphDescription,
    GuardEntry,
    Manifest,
    ProfileEntry,
    QuantizationEntry,
    SamplingEntry,
    SkippedSiteEntry,
    SourceEntry,
    StageEntry,
    StateEntry,
    SwsEntry,
    TensorEntry,
    ValidationEntry,
)
from sws_export.tensors import ProfileShapes, TensorSpec

__all__ = [
    "FORMAT_VERSION",
    "METADATA_KEY",
    "PREDICTION",
    "DebugOutputsEntry",
    "EngineEntry",
    "FileEntry",
    "GraphDescription",
    "GuardEntry",
    "Manifest",
    "ProfileEntry",
    "QuantizationEntry",
    "SamplingEntry",
    "SkippedSiteEntry",
    "SourceEntry",
    "StageEntry",
    "StateEntry",
    "SwsEntry",
    "TensorEntry",
    "ValidationEntry",
    "manifest_path",
    "parse_manifest",
    "profiles_of",
    "read_embedded",
    "read_embedded_text",
    "read_manifest",
    "tensor_specs",
    "write_manifest",
]

METADATA_KEY = "sws_export.manifest"
FORMAT_VERSION = 2
PREDICTION = "out_sample"
"""Name of the output that holds the UNet's prediction."""


def manifest_path(out: Path) -> Path:
    """`<out>.json`, beside the artefact."""
    return out.with_name(out.name + ".json")


def read_manifest(path: Path) -> Manifest:
    """Read the manifest file at `path`.

    Raises:
        ManifestError: It cannot be read, or is not a manifest of a supported format.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise ManifestError(f"cannot read the manifest {path}: {error.strerror}") from error
    except ValueError as error:
        raise ManifestError(f"{path} is not a manifest: {error}; export again") from error
    return parse_manifest(text, str(path))


def read_embedded(path: Path) -> Manifest | None:
    """Read the description inside the ONNX file at `path`; None where sws-export did not write it.

    Only the few bytes of the metadata are read, however large the graph is.

    Raises:
        ManifestError: The file cannot be read, is not an ONNX model, or its description is malformed.
    """
    text = read_embedded_text(path)
    return None if text is None else parse_manifest(text, str(path))


def read_embedded_text(path: Path) -> str | None:
    """As `read_embedded`, as JSON text that is not parsed."""
    with reading_onnx(path, ManifestError), open_regular(path) as file:
        return metadata_property(file, METADATA_KEY)


def parse_manifest(text: str, name: str) -> Manifest:
    """Parse and validate a manifest; one of an older format is converted to the current one.

    Args:
        text: JSON.
        name: Where it is from, for messages.

    Raises:
        ManifestError: It is not JSON, of an unknown format, a field is missing or of another type, or the
            fields contradict each other.
    """
    try:
        document = parse_json(text)
    except ValueError as error:
        raise ManifestError(f"{name} is not a manifest: {error}; export again") from error
    if not isinstance(document, dict):
        raise ManifestError(f"{name} is not a manifest: expected a JSON object; export again")
    found = document.get("format")
    if type(found) is not int or found not in (1, FORMAT_VERSION):
        raise ManifestError(
            f"the manifest of {name} has format {short(found)}; this version reads formats 1 and "
            f"{FORMAT_VERSION}: export again, or use the version of sws-export that wrote it"
        )
    try:
        if found == 1:
            document = _from_format_1(document)
        if "profile" in document:
            # Engines had one profile at first.
            profile = document.pop("profile")
            document["profiles"] = None if profile is None else [profile]
        manifest = check_document(document, Manifest)
        _check_names(manifest)
    except ValueError as error:
        raise ManifestError(f"the manifest of {name} is malformed: {error}; export again") from error
    return manifest


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest and flush it to the disk. Raises OSError; the caller stages the file."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def tensor_specs(entries: Iterable[TensorEntry]) -> tuple[TensorSpec, ...]:
    """The inputs or outputs of a manifest."""
    return tuple(TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in entries)


def profiles_of(manifest: Manifest) -> tuple[ProfileShapes, ...]:
    """Smallest, optimal and largest shape of each input, by profile of an engine; empty for a graph."""
    return tuple(
        {
            name: (tuple(entry["min"]), tuple(entry["opt"]), tuple(entry["max"]))
            for name, entry in profile.items()
        }
        for profile in manifest.get("profiles") or ()
    )


_RENAMED_PRESETS = {"node": "comfyui-node"}
"""Names of presets in format 1 that are others now."""


def _from_format_1(document: dict[str, Any]) -> dict[str, Any]:
    """A document of format 1 with the fields of format 2; the first ones had no preset, guard and target."""
    with_sws, engine = document.get("sws") is not None, document.get("engine")
    defaults = {
        "preset": "sws" if with_sws else None,
        "guard": {"form": "literal", "rows": "1"} if with_sws else None,
        "target": engine.get("backend", "onnxruntime") if isinstance(engine, dict) else "onnxruntime",
        "debug_outputs": None,
    }
    document = defaults | document
    preset = _RENAMED_PRESETS.get(str(document["preset"]), document["preset"])
    document |= {"format": 2, "preset": preset, "shared_inputs": document.pop("batch_wide", [])}
    if isinstance(document.get("states"), list):
        document["states"] = [_state_from_format_1(state) for state in document["states"]]
    return document


def _state_from_format_1(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    kept = {name: value for name, value in state.items() if name != "resets"}
    return {"grid": f"d{kept.get('downsampling')}", **kept, "persistent": state.get("resets") == "never"}


def _check_names(manifest: Manifest) -> None:
    """Raises ValueError where a field names an input or output that the graph does not have."""
    inputs = {entry["name"] for entry in manifest["inputs"]}
    outputs = {entry["name"] for entry in manifest["outputs"]}
    debug = manifest["debug_outputs"]
    profiles = manifest.get("profiles") or ()
    for field, names, known in (
        ("states", [state["input"] for state in manifest["states"]], inputs),
        ("states", [state["output"] for state in manifest["states"]], outputs),
        ("shared_inputs", manifest["shared_inputs"], inputs),
        ("outputs", [PREDICTION], outputs),
        ("debug_outputs", debug["outputs"].values() if debug else (), outputs),
        *(("profiles", profile, inputs) for profile in profiles),
        *(("inputs", inputs, set(profile)) for profile in profiles),
    ):
        for name in names:
            if name not in known:
                raise ValueError(f"{field}: '{name}' is not among {', '.join(sorted(known))}")
    _check_states(manifest)


def _check_states(manifest: Manifest) -> None:
    """Raises ValueError where a name occurs twice, or an output does not fit the state that it becomes."""
    specs: dict[str, TensorSpec] = {}
    for spec in tensor_specs([*manifest["inputs"], *manifest["outputs"]]):
        if spec.name in specs:
            raise ValueError(f"inputs and outputs: '{spec.name}' occurs twice")
        specs[spec.name] = spec
    for number, state in enumerate(manifest["states"]):
        read, written = specs[state["input"]], specs[state["output"]]
        if (read.dtype, read.shape) != (written.dtype, written.shape):
            raise ValueError(
                f"states[{number}]: {read.name} is {read.dtype} {list(read.shape)}, {written.name} is "
                f"{written.dtype} {list(written.shape)}; expected the same"
            )
