"""Optional outputs that tell what each site did at a step."""

from collections.abc import Sequence

import onnx_ir as ir

from graph_passes.find_sites import Site
from graph_passes.grids import in_order

FLOAT = ir.DataType.FLOAT

SITE_METRICS = ("alpha_k", "a_v", "entropy_mean", "entropy_min", "entropy_max", "kl")
"""Figures of a site, as `sws.Attention` gives them in one vector."""

PREFIX = "sws_debug_"
KL_CAP = f"{PREFIX}kl_cap"


def debug_output_names() -> tuple[str, ...]:
    """Names of all debug outputs: `sws_debug_<figure>` [B, sites], and `sws_debug_kl_cap` [B]."""
    return (*(f"{PREFIX}{figure}" for figure in SITE_METRICS), KL_CAP)


def debug_order(sites: Sequence[Site]) -> list[Site]:
    """Sites in the order of the columns of the debug outputs: by grid of the keys, then as in the graph."""
    grids = in_order(site.key_grid for site in sites)
    return sorted(sites, key=lambda site: grids.index(site.key_grid))


def append_debug_outputs(graph: ir.Graph, figures: Sequence[ir.Value], kl_cap: ir.Value) -> None:
    """Make outputs of the figures of all sites.

    Args:
        graph: Gets the nodes and outputs.
        figures: One [B, 1, figures] a site, in the order of the columns.
        kl_cap: [B].
    """
    joined = ir.node("Concat", figures, {"axis": 1}, name="sws/debug/join")
    count = len(SITE_METRICS)
    parts = ir.node(
        "Split", joined.outputs, {"axis": 2, "num_outputs": count}, num_outputs=count, name="sws/debug/split"
    )
    axis = ir.node("Constant", [], {"value_ints": [2]}, name="sws/debug/axis")
    nodes = [joined, parts, axis]
    for figure, part in zip(SITE_METRICS, parts.outputs, strict=True):
        nodes.append(ir.node("Squeeze", [part, axis.outputs[0]], name=f"sws/debug/{figure}"))
        _append_output(graph, nodes[-1].outputs[0], f"{PREFIX}{figure}", ["batch", len(figures)])
    nodes.append(ir.node("Identity", [kl_cap], name="sws/debug/kl_cap"))
    _append_output(graph, nodes[-1].outputs[0], KL_CAP, ["batch"])
    graph.extend(nodes)


def _append_output(graph: ir.Graph, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
    value.name = name
    value.type = ir.TensorType(FLOAT)
    value.shape = ir.Shape(shape)
    graph.outputs.append(value)
