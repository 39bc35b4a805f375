"""Plain ONNX to SWS ONNX: site selection, the passes, and a report."""

import collections
import contextlib
import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from graph_passes.activation_dtype import activation_dtype
from graph_passes.choose_guard import MATERIALIZED_TOKENS
from graph_passes.debug_outputs import debug_order
from graph_passes.errors import GraphError
from graph_passes.find_sites import Site, SkippedSite
from graph_passes.grids import TEXT, Grid, sorted_grids
from graph_passes.guard import GuardOptions
from graph_passes.insert_sws import StatePair, state_pair
from graph_passes.parameters import SwsParameters
from graph_passes.pipeline import plain_passes, sws_passes
from graph_passes.plain_graph import require_plain
from graph_passes.target import Target
from sws_export.errors import ExportError, OptionError, SwsExportError
from sws_export.onnx_files import declared_sizes
from sws_export.presets import DEFAULT_PRESET, Preset
from sws_export.progress import Progress


@dataclasses.dataclass(frozen=True)
class RewriteReport:
    """What a rewrite did.

    Attributes:
        sites: Names of the sites with SWS by the grid of their keys.
        skipped: Attention nodes that were left unchanged, with the reason.
        states: State pairs, finest grid first, then that of the text, then those without a grid.
        nodes: Number of nodes of the result, those in branches included.
        debug_sites: Sites in the order of the columns of the debug outputs; empty without debug outputs.
        preset: Preset that was inserted.
    """

    sites: dict[Grid, tuple[str, ...]]
    skipped: tuple[SkippedSite, ...]
    states: tuple[StatePair, ...]
    nodes: int
    debug_sites: tuple[str, ...] = ()
    preset: Preset = DEFAULT_PRESET

    @property
    def site_names(self) -> tuple[str, ...]:
        """All sites with SWS."""
        return tuple(name for names in self.sites.values() for name in names)


def rewrite(
    model: ir.Model,
    parameters: SwsParameters,
    patterns: Sequence[str],
    guard: GuardOptions,
    target: Target,
    progress: Progress,
    *,
    preset: Preset = DEFAULT_PRESET,
    debug_outputs: bool = False,
    sizes: Mapping[str, int] | None = None,
    largest: Mapping[str, int] | None = None,
) -> RewriteReport:
    """Insert SWS into `model`, in place, and lower it for `target`.

    Args:
        model: A plain export.
        parameters: Constants of the method.
        patterns: Shell patterns of site names; empty for the default sites of the preset.
        guard: How the key guard is computed.
        target: Runtime that the graph is for.
        progress: Receives which sites have SWS and which were skipped.
        preset: Method to insert.
        debug_outputs: Add outputs with the metrics of each site.
        sizes: Static sizes by symbol: `batch`, `height` and `width` of the latent, `tokens`.
        largest: Largest sizes of dynamic shapes, like `sizes`, as far as they are known.

    Raises:
        ExportError: The graph has no site that SWS can be inserted at, is not a plain export, or a site that
            the preset needs has no supported form.
        OptionError: A pattern matches no site.
    """
    with progress.stage("rewrite") as stage:
        stage.describe("finding attention sites")
        with pass_errors():
            # A graph with SWS may have no attention that is recognized as a site.
            require_plain(model)
        sites, skipped = _select_sites(model, preset, patterns)
        stage.describe("inserting SWS and lowering it")
        with pass_errors():
            dtype = activation_dtype(model)
            insertion = preset.insertion(sites, parameters, guard, target, debug_outputs=debug_outputs)
            static = declared_sizes(model) | dict(sizes or {})
            sws_passes(target, insertion, static, guard.entropy_rows, largest)(model)
    report = _report(model, preset, sites, skipped, debug_outputs)
    for line in describe_sites(report):
        progress.log(line)
    if preset.fixed_guard is None:
        rows = f"{'all' if guard.entropy_rows == 1 else guard.rows} of the query rows"
        if guard.kl_only:
            rows += f" for entropies, {guard.rows} for the KL divergence"
        progress.log(f"key guard: {guard.form}, {rows}{_statistics(guard, target, dtype)}")
    return report


def rewrite_plain(model: ir.Model, *, sizes: Mapping[str, int], progress: Progress) -> None:  # noqa: ARG001  (as `rewrite`)
    """As `rewrite`, without SWS: set static `sizes` in `model`, in place.

    Raises:
        ExportError: A shape of the graph cannot have these sizes.
    """
    with pass_errors():
        plain_passes(sizes)(model)


def _statistics(guard: GuardOptions, target: Target, dtype: ir.DataType) -> str:
    """How the guard of a GPU target computes its statistics, if it is not the usual one of a CPU."""
    if guard.form != "fused" or not target.float16_attention:
        return ""
    if dtype != ir.DataType.FLOAT:
        few = f"sites of up to {MATERIALIZED_TOKENS} tokens"
        return f"; float16 attention, and materialized float32 logits at {few}"
    if target.float32_attention:
        return "; float32 attention (a float32 model)"
    return f"; materialized float32 logits: {target.name} has no float32 attention"


@contextlib.contextmanager
def pass_errors() -> Iterator[None]:
    """Raise the error of a pass, which onnx_ir wraps, as an error of the export.

    A pass that reads weights also meets those that the precision cannot represent.

    Raises:
        ExportError: A pass cannot rewrite the graph, or a weight cannot be converted.
    """
    try:
        yield
    except (GraphError, ir.passes.PassError) as error:
        cause = error.__cause__ if isinstance(error, ir.passes.PassError) else error
        if isinstance(cause, SwsExportError):
            raise cause from None
        if isinstance(cause, GraphError):
            raise ExportError(str(cause)) from error
        raise


def _select_sites(
    model: ir.Model, preset: Preset, patterns: Sequence[str]
) -> tuple[list[Site], list[SkippedSite]]:
    """The sites to insert SWS at, and all other attention nodes with a reason."""
    candidates, skipped = preset.candidate_sites(model, patterns)
    if not candidates:
        raise ExportError(_no_sites(skipped))
    if not patterns:
        return candidates, skipped
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(site.name, pattern) for site in candidates):
            raise OptionError(
                f"--sites '{pattern}' matches no attention site; "
                f"there are {_abbreviate(site.name for site in candidates)}"
            )
    sites = [site for site in candidates if any(fnmatch.fnmatchcase(site.name, p) for p in patterns)]
    names = {site.name for site in sites}
    deselected = [
        SkippedSite(site.name, "not selected by --sites") for site in candidates if site.name not in names
    ]
    return sites, [*skipped, *deselected]


def _no_sites(skipped: list[SkippedSite]) -> str:
    if not skipped:
        return (
            "the graph has no Attention node: expected an export with opset 23 or later, in which each "
            "attention is one node; export the checkpoint with sws-export instead"
        )
    reasons = collections.Counter(site.reason for site in skipped).most_common()
    return "the graph has no attention site that SWS can take: " + "; ".join(
        f"{count} × {reason}" for reason, count in reasons
    )


def _report(
    model: ir.Model,
    preset: Preset,
    sites: Sequence[Site],
    skipped: Iterable[SkippedSite],
    debug_outputs: bool,
) -> RewriteReport:
    by_grid: dict[Grid, list[str]] = collections.defaultdict(list)
    for site in sites:
        by_grid[site.key_grid].append(site.name)
    grids = sorted_grids(by_grid)
    return RewriteReport(
        sites={grid: tuple(by_grid[grid]) for grid in grids},
        skipped=tuple(skipped),
        states=(*map(state_pair, grids), *preset.extra_states()),
        nodes=sum(1 for _ in model.graph.all_nodes()),
        debug_sites=tuple(site.name for site in debug_order(sites)) if debug_outputs else (),
        preset=preset,
    )


def describe_sites(report: RewriteReport) -> list[str]:
    """One line for each grid, and one for each reason to skip a site."""
    lines = [
        f"SWS at {len(names)} sites, {_place(grid)}: {_abbreviate(names)}"
        for grid, names in report.sites.items()
    ]
    reasons: dict[str, list[str]] = collections.defaultdict(list)
    for site in report.skipped:
        reasons[site.reason].append(site.name)
    lines += [f"skipped {len(names)}, {reason}: {_abbreviate(names)}" for reason, names in reasons.items()]
    return lines


def _place(grid: Grid) -> str:
    return "cross-attention to the text" if grid == TEXT else f"latent/{grid.factor}"


def _abbreviate(names: Iterable[str]) -> str:
    """Names with the blocks of one transformer drawn together: `mid_block.attentions.0.*.attn1 ×10`."""
    short = collections.Counter(re.sub(r"transformer_blocks\.\d+", "*", name) for name in names)
    return ", ".join(name if count == 1 else f"{name} ×{count}" for name, count in short.items())
