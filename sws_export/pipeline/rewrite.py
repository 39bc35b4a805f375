"""Plain ONNX to SWS ONNX: which sites, which passes, what the result's contract is."""

import collections
import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Literal

import onnx_ir as ir

from graph_passes.choose_transport import ChooseTransport
from graph_passes.clean_graph import CleanGraph
from graph_passes.debug_outputs import debug_order
from graph_passes.decompose_guard_attention import DecomposeGuardAttention
from graph_passes.errors import GraphError
from graph_passes.find_sites import Site, SkippedSite, find_sites
from graph_passes.fold_constants import FoldConstants
from graph_passes.functions import Guard
from graph_passes.grids import TEXT, Grid, in_order
from graph_passes.insert_sws import InsertSws, StatePair, state_pair
from graph_passes.lower_functions import PLUGIN_OPERATORS, LowerFunctions
from graph_passes.parameters import SwsParameters
from graph_passes.set_static_shapes import SetStaticShapes
from graph_passes.split_query_chunks import SplitQueryChunks
from sws_export.errors import ExportError, OptionError
from sws_export.onnx_files import declared_sizes
from sws_export.parameters import Preset
from sws_export.presets.comfyui_node import insert_comfyui_node, node_candidates
from sws_export.progress import Progress

Target = Literal["onnxruntime", "tensorrt-rtx", "tensorrt"]

_KEPT_OPERATORS: dict[Target, frozenset[str]] = {
    "onnxruntime": frozenset(),
    "tensorrt-rtx": frozenset(),
    "tensorrt": PLUGIN_OPERATORS,
}


@dataclasses.dataclass(frozen=True)
class GuardOptions:
    """How the key guard is computed.

    Attributes:
        form: `literal` stores the logits of a site, `fused` does not.
        rows: Share of the query rows that it looks at; below 1 an approximation.
    """

    form: Guard = "literal"
    rows: Fraction = Fraction(1)


@dataclasses.dataclass(frozen=True)
class RewriteReport:
    """What a rewrite did.

    Attributes:
        sites: Names of the sites with SWS by the grid of their keys.
        skipped: Attention nodes left as they were, with the reason.
        states: State pairs, finest grid first, that of the text last.
        nodes: Nodes of the result, those in branches included.
        debug_sites: Columns of the debug outputs; none where there are no such outputs.
        preset: Whose mathematics.
    """

    sites: dict[Grid, tuple[str, ...]]
    skipped: tuple[SkippedSite, ...]
    states: tuple[StatePair, ...]
    nodes: int
    debug_sites: tuple[str, ...] = ()
    preset: Preset = "sws"

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
    preset: Preset = "sws",
    debug_outputs: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> RewriteReport:
    """Put SWS into `model`, in place, and lower it for `target`.

    Args:
        model: A plain export.
        parameters: Constants of the method.
        patterns: Shell patterns of site names; empty for all self-attention, or with the preset `node` for
            all cross-attention.
        guard: Form of the key guard.
        target: Runtime that the graph is for.
        progress: Hears which sites are taken and which are not.
        preset: Whose mathematics.
        debug_outputs: Give out what each site does at a step.
        sizes: batch, height and width (latent) and tokens, as far as the result is fixed to them.

    Raises:
        ExportError: The graph has no site that SWS can take, or is not a plain export; or the preset is
            `node` and a site that the node patches cannot be taken.
        OptionError: A pattern matches no site.
    """
    with progress.stage("rewrite") as stage:
        stage.describe("finding attention sites")
        found, skipped = find_sites(model, cross_attention=bool(patterns) or preset == "node")
        if preset == "node":
            found, skipped = node_candidates(found, skipped, patterns)
        if not found:
            raise ExportError(_no_sites(skipped))
        sites, deselected = _select(found, patterns)
        skipped += deselected
        try:
            stage.describe("inserting SWS")
            if preset == "node":
                insert_comfyui_node(model, sites, parameters, debug_outputs=debug_outputs)
            else:
                InsertSws(
                    sites,
                    parameters,
                    guard.form,
                    guard.rows,
                    # TensorRT captures a step as one CUDA graph, which has no branches.
                    branches=target == "onnxruntime",
                    # TensorRT-RTX has no kernel for float32 attention.
                    stored=target == "tensorrt-rtx",
                    debug_outputs=debug_outputs,
                )(model)
            stage.describe("lowering")
            SetStaticShapes(declared_sizes(model) | dict(sizes or {}))(model)
            if target == "onnxruntime":
                SplitQueryChunks(guard.rows)(model)
            elif target == "tensorrt-rtx":
                DecomposeGuardAttention()(model)
            kept = _KEPT_OPERATORS[target]
            if not kept:
                LowerFunctions(frozenset({"BandedTransport"}))(model)
                ChooseTransport()(model)
            LowerFunctions(kept)(model)
            FoldConstants()(model)
            CleanGraph()(model)
        except GraphError as error:
            raise ExportError(str(error)) from error
    report = dataclasses.replace(_report(model, sites, skipped), preset=preset)
    if debug_outputs:
        columns = tuple(site.name for site in debug_order(sites))
        report = dataclasses.replace(report, debug_sites=columns)
    for line in describe_sites(report):
        progress.log(line)
    if preset == "sws":
        progress.log(f"key guard: {guard.form}, {'all' if guard.rows == 1 else guard.rows} of the query rows")
    return report


def finish_plain(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Fix the sizes of a plain export and clean it, in place."""
    SetStaticShapes(sizes)(model)
    FoldConstants()(model)
    CleanGraph()(model)


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


def _select(sites: list[Site], patterns: Sequence[str]) -> tuple[list[Site], list[SkippedSite]]:
    if not patterns:
        return sites, []
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(site.name, pattern) for site in sites):
            raise OptionError(
                f"--sites '{pattern}' matches no attention site; "
                f"there are {_abbreviate(site.name for site in sites)}"
            )
    chosen = [site for site in sites if any(fnmatch.fnmatchcase(site.name, p) for p in patterns)]
    names = {site.name for site in chosen}
    return chosen, [
        SkippedSite(site.name, "not selected by --sites") for site in sites if site.name not in names
    ]


def _report(model: ir.Model, sites: Iterable[Site], skipped: Iterable[SkippedSite]) -> RewriteReport:
    by_grid: dict[Grid, list[str]] = collections.defaultdict(list)
    for site in sites:
        by_grid[site.key_grid].append(site.name)
    grids = in_order(by_grid)
    return RewriteReport(
        sites={grid: tuple(by_grid[grid]) for grid in grids},
        skipped=tuple(skipped),
        states=tuple(map(state_pair, grids)),
        nodes=sum(1 for _ in model.graph.all_nodes()),
    )


def describe_sites(report: RewriteReport) -> list[str]:
    """One line a grid, and one for each reason to skip."""
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
