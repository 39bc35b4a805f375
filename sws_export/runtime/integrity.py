"""Checks that the files of an artefact, and its tensors, are those that its manifest lists."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sws_export.documents import open_regular
from sws_export.errors import EngineError
from sws_export.files import external_data_path
from sws_export.manifest import FileEntry, Manifest, manifest_path, parse_manifest, tensor_specs
from sws_export.tensors import ProfileShapes

_EMBEDDED = ("inputs", "outputs", "states", "preset", "sws", "precision", "target", "debug_outputs")
_AGAIN = "copy both files again from the same export, or export again"


class FoundTensor(NamedTuple):
    """An input or output as the runtime library reports it; a dimension is None if it has no fixed size."""

    name: str
    dtype: str
    shape: Sequence[int | str | None]


def check_files(path: Path, manifest: Manifest, *, hashes: bool = True) -> None:
    """Check that the manifest lists the artefact and the weights of a graph, with their sizes and sha256.

    Args:
        path: The artefact, which may have been renamed.
        manifest: The manifest beside it.
        hashes: Compare the sha256, too, which takes about one second per gigabyte.

    Raises:
        EngineError: A file is not listed, is missing, or differs from its entry.
    """
    entries = {entry["name"]: entry for entry in manifest.get("files", ())}
    artefact = manifest.get("artefact", path.name)
    _check_file(path, entries.get(artefact), path, hashes)
    if path.suffix != ".onnx":
        return
    # A graph refers to its weights by their name at the export.
    weights = external_data_path(path.with_name(artefact))
    names = {name for name in entries if name.endswith(".data")}
    for name in sorted(names | ({weights.name} if weights.exists() else set())):
        _check_file(path.with_name(name), entries.get(name), path, hashes)


def _check_file(file: Path, entry: FileEntry | None, artefact: Path, hashes: bool) -> None:
    beside = manifest_path(artefact).name
    if entry is None:
        raise EngineError(f"{beside} does not list {file.name} with its size and sha256; {_AGAIN}")
    if not file.is_file():
        raise EngineError(f"{file} is missing: {artefact.name} needs it; copy it from where it was made")
    try:
        with open_regular(file) as opened:
            size = opened.seek(0, 2)
            opened.seek(0)
            # A file of another size is another file, without reading it.
            same = hashes and size == entry["bytes"]
            found = hashlib.file_digest(opened, "sha256").hexdigest() if same else entry["sha256"]
    except OSError as error:
        raise EngineError(f"cannot read {file}: {error.strerror}") from error
    for what, is_now, expected in (
        ("size", f"{size} bytes", f"{entry['bytes']} bytes"),
        ("sha256", f"{found[:12]}…", f"{entry['sha256'][:12]}…"),
    ):
        if is_now != expected:
            raise EngineError(
                f"{file} is not the file that {beside} was written for: its {what} is {is_now}, expected "
                f"{expected}; {_AGAIN}"
            )


def check_embedded(path: Path, manifest: Manifest, embedded: str | None) -> None:
    """Check that the manifest beside a graph and the description inside it are of the same graph.

    Args:
        path: The graph.
        manifest: The manifest beside it.
        embedded: The metadata property of the graph, as JSON.

    Raises:
        EngineError: They differ.
    """
    inside: Mapping[str, object] = parse_manifest(embedded, str(path)) if embedded else {}
    for name in _EMBEDDED:
        if inside.get(name) != manifest.get(name):
            raise EngineError(
                f"{manifest_path(path)} is not the manifest of {path.name}: they differ in '{name}'; {_AGAIN}"
            )


def check_tensors(
    path: Path, manifest: Manifest, inputs: Iterable[FoundTensor], outputs: Iterable[FoundTensor]
) -> None:
    """Compare names, dtypes and shapes in the manifest with those of the loaded artefact, states included.

    Args:
        path: The artefact.
        manifest: Its manifest.
        inputs: As the library reports them.
        outputs: As the library reports them.

    Raises:
        EngineError: Names the tensor, and what the manifest and the artefact have.
    """
    for role, entries, tensors in (
        ("input", manifest["inputs"], inputs),
        ("output", manifest["outputs"], outputs),
    ):
        expected = {spec.name: spec for spec in tensor_specs(entries)}
        found = {tensor.name: tensor for tensor in tensors}
        for name in sorted({*expected, *found}):
            spec, tensor = expected.get(name), found.get(name)
            if spec is None or tensor is None:
                has = "the artefact has it" if spec is None else "the artefact does not have it"
                raise EngineError(_differ(path, f"{role} {name}: {has}"))
            if spec.dtype != tensor.dtype or not _same_shape(spec.shape, tensor.shape, role == "output"):
                raise EngineError(
                    _differ(
                        path,
                        f"{role} {name}: the artefact has {tensor.dtype} {_text(tensor.shape)}, the manifest "
                        f"{spec.dtype} {_text(spec.shape)}",
                    )
                )


def check_profiles(path: Path, recorded: Sequence[ProfileShapes], found: Sequence[ProfileShapes]) -> None:
    """Compare the optimization profiles in the manifest with those of the loaded engine.

    Raises:
        EngineError: Names the input whose smallest, optimal or largest shape differs.
    """
    if len(recorded) != len(found):
        raise EngineError(
            _differ(path, f"the engine has {len(found)} optimization profiles, the manifest {len(recorded)}")
        )
    for index, (profile, of_engine) in enumerate(zip(recorded, found, strict=True)):
        for name, shapes in of_engine.items():
            if profile.get(name) != shapes:
                raise EngineError(
                    _differ(
                        path,
                        f"profile {index} of {name}: the engine has {_shapes(shapes)}, the manifest "
                        f"{_shapes(profile.get(name, ()))}",
                    )
                )


def _same_shape(expected: Sequence[int | str], found: Sequence[int | str | None], output: bool) -> bool:
    """Whether each dimension is the same; a library may have a number where the manifest has a symbol."""
    return len(expected) == len(found) and all(
        size == other or (isinstance(size, str) and (other is None or (output and isinstance(other, int))))
        for size, other in zip(expected, found, strict=True)
    )


def _differ(path: Path, what: str) -> str:
    return f"{manifest_path(path)} does not describe {path.name}: {what}; {_AGAIN}"


def _text(shape: Iterable[object]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def _shapes(shapes: Iterable[Sequence[int]]) -> str:
    return " to ".join(_text(shape) for shape in shapes) or "none"
