"""Reads single tensors of a checkpoint, and verifies all of them in one pass over its files."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sws_export.checkpoint.header import StoredTensor
from sws_export.checkpoint.model import Checkpoint
from sws_export.documents import open_regular
from sws_export.errors import CheckpointError
from sws_export.files import HashedCopy
from sws_export.progress import Progress

if TYPE_CHECKING:
    import torch

FusedWeights = Mapping[str, "Callable[[], torch.Tensor]"]
"""Functions that compute weights which replace stored ones, by parameter name."""

# Large: beside a thread that runs Python code, each call waits up to 5 ms for the interpreter lock.
_CHUNK_BYTES = 16 << 20

# For each float dtype: the unsigned view, the bit of the sign, and the smallest value without sign that is
# Inf or NaN. F8_E4M3 is torch's float8_e4m3fn, which has no Inf and one NaN.
_NOT_FINITE: dict[str, tuple[str, int, int]] = {
    "F64": ("<u8", 0x8000_0000_0000_0000, 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x8000_0000, 0x7F80_0000),
    "F16": ("<u2", 0x8000, 0x7C00),
    "BF16": ("<u2", 0x8000, 0x7F80),
    "F8_E5M2": ("<u1", 0x80, 0x7C),
    "F8_E4M3": ("<u1", 0x80, 0x7F),
}


# Names of the dtypes in torch, and with ml_dtypes in numpy.
_FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
}
_DTYPES = _FLOATS | {
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_array(stored: StoredTensor) -> npt.NDArray[np.float32]:
    """Read one small floating-point tensor from disk as float32, without importing torch.

    Raises:
        CheckpointError: The file is missing or was truncated, or the dtype is not supported.
    """
    import ml_dtypes  # noqa: F401  (names its dtypes in numpy)

    if stored.dtype not in _FLOATS:
        raise CheckpointError(f"{stored.file}: expected a floating-point tensor, found {stored.dtype}")
    values = read_bytes(stored).view(np.dtype(_FLOATS[stored.dtype]))
    return np.asarray(values, dtype=np.float32).reshape(stored.shape)


def read_bytes(stored: StoredTensor) -> npt.NDArray[np.uint8]:
    """Read the bytes of one tensor from disk.

    Raises:
        CheckpointError: The file is missing or was truncated.
    """
    data = np.empty(stored.nbytes, dtype=np.uint8)
    with _open(stored.file) as stream:
        stream.seek(stored.offset)
        _fill(stream, stored.file, memoryview(data.data))
    return data


def read_tensor(stored: StoredTensor) -> "torch.Tensor":
    """Read one tensor from disk, in its stored dtype and shape; a scaled tensor in float32.

    Raises:
        CheckpointError: The file is missing or was truncated, or the dtype is not supported.
    """
    import torch

    if stored.dtype not in _DTYPES:
        raise CheckpointError(f"{stored.file}: tensors of dtype {stored.dtype} are not supported")
    dtype = getattr(torch, _DTYPES[stored.dtype])
    tensor = torch.from_numpy(read_bytes(stored)).view(dtype).reshape(stored.shape)
    if stored.scale is None:
        return tensor
    scale = read_tensor(stored.scale).float()
    return tensor.float() * (
        scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, *(1,) * (tensor.ndim - 1))
    )


def verify_weights(checkpoint: Checkpoint, progress: Progress, copy: HashedCopy | None = None) -> str:
    """Read the checkpoint's files once: hash all bytes, and check the UNet's tensors for NaN and Inf.

    Args:
        checkpoint: Where the tensors are.
        progress: Receives the stage.
        copy: Receives the bytes of all files, in the order in which they are hashed.

    Returns:
        The hexadecimal sha256 of the file; for several files, of their concatenation in the order of their
        names (`sha256sum FILE`, or `cat FILES | sha256sum`).

    Raises:
        CheckpointError: A tensor of the UNet contains NaN or Inf, or a file was truncated.
    """
    digest = copy.sha256 if copy else hashlib.sha256()
    update = copy.write if copy else digest.update
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    total = sum(file.stat().st_size for file in checkpoint.files)
    with progress.stage("check weights", total) as stage:
        for file in checkpoint.files:
            tensors = {name: tensor for name, tensor in _all_tensors(checkpoint) if tensor.file == file}
            with _open(file) as stream:
                for dtype, begin, length in _chunks(tensors.values(), file.stat().st_size):
                    chunk = buffer[:length]
                    _fill(stream, file, chunk)
                    update(chunk)
                    found = _find_not_finite(dtype, chunk) if dtype in _NOT_FINITE else None
                    if found is not None:
                        raise _not_finite(tensors, begin + found[0], found[1])
                    stage.advance(length)
    return digest.hexdigest()


def _all_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredTensor]]:
    """The UNet's tensors and their scales."""
    for name, tensor in checkpoint.stored.items():
        yield name, tensor
        if tensor.scale is not None:
            yield f"scale of {name}", tensor.scale


def _chunks(tensors: Iterable[StoredTensor], size: int) -> Iterator[tuple[str, int, int]]:
    """Chunks of a file in order: dtype, or an empty string outside of `tensors`; offset; length in bytes.

    Adjacent tensors of one dtype have chunks in common, because a checkpoint has many small tensors.
    """
    spans: list[tuple[str, int, int]] = []
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset > position:
            spans.append(("", position, tensor.offset))
        position = tensor.offset + tensor.nbytes
        if spans and spans[-1][0] == tensor.dtype:
            spans[-1] = (tensor.dtype, spans[-1][1], position)
        else:
            spans.append((tensor.dtype, tensor.offset, position))
    spans.append(("", position, size))
    for dtype, begin, end in spans:
        for offset in range(begin, end, _CHUNK_BYTES):
            yield dtype, offset, min(_CHUNK_BYTES, end - offset)


def _find_not_finite(dtype: str, chunk: memoryview) -> tuple[int, str] | None:
    """Position in bytes of the first NaN or Inf in a chunk, and which of both it is; None without any."""
    view, sign, limit = _NOT_FINITE[dtype]
    values = np.frombuffer(chunk, dtype=view)
    # The largest positive number is the maximum of signed integers, the largest negative of unsigned ones.
    if values.max() < sign | limit and values.view(view.replace("u", "i")).max() < limit:
        return None
    magnitudes = values & np.asarray(sign - 1, dtype=view)
    index = int(np.argmax(magnitudes >= limit))
    kind = "Inf" if magnitudes[index] == limit and dtype != "F8_E4M3" else "NaN"
    return index * values.itemsize, kind


def _not_finite(tensors: Mapping[str, StoredTensor], offset: int, kind: str) -> CheckpointError:
    """The error for the value `kind` at `offset` of a file with `tensors`."""
    name, tensor = next(
        (name, tensor)
        for name, tensor in tensors.items()
        if tensor.offset <= offset < tensor.offset + tensor.nbytes
    )
    flat_index = (offset - tensor.offset) // np.dtype(_NOT_FINITE[tensor.dtype][0]).itemsize
    index = [int(i) for i in np.unravel_index(flat_index, tensor.shape)] if tensor.shape else []
    return CheckpointError(
        f"{tensor.file}: tensor '{name}' ({tensor.dtype}, shape {list(tensor.shape)}) contains {kind} at "
        f"index {index}; the model is broken (often by a merge or a conversion to fp16): use another copy"
    )


def _open(file: Path) -> RawIOBase:
    try:
        return open_regular(file).detach()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


def _fill(stream: RawIOBase, file: Path, target: memoryview) -> None:
    filled = 0
    while filled < len(target):
        count = stream.readinto(target[filled:])
        if not count:
            raise CheckpointError(f"{file} was truncated after its header was read; download it again")
        filled += count
