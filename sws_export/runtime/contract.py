"""What an artefact takes and gives, read from its manifest and checked against the file."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sws_export.engines import plan_header
from sws_export.errors import EngineError
from sws_export.files import ENGINE_SUFFIXES
from sws_export.manifest import FORMAT_VERSION, METADATA_KEY, manifest_path
from sws_export.parameters import Preset
from sws_export.tensors import SIZE_AXES, Shapes, TensorSpec

PREDICTION = "out_sample"
_DECIDED_BY_GRAPH = ("inputs", "outputs", "states", "preset", "sws", "precision", "debug_outputs")


@dataclasses.dataclass(frozen=True)
class StatePair:
    """An input of the graph and the output that is fed back into it at the next step.

    Attributes:
        spec: The input.
        output: Name of the output.
        lasting: The batch shares it, and it goes on from image to image, whatever their number and size.
    """

    spec: TensorSpec
    output: str
    lasting: bool = False


@dataclasses.dataclass(frozen=True)
class Contract:
    """How an artefact is driven.

    Attributes:
        path: The artefact.
        backend: `onnxruntime`, `tensorrt` or `tensorrt-rtx`.
        inputs: Inputs that the caller gives, states left out.
        prediction: The output that the caller gets.
        states: State pairs; none for an artefact exported with --plain.
        figures: Outputs that tell what each site did, [B, sites] or [B], by the name of the figure; none
            for an artefact exported without --debug-outputs.
        profile: Smallest, best and largest shape of each input of an engine; None for a graph.
        manifest: Everything that was recorded at the export.
    """

    path: Path
    backend: str
    inputs: tuple[TensorSpec, ...]
    prediction: TensorSpec
    states: tuple[StatePair, ...]
    figures: Mapping[str, TensorSpec]
    profile: Shapes | None
    manifest: Mapping[str, Any]

    @property
    def fixed_sizes(self) -> dict[str, int]:
        """batch, height and width (latent) and tokens, as far as the graph is fixed to them."""
        shapes = {spec.name: spec.shape for spec in self.inputs}
        found = {name: shapes[tensor][axis] for name, (tensor, axis) in SIZE_AXES.items() if tensor in shapes}
        return {name: size for name, size in found.items() if isinstance(size, int)}

    @property
    def takes_intensity(self) -> bool:
        """Whether SWS is in the graph."""
        return any(spec.name == "intensity" for spec in self.inputs)

    @property
    def preset(self) -> Preset:
        """Whose mathematics is in the graph; manifests from before there were presets do not say."""
        preset: Preset = self.manifest.get("preset") or "sws"
        return preset

    @property
    def batch_wide(self) -> tuple[str, ...]:
        """Inputs [B] that must be the same for the whole batch."""
        return tuple(self.manifest.get("batch_wide", ()))

    @property
    def begins_anew(self) -> bool:
        """Whether each image begins with an empty state."""
        return not any(pair.lasting for pair in self.states)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs that the caller gets, the prediction first; states left out."""
        return (self.prediction, *self.figures.values())

    @property
    def metric_sites(self) -> tuple[str, ...]:
        """The sites that the columns of the figures are of."""
        return tuple(self.manifest.get("debug_outputs", {}).get("sites", ()))


def read_contract(path: Path, *, verify: bool = True) -> Contract:
    """The contract of the artefact at `path`.

    An engine needs its manifest `<path>.json` beside it; an ONNX graph has a copy inside.

    Args:
        path: `.onnx`, `.plan` or `.engine`.
        verify: Compare the sha256 of the artefact with the manifest's, where the manifest has one.

    Raises:
        EngineError: A file is missing, is not what its name says, or is not the one that the manifest is of.
    """
    if path.suffix != ".onnx" and path.suffix not in ENGINE_SUFFIXES:
        raise EngineError(f"{path}: expected .onnx, .plan or .engine, found '{path.suffix}'")
    if not path.is_file():
        raise EngineError(f"{path}: no such file; make it with: sws-export MODEL --out {path}")
    manifest = _beside(path)
    if manifest is None and path.suffix == ".onnx":
        manifest = _inside(path)
    if manifest is None:
        raise EngineError(
            f"the manifest {manifest_path(path)} is missing: without it the states of {path.name} and their "
            "shapes are not known; copy it from where the engine was built, or export again"
        )
    _check_format(path, manifest)
    if verify:
        _check_files(path, manifest)
    return _contract(path, _backend(path, manifest), manifest)


def check_embedded(contract: Contract, embedded: str | None) -> None:
    """Refuse a graph whose own description is not the one that lies beside it.

    Args:
        contract: What was read from the manifest.
        embedded: The metadata property of the graph, as JSON.

    Raises:
        EngineError: They differ in what the graph decides.
    """
    inside = json.loads(embedded) if embedded else {}
    for name in _DECIDED_BY_GRAPH:
        if inside.get(name) != contract.manifest.get(name):
            raise EngineError(
                f"{manifest_path(contract.path)} is not the manifest of {contract.path.name}: they differ in "
                f"'{name}'; delete the manifest (the graph has its own inside), or export again"
            )


def _beside(path: Path) -> dict[str, Any] | None:
    beside = manifest_path(path)
    if not beside.is_file():
        return None
    try:
        manifest = json.loads(beside.read_text("utf-8"))
    except ValueError as error:
        raise EngineError(f"{beside} is not a manifest: {error}; export again") from error
    if not isinstance(manifest, dict):
        raise EngineError(f"{beside} is not a manifest: expected an object; export again")
    return manifest


def _inside(path: Path) -> dict[str, Any] | None:
    import onnx_ir as ir

    try:
        text = ir.load(path).metadata_props.get(METADATA_KEY)
    except Exception as error:  # protobuf's and onnx_ir's errors share no base class
        raise EngineError(f"{path} is not an ONNX model or is damaged: {error}") from error
    if text is None:
        raise EngineError(
            f"{path} was not written by sws-export: it does not say how it is driven; "
            f"put SWS into it with: sws-export {path} --out sws.onnx"
        )
    return dict(json.loads(text))


def _check_format(path: Path, manifest: Mapping[str, Any]) -> None:
    found = manifest.get("format")
    missing = [name for name in ("inputs", "outputs", "states") if name not in manifest]
    if found != FORMAT_VERSION or missing:
        told = f"has no {' and no '.join(missing)}" if missing else f"has format {found}"
        raise EngineError(
            f"the manifest of {path} {told}; this version reads format {FORMAT_VERSION}: "
            "export again, or use the version of sws-export that wrote it"
        )


def _check_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compare the artefact, and the weights of a graph, with the sha256 that the manifest has of them."""
    for entry in manifest.get("files", ()):
        name, expected = entry["name"], entry["sha256"]
        if name == manifest.get("artefact"):
            # A renamed artefact still is the artefact; its weights are found by their name.
            file = path
        elif path.suffix == ".onnx" and name.endswith(".data"):
            file = path.with_name(name)
        else:
            continue
        if not file.is_file():
            raise EngineError(f"{file} is missing: {path.name} needs it; copy it from where it was made")
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != expected:
            raise EngineError(
                f"{file} is not the file that {manifest_path(path).name} was written for: its sha256 is "
                f"{found[:12]}…, expected {expected[:12]}…; copy both files again, or export again"
            )


def _backend(path: Path, manifest: Mapping[str, Any]) -> str:
    if path.suffix == ".onnx":
        return "onnxruntime"
    header = plan_header(path)
    engine = manifest.get("engine")
    recorded = engine["backend"] if engine else "onnxruntime"
    if header.backend != recorded:
        raise EngineError(
            f"{path} is an engine of {header.backend}, its manifest is of {recorded}: they do not belong "
            "together; copy both files again, or export again"
        )
    return header.backend


def _contract(path: Path, backend: str, manifest: Mapping[str, Any]) -> Contract:
    inputs = {entry["name"]: _spec(entry) for entry in manifest["inputs"]}
    outputs = {entry["name"]: _spec(entry) for entry in manifest["outputs"]}
    states = tuple(
        StatePair(inputs[pair["input"]], pair["output"], pair.get("resets") == "never")
        for pair in manifest["states"]
    )
    fed_back = {pair.spec.name for pair in states}
    figures = manifest.get("debug_outputs", {}).get("outputs", {})
    profile = manifest.get("profile")
    return Contract(
        path=path,
        backend=backend,
        inputs=tuple(spec for spec in inputs.values() if spec.name not in fed_back),
        prediction=outputs[PREDICTION],
        states=states,
        figures={figure: outputs[name] for figure, name in figures.items()},
        profile=_profile(profile) if profile else None,
        manifest=manifest,
    )


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"]))


def _profile(recorded: Mapping[str, Any]) -> Shapes:
    return {
        name: (tuple(shapes["min"]), tuple(shapes["opt"]), tuple(shapes["max"]))
        for name, shapes in recorded.items()
    }
