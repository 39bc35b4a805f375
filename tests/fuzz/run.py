"""Runs damaged files through every parser and counts what happens.

    python -m tests.fuzz.run 2000

A case ends in a result or in one SwsExportError. Anything else, more than 5 s, more than 1 GB of memory, and
files that are left behind are faults.
"""

import contextlib
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from sws_export.errors import SwsExportError
from tests.fuzz.parsers import Parser, parsers, put

SECONDS = 5.0
MEMORY = 10**9


class Hang(BaseException):
    """A case took too long; no parser catches it."""


@dataclass
class Counts:
    """What happened to the damaged files of one parser."""

    cases: int = 0
    results: int = 0
    refused: int = 0
    slowest: float = 0.0
    memory: int = 0


def fuzz(parser: Parser, cases: int, folder: Path, number: int = 0) -> Counts:
    """Run `cases` damaged files through a parser.

    Raises:
        BaseException: The first fault, with the smallest damage that causes it.
    """
    counts = Counts()

    @seed(number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(parser.damaged)
    def run(content: Any) -> None:
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        parser.write(work)
        put(work / parser.place, content)
        before, found = listing(work), tempfile.tempdir
        (folder / "tmp").mkdir(exist_ok=True)
        tempfile.tempdir = str(folder / "tmp")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.perf_counter()
        try:
            with time_limit():
                parser.read(work)
            counts.results += 1
        except SwsExportError:
            counts.refused += 1
        finally:
            tempfile.tempdir = found
            counts.cases += 1
        counts.slowest = max(counts.slowest, time.perf_counter() - begin)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
        counts.memory = max(counts.memory, grown)
        assert grown < MEMORY, f"{grown / 1e9:.1f} GB of memory"
        left = listing(work) - before
        # Reading an entry of the cache may extract its files and remove it.
        assert "cache" in parser.name or not left, f"left behind: {left}"
        assert not any((folder / "tmp").iterdir()), "a temporary file is left"

    run()
    return counts


def listing(folder: Path) -> set[Path]:
    """All paths below a directory."""
    return set(folder.rglob("*"))


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise `Hang` in a block that takes longer than `SECONDS`."""

    def ring(*_: object) -> None:
        raise Hang(f"more than {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(total: int) -> None:
    """Print a table of the counts."""
    kinds = parsers()
    print(f"{'parser':<20}{'cases':>7}{'results':>9}{'refused':>9}{'slowest':>10}{'memory':>10}")
    sums = Counts()
    for parser in kinds:
        with tempfile.TemporaryDirectory() as folder:
            counts = fuzz(parser, total // len(kinds) + 1, Path(folder))
        for name in ("cases", "results", "refused"):
            setattr(sums, name, getattr(sums, name) + getattr(counts, name))
        sums.slowest, sums.memory = max(sums.slowest, counts.slowest), max(sums.memory, counts.memory)
        print_row(parser.name, counts)
    print_row("all", sums)


def print_row(name: str, counts: Counts) -> None:
    """One row of the table."""
    print(
        f"{name:<20}{counts.cases:>7}{counts.results:>9}{counts.refused:>9}{counts.slowest:>8.2f} s"
        f"{counts.memory / 1e6:>7.0f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
