"""The bytes of a checkpoint: read one tensor, or look at all of them once."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from sws_export.checkpoint.header import StoredTensor
from sws_export.checkpoint.model import Checkpoint
from sws_export.errors import CheckpointError
from sws_export.progress import Progress

if TYPE_CHECKING:
    import torch

FusedWeights = Mapping[str, "Callable[[], torch.Tensor]"]
"""By parameter name, functions that make a weight which is not stored as it is."""

# Small enough that hashing and checking find it in the processor's cache.
_PIECE_BYTES = 4 << 20

# For each float dtype the unsigned view, the mask that takes the sign away, and the least masked value
# that is Inf or NaN. (E4M3 as safetensors and torch mean it, "fn", has no Inf and a single NaN.)
_NOT_FINITE: dict[str, tuple[str, int, int]] = {
    "F64": ("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
    "F8_E5M2": ("<u1", 0x7F, 0x7C),
    "F8_E4M3": ("<u1", 0x7F, 0x7F),
}


def read_tensor(stored: StoredTensor) -> "torch.Tensor":
    """Copy one tensor from disk, in its stored dtype and shape.

    Raises:
        CheckpointError: The file is gone or shorter than its header said.
    """
    import torch

    dtypes = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3": torch.float8_e4m3fn,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    if stored.dtype not in dtypes:
        raise CheckpointError(f"{stored.file}: tensors of dtype {stored.dtype} are not supported")
    data = np.empty(stored.nbytes, dtype=np.uint8)
    with _open(stored.file) as stream:
        stream.seek(stored.offset)
        _fill(stream, stored.file, memoryview(data.data))
    return torch.from_numpy(data).view(dtypes[stored.dtype]).reshape(stored.shape)


def verify_weights(checkpoint: Checkpoint, progress: Progress) -> str:
    """Read every byte of the checkpoint's files once: hash all, and look for NaN and Inf in the UNet.

    Returns:
        The sha256, in hex, of the bytes of the file; of several files, of their bytes one after the other
        in the order of their names (`sha256sum FILE`, or `cat FILES | sha256sum`).

    Raises:
        CheckpointError: A tensor of the UNet holds NaN or Inf, or a file changed under our hands.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE_BYTES))
    total = sum(file.stat().st_size for file in checkpoint.files)
    with progress.stage("Check weights", total) as stage, ThreadPoolExecutor(1) as hasher:
        for file in checkpoint.files:
            tensors = {name: tensor for name, tensor in checkpoint.stored.items() if tensor.file == file}
            with _open(file) as stream:
                for name, begin, length in _pieces(tensors, file.stat().st_size):
                    piece = buffer[:length]
                    _fill(stream, file, piece)
                    # hashlib lets go of the interpreter lock, so both look at the piece at the same time.
                    hashed = hasher.submit(digest.update, piece)
                    try:
                        if name is not None:
                            _refuse_not_finite(name, tensors[name], begin, piece)
                    finally:
                        hashed.result()
                    stage.advance(length)
    return digest.hexdigest()


def _pieces(tensors: dict[str, StoredTensor], size: int) -> Iterator[tuple[str | None, int, int]]:
    """Cut a file into (tensor or None, offset, length), in order, each inside one tensor or outside all."""
    position = 0
    places = sorted((tensor.offset, tensor.nbytes, name) for name, tensor in tensors.items())
    spans: list[tuple[str | None, int, int]] = []
    for offset, nbytes, name in places:
        spans.append((None, position, offset))
        spans.append((name, offset, offset + nbytes))
        position = offset + nbytes
    spans.append((None, position, size))
    for span, begin, end in spans:
        for offset in range(begin, end, _PIECE_BYTES):
            yield span, offset, min(_PIECE_BYTES, end - offset)


def _refuse_not_finite(name: str, tensor: StoredTensor, offset: int, piece: memoryview) -> None:
    if tensor.dtype not in _NOT_FINITE:
        return
    view, mask, limit = _NOT_FINITE[tensor.dtype]
    values = np.frombuffer(piece, dtype=view) & np.asarray(mask, dtype=view)
    if values.max() < limit:
        return
    local = int(np.argmax(values >= limit))
    index = (offset - tensor.offset) // values.itemsize + local
    place = [int(i) for i in np.unravel_index(index, tensor.shape)] if tensor.shape else []
    kind = "Inf" if values[local] == limit and tensor.dtype != "F8_E4M3" else "NaN"
    raise CheckpointError(
        f"{tensor.file}: tensor '{name}' ({tensor.dtype}, shape {list(tensor.shape)}) holds {kind} at "
        f"{place}; the model is broken (often by a merge or a conversion to fp16): use another copy"
    )


def _open(file: Path) -> BinaryIO:
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


def _fill(stream: BinaryIO, file: Path, target: memoryview) -> None:
    filled = 0
    while filled < len(target):
        count = stream.readinto(target[filled:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{file} became shorter while it was read; fetch it again")
        filled += count
