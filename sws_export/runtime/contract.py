"""The inputs and outputs of an artefact, read from its manifest and checked against the file."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from sws_export.engines.header import plan_header
from sws_export.errors import EngineError, ManifestError
from sws_export.files import ENGINE_SUFFIXES
from sws_export.manifest import (
    PREDICTION,
    Manifest,
    manifest_path,
    profiles_of,
    read_embedded,
    read_manifest,
    tensor_specs,
)
from sws_export.runtime.integrity import check_files
from sws_export.tensors import SIZE_AXES, ProfileShapes, TensorSpec

# TensorRT also builds graphs without plugins, which have the target tensorrt-rtx.
_TARGETS = {"tensorrt": ("tensorrt", "tensorrt-rtx"), "tensorrt-rtx": ("tensorrt-rtx",)}


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """An input of the graph and the output that is fed back into it at the next step.

    Attributes:
        spec: The input.
        output: Name of the output.
        persistent: The state continues from image to image and is shared across the batch, whatever the batch
            and image sizes; otherwise it resets per image.
    """

    spec: TensorSpec
    output: str
    persistent: bool = False


@dataclasses.dataclass(frozen=True)
class Contract:
    """What an artefact takes and returns.

    Attributes:
        path: The artefact.
        backend: `onnxruntime`, `tensorrt` or `tensorrt-rtx`.
        inputs: Inputs that the caller provides; states excluded.
        prediction: The UNet's output.
        states: States; none for an artefact exported with --plain.
        metrics: Output of each site metric, [B, sites] or [B], by the name of the metric; none for an
            artefact exported without --debug-outputs.
        profiles: Smallest, optimal and largest shape of each input, for each optimization profile of an
            engine; none for a graph.
        manifest: Everything that was recorded at the export.
    """

    path: Path
    backend: str
    inputs: tuple[TensorSpec, ...]
    prediction: TensorSpec
    states: tuple[StateSpec, ...]
    metrics: Mapping[str, TensorSpec]
    profiles: tuple[ProfileShapes, ...]
    manifest: Manifest

    @property
    def static_sizes(self) -> dict[str, int]:
        """The static ones of batch, height and width (of the latent) and tokens."""
        return {name: size for name, size in self._sizes().items() if isinstance(size, int)}

    @property
    def dynamic_sizes(self) -> list[str]:
        """The names of the dynamic ones of batch, height, width and tokens."""
        return [name for name, size in self._sizes().items() if isinstance(size, str)]

    def _sizes(self) -> dict[str, int | str]:
        shapes = {spec.name: spec.shape for spec in self.inputs}
        return {name: shapes[tensor][axis] for name, (tensor, axis) in SIZE_AXES.items() if tensor in shapes}

    @property
    def size_multiple(self) -> int:
        """The UNet takes latents whose height and width are multiples of it."""
        source = self.manifest["source"]
        levels = len((source.get("config") or {}).get("block_out_channels", ()))
        known = source.get("size_multiple", 2 ** max(levels - 1, 0))
        specs = (*self.inputs, *(state.spec for state in self.states))
        sides = [str(dim).partition("/") for spec in specs for dim in spec.shape]
        return math.lcm(known, *(int(by) for name, _, by in sides if name in ("height", "width") and by))

    @property
    def takes_intensity(self) -> bool:
        """Whether SWS is in the graph."""
        return any(spec.name == "intensity" for spec in self.inputs)

    @property
    def takes_sigma(self) -> bool:
        """Whether the noise level is an input; not with `--preset comfyui-node --u calls`."""
        return any(spec.name == "sigma" for spec in self.inputs)

    @property
    def preset(self) -> str | None:
        """Name of the preset; None for a plain export."""
        return self.manifest["preset"]

    def target_mismatch(self, provider: str) -> str | None:
        """Why a provider of ONNX Runtime computes the key guard slower than it could; None if it does not.

        The result is the same to the accuracy of the guard of the target that the graph was exported for.
        """
        expected = {"cpu": "onnxruntime", "cuda": "onnxruntime-cuda"}.get(provider, provider)
        target, guard = self.manifest["target"], self.manifest["guard"]
        # The literal form is the same for every target.
        if guard is None or guard["form"] != "fused" or target == expected:
            return None
        remedy = "without --backend" if provider == "cpu" else f"with --backend {expected}"
        return (
            f"{self.path} was exported for {target} and runs with the provider '{provider}', where the key "
            f"guard of another target is faster: export it again {remedy}"
        )

    @property
    def shared_inputs(self) -> tuple[str, ...]:
        """Inputs [B] that must have one value for the whole batch."""
        return tuple(self.manifest["shared_inputs"])

    @property
    def resets_per_image(self) -> bool:
        """Whether each image starts with zero states; False where a state is persistent."""
        return not any(state.persistent for state in self.states)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs that the caller receives, the prediction first; states excluded."""
        return (self.prediction, *self.metrics.values())

    @property
    def metric_sites(self) -> tuple[str, ...]:
        """The site of each column of the site metrics."""
        debug = self.manifest["debug_outputs"]
        return tuple(debug["sites"]) if debug else ()


def read_contract(path: Path, *, verify: bool = True) -> Contract:
    """The contract of the artefact at `path`.

    The manifest `<path>.json` beside the artefact must list it with its size and sha256.

    Args:
        path: `.onnx`, `.plan` or `.engine`.
        verify: Compare the sha256 of the files with those in the manifest; their sizes are always compared.

    Raises:
        EngineError: A file is missing, is of another kind than its name, or does not belong to its manifest.
    """
    if path.suffix != ".onnx" and path.suffix not in ENGINE_SUFFIXES:
        raise EngineError(f"{path}: expected .onnx, .plan or .engine, found '{path.suffix}'")
    try:
        exists = path.is_file()
    except OSError as error:  # the name is too long
        raise EngineError(f"{path}: {error.strerror}") from error
    if not exists:
        raise EngineError(f"{path}: no such file; make it with: sws-export MODEL --out {path}")
    manifest = _manifest_of(path)
    check_files(path, manifest, hashes=verify)
    return _contract(path, _backend(path, manifest), manifest)


def _manifest_of(path: Path) -> Manifest:
    beside = manifest_path(path)
    if beside.is_file():
        return read_manifest(beside)
    if path.suffix == ".onnx" and read_embedded(path) is None:
        raise ManifestError(
            f"{path} was not written by sws-export: it has no description of its inputs and states; "
            f"put SWS into it with: sws-export {path} --out sws.onnx"
        )
    raise ManifestError(
        f"the manifest {beside} is missing: without it the states of {path.name}, their shapes and the "
        "sha256 of the file are not known; copy it from where the artefact was made, or export again"
    )


def _backend(path: Path, manifest: Manifest) -> str:
    if path.suffix == ".onnx":
        return "onnxruntime"
    header = plan_header(path)
    engine = manifest.get("engine")
    recorded = engine["backend"] if engine else "onnxruntime"
    for what, found, expected in (
        ("is of", recorded, (header.backend,)),
        ("has the target", manifest["target"], _TARGETS[header.backend]),
    ):
        if found not in expected:
            raise EngineError(
                f"{path} is an engine of {header.backend}, its manifest {what} {found}: they do not belong "
                "together; copy both files again from the same export, or export again"
            )
    return header.backend


def _contract(path: Path, backend: str, manifest: Manifest) -> Contract:
    inputs = {spec.name: spec for spec in tensor_specs(manifest["inputs"])}
    outputs = {spec.name: spec for spec in tensor_specs(manifest["outputs"])}
    states = tuple(
        StateSpec(inputs[state["input"]], state["output"], state["persistent"])
        for state in manifest["states"]
    )
    state_inputs = {state.spec.name for state in states}
    debug = manifest["debug_outputs"]
    return Contract(
        path=path,
        backend=backend,
        inputs=tuple(spec for spec in inputs.values() if spec.name not in state_inputs),
        prediction=outputs[PREDICTION],
        states=states,
        metrics={metric: outputs[name] for metric, name in debug["outputs"].items()} if debug else {},
        profiles=profiles_of(manifest),
        manifest=manifest,
    )
