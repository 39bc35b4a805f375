"""The command `sws-export`: which verb, signals, exit codes."""

import contextlib
import errno
import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

from sws_export.commands.shared import EscapedLog, print_line
from sws_export.errors import SwsExportError
from sws_export.extras import missing_extras_as_errors

_LONGEST_MESSAGE = 4000
# Limits of the machine and of its file systems, which any access to a file can meet.
_MACHINE_ERRORS = (
    *(errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE),
)
_VERBS = ("inspect", "validate", "plugins", "sample", "evaluate", "report", "triton", "cache")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    verb = given.pop(0) if given and given[0] in _VERBS else "export"
    # As Ctrl-C: leave through the clean-up of every stage.
    signal.signal(signal.SIGTERM, _interrupt)
    # What libraries log contains names from files.
    logging.lastResort = EscapedLog(logging.WARNING)
    try:
        with missing_extras_as_errors(), _warnings_as_lines():
            return int(importlib.import_module(f"sws_export.commands.{verb}").run(given))
    except SwsExportError as error:
        # Messages of libraries have several lines, and names in files can be of any length.
        message = " ".join(str(error).split())
        cut = f"{message[:_LONGEST_MESSAGE]}…" if len(message) > _LONGEST_MESSAGE else message
        print_line(f"sws-export: {cut}")
    except BrokenPipeError:
        # The reader of the pipe has closed it. Python would fail again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as error:
        print_line(f"sws-export: {str(error) or 'interrupted; nothing was written'}")
    except Exception as error:
        limit = _machine_error(error)
        if limit is None:
            raise
        cure = "; raise the limit with ulimit -n" if limit.errno in (errno.EMFILE, errno.ENFILE) else ""
        print_line(f"sws-export: {limit.filename or 'this process'}: {limit.strerror}{cure}")
    return 1


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print a Python warning as one line, without the line of source that gave it."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print_line(f"warning: {' '.join(str(message).split())}")
        yield


def _machine_error(error: BaseException | None) -> OSError | None:
    """The limit of the machine that caused `error`, also where a library wrapped it; None for a bug."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
            return error
        error = error.__cause__
    return None


def _interrupt(number: int, frame: object) -> NoReturn:  # noqa: ARG001  (the signature of a handler)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
