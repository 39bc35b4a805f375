"""Every error that sws-export raises on purpose.

    SwsExportError
      OptionError         an argument: unknown name, value out of range, profile that contradicts itself
      CheckpointError     the model file: missing, damaged, unsafe, of another architecture
      ExportError         the way from the UNet to the SWS graph
      ValidationError     the graph disagrees with the reference
      EngineError         the engine backend: not installed, refused the graph, died
        ManifestError     the manifest of an artefact: unreadable, malformed, of an unknown format
      PluginError         the TensorRT plugin library: not built, a tool is missing
      StepError           an input of a session's step: missing, of a wrong shape (runtime/errors.py)
      OutputError         the place to write to: not writable, disk full

A message says what, where, expected against found, and what to do next. The command line prints it on
one line and exits with 1; anything else that escapes is a bug and keeps its traceback.
"""

from collections.abc import Sequence

_SHOWN_ITEMS = 3


class SwsExportError(Exception):
    """Root of all errors that are the user's or the machine's, not a bug."""


class OptionError(SwsExportError):
    """An option is unknown, malformed, out of range, or contradicts another one."""


class CheckpointError(SwsExportError):
    """The model cannot be read as the UNet it should be."""


class ExportError(SwsExportError):
    """The UNet cannot be turned into the SWS graph."""


class ValidationError(SwsExportError):
    """The exported graph and the reference differ by more than the tolerance."""


class EngineError(SwsExportError):
    """The engine cannot be built or read."""


class ManifestError(EngineError):
    """The manifest of an artefact cannot be read."""


class PluginError(SwsExportError):
    """The plugin library cannot be built, found or loaded."""


class OutputError(SwsExportError):
    """An artefact cannot be written."""


def first_items(items: Sequence[str]) -> str:
    """The first three of `items` and the number of the others, for a message."""
    more = f", and {len(items) - _SHOWN_ITEMS} more" if len(items) > _SHOWN_ITEMS else ""
    return ", ".join(items[:_SHOWN_ITEMS]) + more
