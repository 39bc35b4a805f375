"""Conversion of numpy arrays, torch tensors and numbers to the inputs of a graph."""

import dataclasses
import importlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from sws_export.errors import OptionError, StepError
from sws_export.runtime.contract import Contract
from sws_export.runtime.pixels import with_pixels
from sws_export.runtime.profiles import check_profiles
from sws_export.tensors import DOWN_RESIDUAL, MID_RESIDUAL, SIZE_AXES, Shape, TensorSpec, concrete_shape

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class GpuTensor:
    """A contiguous torch tensor in GPU memory, which a backend uses at its address.

    Attributes:
        tensor: The tensor, on the first GPU.
        dtype: As in the manifest.
    """

    tensor: Any
    dtype: str

    @property
    def address(self) -> int:
        """Address in GPU memory, a multiple of 256."""
        return int(self.tensor.data_ptr())

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(self.tensor.numel() * self.tensor.element_size())


Buffer = Array | GpuTensor
"""An input or output of a step, in host or GPU memory."""

_ALIGNMENT = 256
"""Bytes; the alignment of addresses that TensorRT requires."""
_RANGES = {"sigma": (np.finfo(np.float32).tiny, np.finfo(np.float32).max), "intensity": (0.0, 1.0)}


def prepare_inputs(
    contract: Contract, given: Mapping[str, Any], *, on_gpu: bool = False
) -> tuple[dict[str, Buffer], dict[str, int]]:
    """The inputs of one step, contiguous and with the dtypes of the graph, and their sizes.

    A number, or an array of one element, is repeated for every sample of the batch. ControlNet residuals that
    are not given are zero.

    Args:
        contract: Of the artefact.
        given: Inputs by name; None means not given.
        on_gpu: Whether torch tensors in GPU memory stay there; otherwise they are copied to host memory. Only
            the few values of sigma, intensity and shared inputs, and whether the others are finite, are read.

    Returns:
        The arrays and tensors, and those of `batch`, `height`, `width` and `tokens` that the inputs have.

    Raises:
        StepError: An input is missing, unknown, does not consist of numbers, has a wrong shape, has NaN or
            Inf, is out of range or outside all profiles, or differs within a batch that shares it.
    """
    present = {name: value for name, value in given.items() if value is not None}
    _check_names(contract, present)
    arrays: dict[str, Buffer] = {}
    sizes = contract.static_sizes
    # The sample first: it determines the batch that numbers are repeated for.
    for spec in sorted(contract.inputs, key=lambda spec: spec.name != "sample"):
        if spec.name not in present:
            arrays[spec.name] = np.zeros(concrete_shape(spec, sizes), numpy_dtype(spec.dtype))
            continue
        value: Any = present[spec.name]
        stays = on_gpu and is_on_gpu(value)
        value = value.detach() if stays else numbers(f"input {spec.name}", value)
        if value.ndim <= 1 and math.prod(value.shape) == 1 and len(spec.shape) == 1:
            shape, one = concrete_shape(spec, sizes), value.reshape(())
            value = one.expand(shape) if stays else np.full(shape, one)
        _check_shape(contract, spec, value, sizes)
        if stays:
            arrays[spec.name] = _gpu_tensor(spec, value)
        else:
            arrays[spec.name] = _converted(f"input {spec.name}", value, spec.dtype)
        if spec.name in _RANGES:
            _check_range(spec, _on_host(arrays[spec.name]))
        check_finite(f"input {spec.name}", arrays[spec.name])
        if spec.name in contract.shared_inputs:
            _check_shared(spec, _on_host(arrays[spec.name]))
    check_profiles(contract, {name: array.shape for name, array in arrays.items()})
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


def prepare_states(contract: Contract, snapshot: Mapping[str, Any]) -> dict[str, Array]:
    """The states of a snapshot as float32 arrays.

    Raises:
        StepError: A state is missing, unknown, does not consist of numbers, has NaN or Inf, or shapes do not
            fit the states or each other.
    """
    names = [pair.spec.name for pair in contract.states]
    if not isinstance(snapshot, Mapping) or set(snapshot) != set(names):
        found = ", ".join(map(str, snapshot)) if isinstance(snapshot, Mapping) else type(snapshot).__name__
        raise StepError(f"restore: {contract.path.name} has the states {', '.join(names)}, found {found}")
    values: dict[str, Array] = {}
    sizes: dict[str, int] = {}
    for pair in contract.states:
        name = pair.spec.name
        value = numbers(f"restore: state {name}", snapshot[name])
        _check_state_shape(pair.spec, value.shape, sizes)
        values[name] = _converted(f"restore: state {name}", value, "float32")
        check_finite(f"restore: state {name}", values[name])
    return values


def is_residual(name: str) -> bool:
    """Whether an input is a ControlNet residual, which is optional and zero by default."""
    return name.startswith(DOWN_RESIDUAL) or name == MID_RESIDUAL


def is_tensor(value: object) -> TypeGuard[Any]:
    """Whether `value` is a torch tensor; does not import torch."""
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def is_on_gpu(value: object) -> bool:
    """Whether `value` is a torch tensor in the memory of an NVIDIA GPU."""
    return is_tensor(value) and bool(value.is_cuda)


def wait_for_torch(inputs: Iterable[Buffer]) -> None:
    """Wait for the work in torch's current stream that computes those of `inputs` in GPU memory.

    A backend has a stream of its own, which does not wait for others.
    """
    tensors = [buffer.tensor for buffer in inputs if isinstance(buffer, GpuTensor)]
    if tensors:
        import torch

        torch.cuda.current_stream(tensors[0].device).synchronize()


def empty_output(spec: TensorSpec, shape: tuple[int, ...], sample: Any, *, on_gpu: bool) -> Buffer:
    """An output with the dtype of `spec`, uninitialized: in GPU memory if `sample` stays there."""
    if on_gpu and is_on_gpu(sample):
        return GpuTensor(sample.detach().new_empty(shape, dtype=_torch_dtype(spec.dtype)), spec.dtype)
    return np.empty(shape, numpy_dtype(spec.dtype))


def crop(prediction: Buffer, height: int, width: int) -> Buffer:
    """The upper left part of a prediction [B, C, H, W]."""
    if isinstance(prediction, GpuTensor):
        return GpuTensor(prediction.tensor[:, :, :height, :width], prediction.dtype)
    return np.ascontiguousarray(prediction[:, :, :height, :width])


def to_numpy(value: Any) -> Array:
    """`value` in host memory; bfloat16 tensors become float32, which is exact."""
    if not is_tensor(value):
        return np.asarray(value)
    value = value.detach()
    if str(value.dtype) == "torch.bfloat16":
        value = value.float()
    return np.asarray(value.cpu().numpy())


def convert_like(array: Buffer, example: Any) -> Any:
    """`array` as a torch tensor with the device and dtype of `example` if that is one, else unchanged."""
    if isinstance(array, GpuTensor):
        return array.tensor.to(example.dtype)
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


def _on_host(buffer: Buffer) -> Array:
    return to_numpy(buffer.tensor) if isinstance(buffer, GpuTensor) else buffer


def _torch_dtype(name: str) -> Any:
    """The torch dtype of a dtype name in a manifest."""
    return getattr(importlib.import_module("torch"), name)


def _gpu_tensor(spec: TensorSpec, value: Any) -> GpuTensor:
    """`value` with the dtype of `spec`, copied on the GPU if it is not contiguous or not aligned."""
    if value.device.index not in (None, 0):
        raise StepError(
            f"input {spec.name} is on {value.device}, the artefact runs on cuda:0; move it with .to('cuda:0')"
        )
    tensor = value.to(_torch_dtype(spec.dtype)).contiguous()
    # A slice of a tensor may begin anywhere.
    return GpuTensor(tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor, spec.dtype)


def numbers(what: str, value: Any) -> Array:
    """`value` in host memory; `what` is its name in messages.

    Raises:
        StepError: It does not consist of numbers, or has no data.
    """
    try:
        array = to_numpy(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        # Ragged lists, and tensors without data.
        raise StepError(f"{what}: expected a number, an array or a tensor: {error}") from error
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise StepError(f"{what}: expected numbers, found {_short(value)} ({array.dtype.name})")
    return array


def _converted(what: str, value: Array, dtype: str) -> Array:
    """`value` as a contiguous array; a float above the range of `dtype` becomes Inf.

    Raises:
        StepError: An integer does not fit.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.ascontiguousarray(value, dtype=numpy_dtype(dtype))
    except (ValueError, OverflowError) as error:
        raise StepError(f"{what}: cannot be converted to {dtype}: {error}") from error


def check_finite(what: str, buffer: Buffer) -> None:
    """Raises StepError for NaN and Inf."""
    if not is_finite(buffer):
        array = _on_host(buffer)
        index = np.unravel_index(np.argmin(np.isfinite(array)), array.shape)
        raise StepError(
            f"{what}: expected finite numbers, found {array[index]} at {[int(place) for place in index]} "
            f"(as {array.dtype.name})"
        )


def is_finite(buffer: Buffer) -> bool:
    """Whether no element is NaN or Inf; of a tensor in GPU memory one value is read."""
    if isinstance(buffer, GpuTensor):
        return bool(buffer.tensor.isfinite().all())
    return buffer.dtype.kind in "biu" or bool(np.isfinite(buffer).all())


def _check_state_shape(spec: TensorSpec, shape: Shape, sizes: dict[str, int]) -> None:
    """Check a state's shape, and that it is one of the same sizes as the states before, in `sizes`."""
    fits = len(shape) == len(spec.shape)
    for expected, found in zip(spec.shape, shape, strict=False):
        name, _, divisor = str(expected).partition("/")
        size = found * int(divisor or 1)
        if isinstance(expected, int):
            fits &= found == expected
        else:
            fits &= found > 0 and sizes.setdefault(name, size) == size
    if not fits:
        known = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise StepError(
            f"restore: state {spec.name} has shape {list(shape)}, expected {_shape_text(spec)}"
            f"{f' (found before: {known})' if known else ''}"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


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


def _check_shape(contract: Contract, spec: TensorSpec, value: Any, sizes: dict[str, int]) -> None:
    """Check the shape of an array or tensor, and add the sizes that are not in `sizes` yet."""
    if value.ndim != len(spec.shape):
        raise StepError(
            f"input {spec.name}: expected {_shape_text(spec)}, found an array of shape {list(value.shape)}"
        )
    for axis, (expected, found) in enumerate(zip(spec.shape, value.shape, strict=True)):
        name, _, divisor = str(expected).partition("/")
        required, reason = expected, ""
        if isinstance(expected, str):
            if found < 1:
                raise StepError(f"input {spec.name}: dimension {axis} is {found}, expected at least 1")
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
    low, high = _RANGES[spec.name]
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
