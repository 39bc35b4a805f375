"""The check of the source, left out while the remembered digest of unchanged files is all that is needed."""

from pathlib import Path
from typing import Self

from sws_export.cache import Cache
from sws_export.cache.digests import Stamps, file_stamps
from sws_export.errors import CheckpointError
from sws_export.pipeline.run_log import RunLog
from sws_export.pipeline.source_check import SourceCheck
from sws_export.sources import Source


class CachedCheck(SourceCheck):
    """A check that is not done while the remembered digest of unchanged files is all that is needed."""

    def __init__(self, source: Source, cache: Cache, log: RunLog, whole_files: tuple[Path, ...]) -> None:
        super().__init__(source, log, whole_files)
        self._digests = cache.digests
        self._remembered = cache.digests.get(source.files)
        self._before: tuple[Stamps, float] | None = None

    def __enter__(self) -> Self:
        """Start to read the weights, unless their digest is remembered."""
        return self if self.is_remembered else super().__enter__()

    def start(self) -> None:
        """Start to read the weights in a thread, unless that was done."""
        if self._before is None:
            self._before = file_stamps(self._source.files)
        super().start()

    @property
    def sha256(self) -> str:
        """Digest of the source's files, in hex."""
        return self._remembered or super().sha256

    @property
    def is_remembered(self) -> bool:
        """Whether the digest is known without reading the files."""
        return self._remembered is not None

    def forget(self) -> None:
        """Read the files again, because the remembered digest is not theirs."""
        self._remembered = None
        self._digests.evict(self._source.files)

    def _wait(self) -> str:
        assert self._before is not None
        sha256 = super()._wait()
        if self._remembered not in (None, sha256):
            self.forget()
            raise CheckpointError(changed_unnoticed(self._source.path))
        self._remembered = sha256
        self._digests.put(self._source.files, *self._before, sha256)
        return sha256


def changed_unnoticed(path: Path) -> str:
    """The message for a source whose remembered digest is not its own."""
    return (
        f"{path} was changed and has the size and times of before: its weights are not those that the cached "
        "results are for, which are removed now; run the command again"
    )
