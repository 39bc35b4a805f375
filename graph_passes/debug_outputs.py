"""Optional outputs with the metrics of each site at a step."""

from collections.abc import Sequence

import onnx_ir as ir

from graph_passes.find_sites import Site
from graph_passes.grids import sorted_grids

FLOAT = ir.DataType.FLOAT

SITE_METRICS = ("alpha_k", "a_v", "entropy_mean", "entropy_min", "entropy_max", "kl")
"""Metrics of a site, in the order of the second output of `sws.Attention`."""

PREFIX = "sws_debug_"
KL_CAP = f"{PREFIX}kl_cap"


def debug_output_names() -> tuple[str, ...]:
    """Names of all debug outputs: `sws_debug_<metric>` [B, sites], and `sws_debug_kl_cap` [B]."""
    return (*(f"{PREFIX}{metric}" for metric in SITE_METRICS), KL_CAP)


def debug_order(sites: Sequence[Site]) -> list[Site]:
    """Sites in the order of the columns of the debug outputs: by grid of the keys, then in graph order."""
    grids = sorted_grids(site.key_grid for site in sites)
    return sorted(sites, key=lambda site: grids.index(site.key_grid))


def append_debug_outputs(graph: ir.Graph, site_metrics: Sequence[ir.Value], kl_cap: ir.Value) -> None:
    """Append the debug outputs to `graph`.

    Args:
        graph: The main graph.
        site_metrics: [B, 1, 6] float32 of each site, in the order of the columns.
        kl_cap: KL budget, [B] float32.
    """
    joined = ir.node("Concat", site_metrics, {"axis": 1}, name="sws/debug/join")
    count = len(SITE_METRICS)
    parts = ir.node(
        "Split", joined.outputs, {"axis": 2, "num_outputs": count}, num_outputs=count, name="sws/debug/split"
    )
    axis = ir.node("Constant", [], {"value_ints": [2]}, name="sws/debug/axis")
    nodes = [joined, parts, axis]
    for metric, part in zip(SITE_METRICS, parts.outputs, strict=True):
        nodes.append(ir.node("Squeeze", [part, axis.outputs[0]], name=f"sws/debug/{metric}"))
        _append_output(graph, nodes[-1].outputs[0], f"{PREFIX}{metric}", ["batch", len(site_metrics)])
    nodes.append(ir.node("Identity", [kl_cap], name="sws/debug/kl_cap"))
    _append_output(graph, nodes[-1].outputs[0], KL_CAP, ["batch"])
    graph.extend(nodes)


def _append_output(graph: ir.Graph, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
    value.name = name
    value.type = ir.TensorType(FLOAT)
    value.shape = ir.Shape(shape)
    graph.outputs.append(value)
