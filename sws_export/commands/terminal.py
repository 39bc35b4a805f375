"""Progress and summaries on the terminal. Everything is written to stderr; stdout is for `--json`."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sws_export.byte_sizes import format_bytes
from sws_export.commands.shared import printable
from sws_export.pipeline.run import ExportReport
from sws_export.sampling.effects import Effect
from sws_export.validation import ValidationReport

_SLOW_SECONDS = 1.0


class TerminalStage:
    """A line with a spinner, or with a progress bar if the total is known."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, amount: float = 1.0) -> None:
        """Advance the progress bar."""
        self._bars.advance(self._task, amount)

    def describe(self, text: str) -> None:
        """Show the description of the current work."""
        self._bars.update(self._task, detail=printable(text))


class TerminalProgress:
    """Progress as text: live display if stderr is a terminal, otherwise one line for each stage."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[TerminalStage]:
        """Show a stage while it runs, and its duration afterwards."""
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
        """Print a message."""
        self.console.print(printable(message), markup=False, style="dim")

    def warn(self, message: str) -> None:
        """Print a warning."""
        self.console.print(printable(f"warning: {message}"), markup=False, style="yellow")


class QuietProgress:
    """Progress that shows warnings only."""

    def __init__(self) -> None:
        self._terminal = TerminalProgress()

    @contextlib.contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[TerminalStage]:
        """Open a stage without output."""
        bars = Progress(disable=True)
        yield TerminalStage(bars, bars.add_task(name, total=total))

    def log(self, message: str) -> None:
        """Discard the message."""

    def warn(self, message: str) -> None:
        """Print a warning."""
        self._terminal.warn(message)


def print_export(console: Console, report: ExportReport) -> None:
    """Print validation, stages, files and next steps of an export."""
    if report.validation is not None:
        print_validation(console, report.validation)
    table = Table("stage", "seconds", "peak memory", "", box=None, header_style="dim", pad_edge=False)
    for timing in report.stages:
        table.add_row(
            timing.name,
            f"{timing.seconds:.1f}",
            f"{timing.peak_memory / 1e9:.2f} GB",
            "from the cache" if timing.cached else "",
        )
    if report.stages:
        console.print(table)
    console.print(f"precision: {report.precision}", markup=False)
    for line in report.gpu_memory():
        console.print(line, markup=False)
    for file in report.files:
        console.print(printable(f"wrote {file}  {format_bytes(file.stat().st_size)}"), markup=False)
    if report.manifest is None:
        console.print("dry run: nothing was written")
        return
    states = report.manifest["states"]
    if states:
        pairs = printable(", ".join(f"{pair['output']} -> {pair['input']}" for pair in states))
        console.print(
            f"next: run it with sigma, intensity (for example 0.5) and a zero state; "
            f"after each step feed back {pairs}",
            markup=False,
        )


def print_validation(console: Console, report: ValidationReport) -> None:
    """Print a table of the differences of each output, relative to its largest value."""
    sizes = report.sizes
    table = Table(
        "output", "max", "mean", "99.9 %", "tolerance", "", box=None, header_style="dim", pad_edge=False
    )
    for output in report.outputs:
        metrics = (output.maximum, output.mean, output.quantile, output.tolerance)
        result = "[green]passed[/]" if output.passed else "[red]failed[/]"
        table.add_row(Text(printable(output.name)), *(f"{metric:.1e}" for metric in metrics), result)
    if (without := report.unquantized) is not None:
        errors = (without.maximum, without.mean, without.quantile, without.tolerance)
        name = f"{printable(without.name)}, not quantized"
        table.add_row(Text(name), *(f"{error:.1e}" for error in errors))
    console.print(
        f"compared with the {report.reference}: {report.steps} steps, batch {sizes['batch']}, "
        f"latent {sizes['height']} x {sizes['width']}, {report.seconds:.0f} s",
        markup=False,
    )
    console.print(table)
    for remark in report.remarks:
        console.print(printable(f"note: {remark}"), markup=False)


def print_effects(console: Console, effects: Sequence[Effect]) -> None:
    """Print a table of the effect of each strength of SWS on the images."""
    table = Table(
        "intensity", "difference", "sharpness", "step-to-step", box=None, header_style="dim", pad_edge=False
    )
    for effect in effects:
        metrics = (effect.difference, effect.sharpness, effect.step_change)
        name = f"{effect.artefact} {effect.intensity:g}".strip()
        table.add_row(name, *("–" if metric is None else f"{metric:.4f}" for metric in metrics))
    console.print(table)
