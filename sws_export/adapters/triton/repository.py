"""A model repository for Triton Inference Server, from an artefact and its manifest."""

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sws_export.adapters.triton.config import EnumName, batched_tensor, data_type, to_text, whole_tensor
from sws_export.errors import EngineError, OptionError, OutputError
from sws_export.files import external_data_path, output_errors, staged_directory
from sws_export.manifest import manifest_path
from sws_export.runtime.contract import Contract, StateSpec, read_contract
from sws_export.tensors import SIZE_AXES, concrete_shape

Variant = Literal["native", "python"]

_MICROSECONDS = 1_000_000
_OF_ONE_VARIANT: Mapping[str, Variant] = {
    **dict.fromkeys(("height", "width", "tokens", "max_batch", "queue_microseconds"), "native"),
    "engine_host_code_allowed": "python",
}
"""Options that have a meaning with one variant only."""
_MODEL_PY = '''"""The model of this folder; Triton's Python needs the package sws-export."""

import os
import sys

# Triton starts Python 3.11 and later in isolated mode, which ignores PYTHONPATH.
sys.path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))

from sws_export.adapters.triton.model import TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
'''


@dataclasses.dataclass(frozen=True)
class TritonOptions:
    """How a model is served.

    Attributes:
        name: Name of the model; None takes that of the artefact.
        variant: `native` runs in Triton's ONNX Runtime or TensorRT backend with implicit state. A request has
            one sample, and Triton batches over sequences; if the state is shared across the batch
            (`--preset comfyui-node`), a request has a whole batch, and there is no batching over sequences.
            `python` runs in a `Session`; a request has any batch and size.
        height: Height of the latent, `native` only; None is the optimum of an engine's first profile.
        width: Width of the latent, as `height`.
        tokens: Number of text tokens, `native` only. None is the optimum of an engine's first profile if the
            artefact has a state of the text; otherwise requests may have any number.
        max_batch: Sequences in one batch, `native` only; None is the maximum of an engine's first profile,
            or 8. Must be None if the state is shared across the batch.
        max_sequences: Sequences that may be open at the same time.
        idle_seconds: Seconds without a request after which a sequence is dropped.
        queue_microseconds: Time that a request waits for others to be batched with, `native` only.
        engine_host_code_allowed: See `Session.load`; `python` only.
    """

    name: str | None = None
    variant: Variant = "native"
    height: int | None = None
    width: int | None = None
    tokens: int | None = None
    max_batch: int | None = None
    max_sequences: int = 64
    idle_seconds: int = 60
    queue_microseconds: int = 1000
    engine_host_code_allowed: bool = False

    def __post_init__(self) -> None:
        if self.variant not in ("native", "python"):
            raise OptionError(f"variant '{self.variant}' is unknown; use native or python")
        if self.name is not None and not re.fullmatch(r"[\w.-]+", self.name):
            raise OptionError(f"name '{self.name}': expected letters, digits, '.', '_' and '-' only")
        for option in ("height", "width", "tokens", "max_batch", "max_sequences", "idle_seconds"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(f"{option} {value} is out of range; at least 1 is needed")
        for option, variant in _OF_ONE_VARIANT.items():
            if variant != self.variant and getattr(self, option) != getattr(TritonOptions, option):
                raise OptionError(f"{option} has no meaning with the variant '{self.variant}'; leave it out")


def write_repository(
    artefact: Path, repository: Path, options: TritonOptions | None = None
) -> tuple[Path, ...]:
    """Add the artefact to a model repository, as `<repository>/<name>/1` with its `config.pbtxt`.

    Args:
        artefact: `.onnx`, `.plan` or `.engine`, with its manifest.
        repository: Triton's model repository; created if it does not exist.
        options: How the model is served.

    Returns:
        The files written, the configuration first.

    Raises:
        EngineError: The artefact cannot be read, or Triton has no backend for it.
        OptionError: A size is missing or outside the engine's profile.
        OutputError: The model exists already, or cannot be written.
    """
    options = options or TritonOptions()
    contract = read_contract(artefact)
    name = options.name or artefact.stem
    configure = _native_config if options.variant == "native" else _python_config
    config = configure(contract, name, options)
    with output_errors(repository):
        repository.mkdir(exist_ok=True)
    target = repository / name
    if target.exists():
        raise OutputError(f"{target} exists already; remove it, or choose another name")
    with staged_directory(target) as scratch:
        version = scratch / "1"
        version.mkdir()
        # Triton cannot load a model from an unreadable folder, and the scratch directory has mode 0700.
        scratch.chmod(0o755)
        (scratch / "config.pbtxt").write_text(to_text(config), "utf-8")
        _copy_artefact(contract, version)
        if options.variant == "python":
            (version / "model.py").write_text(_MODEL_PY, "utf-8")
        files = sorted(file.relative_to(scratch) for file in scratch.rglob("*") if file.is_file())
        with output_errors(target):
            scratch.rename(target)
    return tuple(sorted((target / file for file in files), key=lambda file: file.name != "config.pbtxt"))


def model_file(contract: Contract) -> str:
    """File name of the artefact in the version folder, as Triton's backends expect it."""
    return "model.onnx" if contract.backend == "onnxruntime" else "model.plan"


def _copy_artefact(contract: Contract, version: Path) -> None:
    target = version / model_file(contract)
    shutil.copyfile(contract.path, target)
    beside = manifest_path(contract.path)
    if beside.is_file():
        shutil.copyfile(beside, manifest_path(target))
    weights = external_data_path(contract.path)
    if contract.backend == "onnxruntime" and weights.is_file():
        # The graph refers to its weights by the name of this file.
        shutil.copyfile(weights, version / weights.name)


def _native_config(contract: Contract, name: str, options: TritonOptions) -> dict[str, Any]:
    """Implicit state: Triton keeps a state for each sequence, which starts with zeros."""
    if contract.backend == "tensorrt-rtx":
        raise EngineError(
            f"Triton's TensorRT backend cannot run {contract.path.name}, an engine of TensorRT for RTX; "
            "use the variant 'python', or an .onnx graph"
        )
    if not contract.resets_per_image:
        return _native_config_of_shared_state(contract, name, options)
    sizes = _sizes(contract, options)
    batch = _max_batch(contract, options)
    batching: dict[str, Any] = {
        "max_sequence_idle_microseconds": options.idle_seconds * _MICROSECONDS,
        "oldest": {
            "max_candidate_sequences": options.max_sequences,
            "preferred_batch_size": [batch],
            "max_queue_delay_microseconds": options.queue_microseconds,
        },
        "state": [_state(pair, concrete_shape(pair.spec, sizes)[1:]) for pair in contract.states],
    }
    return {
        "name": name,
        "backend": contract.backend,
        "max_batch_size": batch,
        "version_policy": {"latest": {"num_versions": 1}},
        "input": [batched_tensor(spec, sizes) for spec in contract.inputs],
        "output": [batched_tensor(spec, sizes) for spec in contract.outputs],
        **(
            {"sequence_batching": batching}
            if contract.states
            else {"dynamic_batching": {"max_queue_delay_microseconds": options.queue_microseconds}}
        ),
        "instance_group": [{"count": 1, "kind": _instance_kind(contract)}],
    }


def _native_config_of_shared_state(contract: Contract, name: str, options: TritonOptions) -> dict[str, Any]:
    """A request is a whole batch: its samples share the state, so that Triton cannot batch sequences."""
    if options.max_batch is not None:
        raise OptionError(
            f"max_batch {options.max_batch} has no effect for {contract.path.name}: its state is shared "
            "across the batch, so that Triton cannot batch sequences; leave it out"
        )
    sizes = _sizes(contract, options)
    del sizes["batch"]
    return {
        "name": name,
        "backend": contract.backend,
        "max_batch_size": 0,
        "version_policy": {"latest": {"num_versions": 1}},
        "input": [whole_tensor(spec, sizes) for spec in contract.inputs],
        "output": [whole_tensor(spec, sizes) for spec in contract.outputs],
        "sequence_batching": {
            "max_sequence_idle_microseconds": options.idle_seconds * _MICROSECONDS,
            "oldest": {"max_candidate_sequences": options.max_sequences},
            "state": [_state(pair, concrete_shape(pair.spec, sizes)) for pair in contract.states],
        },
        "instance_group": [{"count": 1, "kind": _instance_kind(contract)}],
    }


def _instance_kind(contract: Contract) -> EnumName:
    return EnumName("KIND_GPU" if contract.backend == "tensorrt" else "KIND_AUTO")


def _state(state: StateSpec, shape: tuple[int, ...]) -> dict[str, Any]:
    dims = list(shape)
    kind = data_type(state.spec.dtype)
    return {
        "input_name": state.spec.name,
        "output_name": state.output,
        "data_type": kind,
        "dims": dims,
        # Without it Triton starts a sequence with uninitialized memory.
        "initial_state": {"name": "empty", "data_type": kind, "dims": dims, "zero_data": True},
    }


def _sizes(contract: Contract, options: TritonOptions) -> dict[str, int]:
    """The static sizes of a native model: Triton needs a static shape for each state."""
    of_text = any("tokens" in pair.spec.shape for pair in contract.states)
    of_image = contract.resets_per_image
    wanted = {"height": of_image, "width": of_image, "tokens": of_text}
    needed = [name for name, must in wanted.items() if must or getattr(options, name) is not None]
    sizes = {"batch": 1}
    for name in needed:
        size = getattr(options, name) or _optimum(contract, name)
        if size is not None:
            _check_profile(contract, name, size)
            sizes[name] = size
    if sizes.keys() != {"batch", *needed}:
        image = ["height and width (of the latent)"] if of_image else []
        text = ["the number of text tokens"] if of_text else []
        raise OptionError(
            f"{contract.path.name} has dynamic shapes, and Triton needs a static one for each state: give "
            f"{', and '.join([*image, *text])}, or use the variant 'python'"
        )
    return sizes


def _optimum(contract: Contract, size: str) -> int | None:
    tensor, axis = SIZE_AXES[size]
    return contract.profiles[0][tensor][1][axis] if contract.profiles else contract.static_sizes.get(size)


def _check_profile(contract: Contract, name: str, size: int) -> None:
    if not contract.profiles:
        return
    tensor, axis = SIZE_AXES[name]
    smallest, _, largest = contract.profiles[0][tensor]
    if not smallest[axis] <= size <= largest[axis]:
        raise OptionError(
            f"{name} {size} is outside the engine's profile, {smallest[axis]} to {largest[axis]}"
        )


def _max_batch(contract: Contract, options: TritonOptions) -> int:
    profiles = contract.profiles
    largest = profiles[0]["sample"][2][0] if profiles else contract.static_sizes.get("batch")
    batch = options.max_batch or largest or 8
    if largest is not None and batch > largest:
        raise OptionError(f"max_batch {batch} is above the largest batch of the artefact, {largest}")
    return batch


def _python_config(contract: Contract, name: str, options: TritonOptions) -> dict[str, Any]:
    """Explicit state: Triton passes the sequence of each request, and the model keeps a stream for each."""
    controls: dict[str, dict[str, Any]] = {
        "START": {"kind": EnumName("CONTROL_SEQUENCE_START"), "fp32_false_true": [0, 1]},
        "END": {"kind": EnumName("CONTROL_SEQUENCE_END"), "fp32_false_true": [0, 1]},
        "CORRID": {"kind": EnumName("CONTROL_SEQUENCE_CORRID"), "data_type": EnumName("TYPE_UINT64")},
    }
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": 0,
        "version_policy": {"latest": {"num_versions": 1}},
        "input": [whole_tensor(spec, {}) for spec in contract.inputs],
        "output": [whole_tensor(spec, {}) for spec in contract.outputs],
        "sequence_batching": {
            "max_sequence_idle_microseconds": options.idle_seconds * _MICROSECONDS,
            "oldest": {"max_candidate_sequences": options.max_sequences},
            "control_input": [{"name": n, "control": [control]} for n, control in controls.items()],
        },
        "instance_group": [{"count": 1, "kind": EnumName("KIND_CPU")}],
        "parameters": [
            {"key": "file", "value": {"string_value": model_file(contract)}},
            {"key": "max_sequences", "value": {"string_value": str(options.max_sequences)}},
            {
                "key": "engine_host_code_allowed",
                "value": {"string_value": str(options.engine_host_code_allowed)},
            },
        ],
    }
