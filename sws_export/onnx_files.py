"""Reading and writing of ONNX files."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import onnx_ir as ir

from sws_export.documents import open_regular
from sws_export.errors import CheckpointError, ExportError, first_items, reading_onnx
from sws_export.files import (
    FileDigest,
    HashedCopy,
    common_directory,
    external_data_path,
    file_digest,
    file_places,
    stays_below,
)
from sws_export.progress import Progress, Stage
from sws_export.tensors import SIZE_AXES, TensorSpec

EMBED_LIMIT = 256 * 2**20
"""Up to this total size, weights are stored inside the ONNX file, otherwise as external data."""

# Tensors up to this size are always stored inside.
_EMBED_TENSOR_BYTES = 256
_CHUNK_BYTES = 16 << 20


def weight_bytes(model: ir.Model) -> int:
    """Total size of all initializers in bytes."""
    return sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )


def release_weights(model: ir.Model) -> None:
    """Unmap external weights; they are mapped again when they are read.

    Pages that were read, and pages near them, count as resident memory of this process while mapped.
    """
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.release()


def load_onnx(path: Path) -> ir.Model:
    """Read the graph at `path`; external data stays on disk and is found behind symbolic and hard links.

    Raises:
        CheckpointError: The file cannot be read, is not an ONNX model, or has external data outside of its
            directory.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    with reading_onnx(path, CheckpointError):
        with open_regular(path):
            # A FIFO or device would be waited for.
            pass
        model = ir.load(path)
        if not model.graph:
            raise ValueError("the graph has no nodes")
        _require_text(model)
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _behind_links(path, value.const_value)
    return model


def _require_text(model: ir.Model) -> None:
    """Reject names that are not UTF-8, which protobuf returns as bytes.

    Raises:
        ValueError: Names the first of them.
    """
    graphs = list(model.graphs())
    names: list[object] = [
        value.name for graph in graphs for value in (*graph.inputs, *graph.initializers.values())
    ]
    for node in model.graph.all_nodes():
        names += (node.name, node.op_type, node.domain, *(value.name for value in node.outputs))
    wrong = next((name for name in names if name is not None and not isinstance(name, str)), None)
    if wrong is not None:
        raise ValueError(f"the name {wrong!r} is not UTF-8")


def _behind_links(path: Path, tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    """`tensor` of the model at `path` with an absolute location.

    onnx_ir rejects symbolic links that leave the model's directory and files with several hard links, both
    of which model caches consist of. With an absolute location and no base directory it makes no checks.
    """
    location = Path(tensor.location)
    if not stays_below(location):
        raise CheckpointError(
            f"{path}: weight '{tensor.name}' refers to external data in '{location}'; expected a file in the "
            "directory of the model"
        )
    return _moved(tensor, (path.parent / location).absolute())


def _moved(tensor: ir.ExternalTensor, location: Path, directory: Path | str = "") -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=tensor.metadata_props,
        base_dir=directory,
    )


def copy_external(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    """`tensor`, with a memory mapping of its own."""
    return _moved(tensor, Path(tensor.path))


def relocate_external_data(model: ir.Model) -> Path | None:
    """Make the external data of `model` relative to the directory that contains it, with links resolved.

    ONNX Runtime reads the external data of a serialized model from one directory and rejects symbolic links
    that leave it.

    Returns:
        The directory, or None without external data.

    Raises:
        CheckpointError: The files are on several drives (Windows).
    """
    external = [
        (value, value.const_value)
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    if not external:
        return None
    files = {tensor.path: Path(tensor.path).resolve() for _, tensor in external}
    directory = common_directory(list(files.values()))
    if directory is None:
        found = first_items([str(file) for file in files.values()])
        raise CheckpointError(
            f"the external data of the graph are on several drives: {found}; copy them into one directory"
        )
    for value, tensor in external:
        value.const_value = _moved(tensor, files[tensor.path].relative_to(directory), directory)
    return directory


@dataclasses.dataclass(frozen=True)
class WholeFiles:
    """Weight files that external data begins with, one after another; weights in them are not written again.

    Attributes:
        files: The files, with absolute paths.
        copy: Their copy at the place of the external data, if it was made already.
    """

    files: tuple[Path, ...]
    copy: HashedCopy | None = None


def save_onnx(
    model: ir.Model,
    path: Path,
    progress: Progress,
    data: Path | None = None,
    *,
    embed_limit: int | None = None,
    whole: WholeFiles | None = None,
) -> dict[Path, FileDigest]:
    """Write `model`, one tensor at a time; the bytes depend on the model and the files in `whole` only.

    Args:
        model: The graph to write.
        path: Its ONNX file.
        progress: Receives the stage.
        data: File of large weights, in the directory of `path`; by default the usual name.
        embed_limit: Bytes of weights up to which all are in the ONNX file; `EMBED_LIMIT` by default.
        whole: Files that a file of large weights begins with.

    Returns:
        The files that were written, the ONNX file first, with the digests of the bytes that were written.

    Raises:
        CheckpointError: A file with weights was truncated after its header was read.
        OSError: A file cannot be written.
    """
    weights = {
        value: value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None
    }
    total = weight_bytes(model)
    limit = EMBED_LIMIT if embed_limit is None else embed_limit
    beside = {
        value: tensor
        for value, tensor in weights.items()
        if total > limit and tensor.nbytes > _EMBED_TENSOR_BYTES
    }
    files = {}
    try:
        if beside:
            data = data or external_data_path(path)
            whole = whole or WholeFiles(())
            places = {str(file): place for file, place in file_places(whole.files).items()}
            copied = {
                value: places[str(tensor.path)] + (tensor.offset or 0)
                for value, tensor in beside.items()
                if isinstance(tensor, ir.ExternalTensor) and str(tensor.path) in places
            }
            own = [tensor for value, tensor in beside.items() if value not in copied]
            with progress.stage("save", total=total) as stage:
                files[data] = _write_data(whole, own, data, stage)
            offset = files[data].bytes - sum(tensor.nbytes for tensor in own)
            for value, tensor in beside.items():
                value.const_value = _reference(tensor, data, copied.get(value, offset))
                offset += 0 if value in copied else tensor.nbytes
        for value, tensor in weights.items():
            if value not in beside and isinstance(tensor, ir.ExternalTensor):
                (value.const_value,) = ir.external_data.convert_tensors_from_external([tensor])
        ir.save(model, path)
    finally:
        # The model of the caller keeps its references to the original weights.
        for value, tensor in weights.items():
            value.const_value = tensor
    return {path: file_digest(path), **files}


def _reference(tensor: ir.TensorProtocol, file: Path, offset: int) -> ir.ExternalTensor:
    """`tensor` as it is stored in `file`, beside the model."""
    return ir.ExternalTensor(
        file.name,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=tensor.shape,  # type: ignore[arg-type]  # the protocol's shapes are ir.Shape
        name=tensor.name or "",
        base_dir=file.parent,
    )


def _write_data(
    whole: WholeFiles, tensors: Iterable[ir.TensorProtocol], path: Path, stage: Stage
) -> FileDigest:
    """Write the files in `whole`, then the bytes of `tensors`; a second thread hashes them meanwhile."""
    digest, size = hashlib.sha256(), 0
    chunks: Iterable[memoryview] = itertools.chain(_file_chunks(whole.files), _chunks(tensors))
    if whole.copy is not None and whole.copy.path == path:
        digest, size = whole.copy.sha256.copy(), whole.copy.size
        chunks = _chunks(tensors)
        stage.advance(size)
    hashed: Future[None] | None = None
    with path.open("r+b" if size else "wb") as file, ThreadPoolExecutor(1) as hasher:
        # An earlier graph may have had tensors of its own behind the copy.
        file.truncate(size)
        file.seek(size)
        for chunk in chunks:
            # The chunk after the next is read into the same buffer.
            if hashed is not None:
                hashed.result()
            hashed = hasher.submit(digest.update, chunk)
            file.write(chunk)
            size += len(chunk)
            stage.advance(len(chunk))
    return FileDigest(size, digest.hexdigest())


def _chunks(tensors: Iterable[ir.TensorProtocol]) -> Iterator[memoryview]:
    """The bytes of `tensors` in order. Each chunk is valid until the one after the next is requested.

    External data is read, not mapped: of a file that is truncated meanwhile, a mapping would end the process.
    """
    buffers = _buffers()
    for tensor in tensors:
        if isinstance(tensor, ir.ExternalTensor):
            yield from _read(Path(tensor.path), tensor.offset or 0, tensor.nbytes, buffers)
        else:
            yield memoryview(tensor.tobytes())


def _file_chunks(files: Iterable[Path]) -> Iterator[memoryview]:
    """The bytes of `files` in order, as `_chunks`."""
    buffers = _buffers()
    for file in files:
        yield from _read(file, 0, file.stat().st_size, buffers)


def _buffers() -> list[memoryview]:
    return [memoryview(bytearray(_CHUNK_BYTES)) for _ in range(2)]


def _read(file: Path, begin: int, left: int, buffers: list[memoryview]) -> Iterator[memoryview]:
    with file.open("rb", buffering=0) as source:
        source.seek(begin)
        while left:
            buffers.reverse()
            count = source.readinto(buffers[0][: min(left, _CHUNK_BYTES)])
            if not count:
                raise CheckpointError(f"{file} was truncated after its header was read; download it again")
            yield buffers[0][:count]
            left -= count


def save_sharing_weights(
    model: ir.Model, path: Path, other: ir.Model, saved: Path, progress: Progress
) -> dict[Path, FileDigest]:
    """Write `model` with references to the external weights of another graph.

    If the other graph has no external weights, this is `save_onnx`.

    Args:
        model: The graph to write.
        path: Its ONNX file.
        other: A graph with the same weights.
        saved: The ONNX file of `other`, in the directory of `path`.
        progress: Receives the stage.

    Returns:
        The files that were written, with the digests of the bytes that were written.

    Raises:
        OSError: `path` cannot be written.
    """
    written = ir.load(saved).graph.initializers
    external = {
        id(value.const_value): written[name].const_value
        for name, value in other.graph.initializers.items()
        if isinstance(written[name].const_value, ir.ExternalTensor)
    }
    if not external:
        return save_onnx(model, path, progress)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if id(tensor) in external:
            value.const_value = external[id(tensor)]
        elif isinstance(tensor, ir.ExternalTensor):
            # Deduplication kept one of several equal small weights, here another one than in `other`.
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
    ir.save(model, path)
    return {path: file_digest(path)}


def declared_sizes(model: ir.Model) -> dict[str, int]:
    """Sizes that are static in the graph, by the symbols of `SIZE_AXES`."""
    inputs = {value.name: value.shape for value in model.graph.inputs}
    sizes = {}
    for symbol, (name, axis) in SIZE_AXES.items():
        shape = inputs.get(name)
        dim = shape[axis] if shape is not None else None
        if isinstance(dim, int):
            sizes[symbol] = dim
    return sizes


def graph_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of the inputs or outputs of a graph.

    Raises:
        ExportError: An input or output has no declared dtype or shape.
    """
    specs = []
    for value in values:
        if value.dtype is None or value.shape is None or value.name is None:
            raise ExportError(f"input or output {value.name} of the graph has no declared type and shape")
        dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
        specs.append(TensorSpec(value.name, _dtype_name(value.dtype), dims))
    return tuple(specs)


def _dtype_name(dtype: ir.DataType) -> str:
    return {"float": "float32"}.get(dtype.name.lower(), dtype.name.lower())
