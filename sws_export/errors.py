"""Exceptions of sws-export.

    SwsExportError
      OptionError         an argument is unknown, out of range, or contradicts another one
      CheckpointError     the model file is missing, damaged, unsafe, or of another architecture
      ExportError         the UNet cannot be converted to an SWS graph
      ValidationError     the graph differs from the reference
      EngineError         the engine backend is not installed, cannot build the graph, or crashed
        ManifestError     the manifest of an artefact is unreadable, malformed, or of an unknown format
      PluginError         the TensorRT plugin library is not built, or a build tool is missing
      StepError           an input of a session step is missing, or has a wrong shape or value
      OutputError         the output path is not writable, or the disk is full
      MissingExtraError   a Python package of an extra of sws-export is not installed

A message states the problem, where it is, what was expected and found, and what to do. The command line
prints it on one line and exits with status 1. Any other exception is a bug and is printed with its traceback.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

_SHOWN_ITEMS = 3


class SwsExportError(Exception):
    """Base class of all errors caused by the input or the machine, not by a bug."""


class OptionError(SwsExportError):
    """An option is unknown, malformed, out of range, or contradicts another one."""


class CheckpointError(SwsExportError):
    """The model cannot be read, or is not a supported UNet."""


class ExportError(SwsExportError):
    """The UNet cannot be converted to an SWS graph."""


class ValidationError(SwsExportError):
    """The graph differs from the reference by more than the tolerance."""


class EngineError(SwsExportError):
    """The engine cannot be built or read."""


class ManifestError(EngineError):
    """The manifest of an artefact cannot be read."""


class MissingExtraError(SwsExportError):
    """A package of an extra of sws-export is not installed."""


class PluginError(SwsExportError):
    """The plugin library cannot be built, found or loaded."""


class StepError(SwsExportError):
    """An input of a step is missing, unknown, or of a shape or value that the artefact does not take."""


class OutputError(SwsExportError):
    """An artefact cannot be written."""


@contextlib.contextmanager
def reading_onnx(path: Path, error: type[SwsExportError]) -> Iterator[None]:
    """Raise whatever fails while the ONNX file at `path` is read as an `error` that names the file."""
    try:
        yield
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror or reason}") from reason
    except Exception as reason:  # the exceptions of protobuf and onnx_ir have no common base class
        raise error(f"{path} is not an ONNX model or is damaged: {reason}") from reason


def first_items(items: Sequence[str]) -> str:
    """The first three of `items` and the number of the others, for a message."""
    more = f", and {len(items) - _SHOWN_ITEMS} more" if len(items) > _SHOWN_ITEMS else ""
    return ", ".join(items[:_SHOWN_ITEMS]) + more
