"""The check of the source, skipped while a stored digest of unchanged files is all that is needed."""

from pathlib import Path
from typing import Self

from sws_export.cache import Cache
from sws_export.cache.digests import Stamps, file_stamps
from sws_export.errors import CheckpointError
from sws_export.pipeline.run_log import RunLog
from sws_export.pipeline.source_check import SourceCheck
from sws_export.sources import Source


class CachedCheck(SourceCheck):
    """A check that is skipped while a stored digest of unchanged files is all that is needed."""

    def __init__(self, source: Source, cache: Cache, log: RunLog, whole_files: tuple[Path, ...]) -> None:
        super().__init__(source, log, whole_files)
        self._digests = cache.digests
        self._stored = cache.digests.get(source.files)
        self._before: tuple[Stamps, float] | None = None

    def __enter__(self) -> Self:
        """Start to read the weights, unless their digest is stored."""
        return self if self.has_stored_digest else super().__enter__()

    def start(self) -> None:
        """Start to read the weights in a thread, unless that was done."""
        if self._before is None:
            self._before = file_stamps(self._source.files)
        super().start()

    @property
    def sha256(self) -> str:
        """Digest of the source's files, in hex."""
        return self._stored or super().sha256

    @property
    def has_stored_digest(self) -> bool:
        """Whether the digest is known without reading the files."""
        return self._stored is not None

    def require_stored_digest(self) -> None:
        """Wait until the files are read.

        Raises:
            CheckpointError: The source does not have its stored digest.
        """
        self._wait()

    def _wait(self) -> str:
        assert self._before is not None
        sha256 = super()._wait()
        if self._stored not in (None, sha256):
            self._digests.evict(self._source.files)
            raise CheckpointError(
                f"{self._source.path} was changed, and its size and times are the same as before: its "
                "weights are not those of the cached results; run the command again"
            )
        self._stored = sha256
        self._digests.put(self._source.files, *self._before, sha256)
        return sha256
