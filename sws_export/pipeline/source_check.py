"""The check of the source. A thread reads the weights once, beside tracing and rewriting."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from sws_export.checkpoint import WeightShapes
from sws_export.files import HashedCopy
from sws_export.manifest import SourceEntry
from sws_export.onnx_files import WholeFiles
from sws_export.pipeline.run_log import Recorded, RunLog
from sws_export.progress import Progress, SilentProgress
from sws_export.sources import Source

_POLL_SECONDS = 0.1
_STOP_SECONDS = 5.0


class SourceCheck:
    """The check of all weights of a source.

    Attributes:
        recorded: What the check logged; None before it was needed.
        shapes: Names and shapes of the weights that the architecture needs; None if they are to be derived
            from the configuration, and for a graph.
        copy_path: Where the thread copies the whole files that it reads; None for no copy. To be set before
            the thread starts.
    """

    def __init__(self, source: Source, log: RunLog, whole_files: tuple[Path, ...] = ()) -> None:
        """A check of `source`, of which `whole_files` become part of the external data."""
        self.recorded: Recorded | None = None
        self.shapes: WeightShapes | None = None
        self.copy_path: Path | None = None
        self._whole_files = whole_files
        self._source = source
        self._log = log
        self._reader: _Reader | None = None

    def __enter__(self) -> Self:
        """Start to read the weights."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop reading."""
        if self._reader is not None:
            self._reader.stop()

    def start(self) -> None:
        """Start to read the weights in a thread, unless that was done."""
        if self._reader is None:
            self._reader = _Reader(self._source, self.copy_path if self._whole_files else None)

    def check_names(self) -> None:
        """Compare names and shapes of the weights with the architecture, unless that was done.

        Raises:
            CheckpointError: A weight is missing or has another shape.
        """
        if self.recorded is None:
            with self._log.record(apart=True) as recorded:
                self.shapes = self._source.check(self._log, self.shapes)
            self.recorded = recorded

    @functools.cached_property
    def description(self) -> SourceEntry:
        """The source in the manifest, with the sha256 of the bytes that were read.

        The stage `check` is the time for which the rest of the export waits for this.

        Raises:
            CheckpointError: A weight is missing, has another shape, or has NaN or Inf.
        """
        self.start()
        self.check_names()
        with self._log.record(apart=True) as waiting, self._log.measure("check"):
            sha256 = self._wait()
        self.recorded = (self.recorded or Recorded()) + waiting
        return self._source.entry(sha256)

    @property
    def whole_files(self) -> WholeFiles:
        """What external data begins with, copied already if the files were read in this run.

        Raises:
            CheckpointError: As for `description`.
        """
        if self._reader is None:
            return WholeFiles(self._whole_files)
        self._reader.wait(self._log)
        return WholeFiles(self._whole_files, self._reader.copy)

    @property
    def sha256(self) -> str:
        """Digest of the source's files, in hex."""
        return str(self.description["sha256"])

    def _wait(self) -> str:
        """The digest of the bytes that were read."""
        assert self._reader is not None
        return self._reader.wait(self._log)


class _Stopped(Exception):  # noqa: N818  (ends the thread, is never raised elsewhere)
    """The digest is not needed any more."""


class _Reader(SilentProgress):
    """A thread that reads the weights, and the progress to which it reports."""

    def __init__(self, source: Source, copy_path: Path | None) -> None:
        self.copy = HashedCopy(copy_path) if copy_path else None
        self._source = source
        self._bytes = 0.0
        self._stopped = False
        self._waited = False
        self._result: str | BaseException = ""
        # A daemon, because a file system that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._read, name="read weights", daemon=True)
        self._thread.start()

    def wait(self, progress: Progress) -> str:
        """The digest; what the thread raised is raised here. The first call shows a stage."""
        if not self._waited:
            self._show(progress)
            self._waited = True
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result

    def _show(self, progress: Progress) -> None:
        """Show how much was read until the thread ends."""
        total = sum(file.stat().st_size for file in self._source.files)
        with progress.stage("check weights", total) as stage:
            shown = 0.0
            while self._thread.is_alive():
                self._thread.join(_POLL_SECONDS)
                stage.advance(self._bytes - shown)
                shown = self._bytes

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        self._thread.join(_STOP_SECONDS)

    @contextlib.contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator["_Reader"]:  # noqa: ARG002
        """Every stage counts bytes."""
        yield self

    def advance(self, amount: float = 1.0) -> None:
        """Count bytes that were read."""
        self._bytes += amount
        if self._stopped:
            raise _Stopped

    def describe(self, text: str) -> None:
        """Discard the description."""

    def _read(self) -> None:
        try:
            try:
                result = self._source.read_weights(self, self.copy)
                if self.copy is not None:
                    # Here the disk is waited for beside the rest of the export.
                    self.copy.flush()
                self._result = result
            finally:
                if self.copy is not None:
                    self.copy.close()
        except BaseException as error:
            self._result = error
