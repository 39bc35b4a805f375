"""Conversion of numpy arrays, torch tensors and numbers to the inputs of a graph."""

import importlib
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from sws_export.errors import OptionError, StepError
from sws_export.runtime.contract import Contract
from sws_export.runtime.pixels import with_pixels
from sws_export.runtime.rebuild import rebuild_command
from sws_export.tensors import DOWN_RESIDUAL, MID_RESIDUAL, SIZE_AXES, Shape, TensorSpec, concrete_shape

Array = npt.NDArray[Any]

_RANGES = {"sigma": (np.finfo(np.float32).tiny, np.finfo(np.float32).max), "intensity": (0.0, 1.0)}


def prepare_inputs(contract: Contract, given: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, int]]:
    """The inputs of one step as contiguous arrays with the dtypes of the graph, and their sizes.

    A number, or an array of one element, is repeated for every sample of the batch. ControlNet residuals that
    are not given are zero.

    Args:
        contract: Of the artefact.
        given: Inputs by name; None means not given.

    Returns:
        The arrays, and those of `batch`, `height`, `width` and `tokens` that the inputs have.

    Raises:
        StepError: An input is missing, unknown, has a wrong shape, is out of range or outside the profile, or
            is not the same for the whole batch if it must be.
    """
    present = {name: value for name, value in given.items() if value is not None}
    _check_names(contract, present)
    arrays: dict[str, Array] = {}
    sizes = contract.fixed_sizes
    # The sample first: it determines the batch that numbers are repeated for.
    for spec in sorted(contract.inputs, key=lambda spec: spec.name != "sample"):
        if spec.name not in present:
            arrays[spec.name] = np.zeros(concrete_shape(spec, sizes), numpy_dtype(spec.dtype))
            continue
        value = to_numpy(present[spec.name])
        if value.size == 1 and value.ndim <= 1 and len(spec.shape) == 1:
            value = np.full(concrete_shape(spec, sizes), value.reshape(()))
        _check_shape(contract, spec, value, sizes)
        arrays[spec.name] = np.ascontiguousarray(value, dtype=numpy_dtype(spec.dtype))
        _check_range(spec, arrays[spec.name])
        if spec.name in contract.shared_inputs:
            _check_shared(spec, arrays[spec.name])
    if contract.profile is not None:
        for spec in contract.inputs:
            _check_profile(contract, spec, arrays[spec.name].shape, contract.profile[spec.name])
    return arrays, sizes


def state_shapes(contract: Contract, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shape of each state for inputs with these sizes.

    Raises:
        StepError: The latent's height or width is not divisible by the downsampling of a state.
    """
    try:
        return {pair.spec.name: concrete_shape(pair.spec, sizes) for pair in contract.states}
    except OptionError as error:
        raise StepError(f"sample: {error}") from error


def is_residual(name: str) -> bool:
    """Whether an input is a ControlNet residual, which is optional and zero by default."""
    return name.startswith(DOWN_RESIDUAL) or name == MID_RESIDUAL


def is_tensor(value: object) -> TypeGuard[Any]:
    """Whether `value` is a torch tensor; does not import torch."""
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def to_numpy(value: Any) -> Array:
    """`value` in host memory; bfloat16 tensors become float32, which is exact."""
    if not is_tensor(value):
        return np.asarray(value)
    value = value.detach()
    if str(value.dtype) == "torch.bfloat16":
        value = value.float()
    return np.asarray(value.cpu().numpy())


def convert_like(array: Array, example: Any) -> Any:
    """`array` as a torch tensor with the device and dtype of `example` if that is one, else unchanged."""
    if not is_tensor(example):
        return array
    import torch

    host = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
    return torch.from_numpy(host).to(example.device, example.dtype)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a dtype name in a manifest."""
    if name == "bfloat16":
        # The import registers the dtype with numpy.
        importlib.import_module("ml_dtypes")
    return np.dtype(name)


def _check_names(contract: Contract, present: Mapping[str, Any]) -> None:
    known = [spec.name for spec in contract.inputs]
    if missing := [name for name in known if name not in present and not is_residual(name)]:
        raise StepError(
            f"{contract.path.name} needs the input {', '.join(missing)}; it takes {', '.join(known)}"
        )
    if unknown := [name for name in present if name not in known]:
        raise StepError(
            f"{contract.path.name} has no input {', '.join(unknown)}; it takes {', '.join(known)}"
        )


def _check_shape(contract: Contract, spec: TensorSpec, value: Array, sizes: dict[str, int]) -> None:
    """Check the shape of `value`, and add the sizes that are not in `sizes` yet."""
    if value.ndim != len(spec.shape):
        raise StepError(
            f"input {spec.name}: expected {_shape_text(spec)}, found an array of shape {list(value.shape)}"
        )
    for axis, (expected, found) in enumerate(zip(spec.shape, value.shape, strict=True)):
        name, _, divisor = str(expected).partition("/")
        required, reason = expected, ""
        if isinstance(expected, str):
            required = sizes.setdefault(name, found) // int(divisor or 1)
            reason = f" ({expected}, as in the inputs before)"
        if found != required:
            raise StepError(
                f"input {spec.name}: dimension {axis} is {found}, expected {required}{reason}; "
                f"the input is {_shape_text(spec)}{_static_size_hint(contract, spec, axis)}"
            )


def _static_size_hint(contract: Contract, spec: TensorSpec, axis: int) -> str:
    """How to change a size that is static in the graph; empty for dimensions such as channels."""
    option = next((name for name, place in SIZE_AXES.items() if place == (spec.name, axis)), None)
    size = spec.shape[axis]
    if option is None or isinstance(size, str):
        return ""
    static = f"{option} {with_pixels(contract, size)}" if option in ("height", "width") else f"size of {size}"
    return f"; the {static} is static in the graph: export again with another --{option}"


def _shape_text(spec: TensorSpec) -> str:
    return f"[{', '.join(str(size) for size in spec.shape)}]"


def _check_range(spec: TensorSpec, array: Array) -> None:
    low, high = _RANGES.get(spec.name, (None, None))
    if low is None or high is None:
        return
    wrong = array[~((array >= low) & (array <= high))]
    if wrong.size:
        allowed = "a finite number above 0" if spec.name == "sigma" else f"{low:g} to {high:g}"
        raise StepError(f"input {spec.name}: expected {allowed}, found {wrong[0]:g}")


def _check_shared(spec: TensorSpec, array: Array) -> None:
    wrong = array[array != array[:1]]
    if wrong.size:
        raise StepError(
            f"input {spec.name}: expected one value for the whole batch, which this artefact shares across "
            f"the batch (--preset comfyui-node), found {array[0]:g} and {wrong[0]:g}; run the samples one "
            "after the other"
        )


def _check_profile(
    contract: Contract, spec: TensorSpec, shape: tuple[int, ...], profile: tuple[Shape, Shape, Shape]
) -> None:
    smallest, _, largest = profile
    for axis, (low, found, high) in enumerate(zip(smallest, shape, largest, strict=True)):
        if not low <= found <= high:
            is_side = (spec.name, axis) in (SIZE_AXES["height"], SIZE_AXES["width"])
            sizes = [with_pixels(contract, size) if is_side else size for size in (found, low, high)]
            raise StepError(
                f"input {spec.name}: dimension {axis} ({spec.shape[axis]}) is {sizes[0]}, the engine was "
                f"built for {sizes[1]} to {sizes[2]}; use a size in this range, or build it again with: "
                f"{rebuild_command(contract, spec, axis, found)}, and the other options as before"
            )
