"""Progress and summaries on a terminal. Everything goes to stderr; stdout is for `--json`."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from sws_export.pipeline.run import ExportReport
from sws_export.sampling.effects import Effect
from sws_export.validation import ValidationReport

_SLOW_SECONDS = 1.0


class TerminalStage:
    """A line with a spinner, or a bar where the total is known."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, amount: float = 1.0) -> None:
        """Move the bar."""
        self._bars.advance(self._task, amount)

    def describe(self, text: str) -> None:
        """Show what is being done."""
        self._bars.update(self._task, detail=text)


class TerminalProgress:
    """Progress for people: live where stderr is a terminal, one line a stage where it is a file."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[TerminalStage]:
        """Show a stage while it runs, and how long it took afterwards."""
        bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        if not self.console.is_terminal:
            self.console.print(f"{name} …")
        start = time.monotonic()
        with bars if self.console.is_terminal else contextlib.nullcontext():
            yield TerminalStage(bars, bars.add_task(name, total=total, detail=""))
        seconds = time.monotonic() - start
        if seconds >= _SLOW_SECONDS:
            self.console.print(f"[green]✓[/] {name} [dim]{seconds:.1f} s[/]")

    def log(self, message: str) -> None:
        """Print a remark."""
        self.console.print(message, markup=False, style="dim")

    def warn(self, message: str) -> None:
        """Print a warning."""
        self.console.print(f"warning: {message}", markup=False, style="yellow")


class QuietProgress:
    """Progress that shows warnings only."""

    def __init__(self) -> None:
        self._terminal = TerminalProgress()

    @contextlib.contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[TerminalStage]:
        """Show nothing."""
        bars = Progress(disable=True)
        yield TerminalStage(bars, bars.add_task(name, total=total))

    def log(self, message: str) -> None:
        """Drop the remark."""

    def warn(self, message: str) -> None:
        """Print a warning."""
        self._terminal.warn(message)


def print_export(console: Console, report: ExportReport) -> None:
    """Summary of an export: validation, stages, files, what to do next."""
    if report.validation is not None:
        print_validation(console, report.validation)
    table = Table("stage", "seconds", "peak memory", "", box=None, header_style="dim", pad_edge=False)
    for figures in report.stages:
        table.add_row(
            figures.name,
            f"{figures.seconds:.1f}",
            f"{figures.peak_memory / 1e9:.2f} GB",
            "from the cache" if figures.cached else "",
        )
    if report.stages:
        console.print(table)
    for file in report.files:
        console.print(f"wrote {file}  {_size(file)}", markup=False)
    if report.manifest is None:
        console.print("dry run: nothing was written")
        return
    states = report.manifest["states"]
    if states:
        pairs = ", ".join(f"{pair['output']} -> {pair['input']}" for pair in states)
        console.print(
            f"next: feed sigma, intensity (0.5 is a good start) and zeros as the first state; "
            f"then feed back {pairs}",
            markup=False,
        )


def print_validation(console: Console, report: ValidationReport) -> None:
    """Table of differences by output, relative to the largest value."""
    sizes = report.sizes
    table = Table(
        "output", "max", "mean", "99.9 %", "allowed", "", box=None, header_style="dim", pad_edge=False
    )
    for output in report.outputs:
        figures = (output.maximum, output.mean, output.quantile, output.tolerance)
        verdict = "[green]ok[/]" if output.passed else "[red]over[/]"
        table.add_row(output.name, *(f"{figure:.1e}" for figure in figures), verdict)
    console.print(
        f"against the {report.reference}: {report.steps} steps, batch {sizes['batch']}, "
        f"latent {sizes['height']} x {sizes['width']}, {report.seconds:.0f} s",
        markup=False,
    )
    console.print(table)
    for remark in report.remarks:
        console.print(f"note: {remark}", markup=False)


def print_effects(console: Console, effects: Sequence[Effect]) -> None:
    """Table of what each strength of SWS did to the pictures."""
    table = Table(
        "intensity", "difference", "sharpness", "step-to-step", box=None, header_style="dim", pad_edge=False
    )
    for effect in effects:
        figures = (effect.difference, effect.sharpness, effect.step_change)
        table.add_row(f"{effect.intensity:g}", *(f"{figure:.4f}" for figure in figures))
    console.print(table)


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
