"""Whether the files that an export reads stay the same until its results are stored."""

from collections.abc import Iterable
from pathlib import Path

from sws_export.cache.digests import Stamps, file_stamps
from sws_export.errors import CheckpointError


class InputFiles:
    """Size, inode and times of each file, recorded when the export begins to read it."""

    def __init__(self) -> None:
        self._stamps: dict[Path, Stamps] = {}

    def record(self, files: Iterable[Path]) -> None:
        """Record the files that are not yet recorded.

        Raises:
            CheckpointError: A file was removed.
        """
        for file in files:
            if file not in self._stamps:
                self._stamps[file] = self._now(file)

    def require_unchanged(self) -> None:
        """Check that no file was changed or replaced since it was recorded.

        Raises:
            CheckpointError: Names the file.
        """
        for file, recorded in self._stamps.items():
            if self._now(file) != recorded:
                raise CheckpointError(
                    f"{file} was changed while it was exported; nothing was written or cached: run the "
                    "command again once the file is complete"
                )

    @staticmethod
    def _now(file: Path) -> Stamps:
        try:
            return file_stamps([file])[0]
        except OSError as error:
            raise CheckpointError(
                f"{file} cannot be read any more ({error.strerror}); nothing was written or cached"
            ) from error
