"""Replace attention sites by calls of the SWS functions, with one transport and one state per grid."""

import dataclasses
from collections.abc import Iterable, Sequence

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from graph_passes.activation_dtype import activation_dtype
from graph_passes.conditions import require_attention_opset
from graph_passes.debug_outputs import append_debug_outputs, debug_order
from graph_passes.errors import GraphError
from graph_passes.find_sites import Site
from graph_passes.functions import DOMAIN, build_functions
from graph_passes.functions.building import add_function
from graph_passes.grids import TEXT, Grid, sorted_grids
from graph_passes.guard import GuardOptions
from graph_passes.parameters import STATE_RADIUS, SwsParameters, diamond_offsets
from graph_passes.plain_graph import require_plain
from graph_passes.target import Target

FLOAT = ir.DataType.FLOAT
BAND = len(diamond_offsets(STATE_RADIUS))


@dataclasses.dataclass(frozen=True)
class StatePair:
    """A state input, the output that is fed back to it, and the grid of the transport that it holds.

    `grid` is None for the state `CALLS`, which holds no transport.
    """

    input: str
    output: str
    grid: Grid | None


CALLS = StatePair("calls", "calls_out", None)
"""Calls of the published ComfyUI node before the step, modulo 64, [1]."""


def state_pair(grid: Grid) -> StatePair:
    """The state of a grid."""
    return StatePair(f"sws_state_{grid.name}", f"sws_state_{grid.name}_out", grid)


class InsertSws(InPlacePass):
    """Insert `sws.Schedule` once, `sws.Transport` once per grid, and a call once per site.

    The call is `sws.Attention`, or `sws.CrossAttention` for keys of the text. The pass adds the inputs
    `sigma` and `intensity` [B] float32, a pair `sws_state_d<factor>` / `sws_state_d<factor>_out` [B, 145,
    height/factor, width/factor] for each grid of the image, or `sws_state_text` / `sws_state_text_out` [B,
    145, 1, tokens] for the text, and optionally the debug outputs. Other nodes and other sites are not
    changed.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        parameters: SwsParameters,
        target: Target,
        guard: GuardOptions,
        *,
        debug_outputs: bool = False,
    ) -> None:
        """Rewrite `sites` for `target`."""
        super().__init__()
        self.sites = sites
        self.parameters = parameters
        self.target = target
        self.guard = guard
        self.debug_outputs = debug_outputs

    def requires(self, model: ir.Model) -> None:
        """The graph is plain and its opset has `Attention`, unless there are no sites to rewrite."""
        if self.sites:
            require_plain(model)
            require_attention_opset(model)

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the sites."""
        if not self.sites:
            return PassResult(model, modified=False)
        functions = build_functions(
            self.parameters,
            activation_dtype(model),
            self.target,
            self.guard,
            site_metrics=self.debug_outputs,
            cross_attention=any(site.key_grid == TEXT for site in self.sites),
        )
        for function in functions.values():
            add_function(model, function)
        model.graph.opset_imports[DOMAIN] = 1

        graph = model.graph
        sigma = add_input(graph, "sigma", ["batch"])
        intensity = add_input(graph, "intensity", ["batch"])
        schedule = ir.node("Schedule", [sigma, intensity], domain=DOMAIN, num_outputs=6, name="sws/schedule")
        for output, name in zip(
            schedule.outputs,
            ("blend", "tau_q", "amplitude", "kappa", "key_gate", "value_gain"),
            strict=True,
        ):
            output.name = f"sws/{name}"
        blend, *site_inputs = schedule.outputs

        first = graph[0]
        graph.insert_before(first, schedule)
        transports = {
            grid: _insert_transport(graph, first, grid, blend)
            for grid in sorted_grids(site.key_grid for site in self.sites)
        }
        query_grids: dict[int, ir.Value] = {}
        crossing = [site.factor for site in self.sites if site.key_grid == TEXT]
        if crossing and self.guard.rows != 1:
            query_grids = _insert_query_grids(graph, first, crossing)
        nodes = {}
        for site in self.sites:
            inputs = [transports[site.key_grid], *site_inputs]
            if site.key_grid == TEXT and query_grids:
                inputs.append(query_grids[site.factor])
            nodes[site.name] = _replace_site(graph, site, inputs, self.debug_outputs)
        if self.debug_outputs:
            site_metrics = [nodes[site.name].outputs[1] for site in debug_order(self.sites)]
            append_debug_outputs(graph, site_metrics, kl_cap=schedule.outputs[3])
        return PassResult(model, modified=True)


def add_input(graph: ir.Graph, name: str, shape: Iterable[int | str]) -> ir.Value:
    """Append a float32 input to the graph."""
    value = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(shape))
    graph.inputs.append(value)
    return value


def _insert_transport(graph: ir.Graph, before: ir.Node, grid: Grid, blend: ir.Value) -> ir.Value:
    pair = state_pair(grid)
    shape: list[int | str] = ["batch", BAND, *sides(graph, grid)]
    state = add_input(graph, pair.input, shape)
    node = ir.node("Transport", [state, blend], domain=DOMAIN, name=f"sws/transport_{grid.name}")
    (transport,) = node.outputs
    transport.name = pair.output
    transport.type = ir.TensorType(FLOAT)
    transport.shape = ir.Shape(shape)
    graph.insert_before(before, node)
    graph.outputs.append(transport)
    return transport


def sides(graph: ir.Graph, grid: Grid) -> tuple[int | str, int | str]:
    """Rows and columns of a grid; the number of text tokens may be static in the graph."""
    if grid != TEXT:
        return grid.sides
    tokens = _input_shape(graph, "encoder_hidden_states", rank=3)[1]
    return (1, tokens) if isinstance(tokens, int) else grid.sides


def _insert_query_grids(graph: ir.Graph, before: ir.Node, factors: Iterable[int]) -> dict[int, ir.Value]:
    """Rows and columns, [2] int64, of grids of the image by their downsampling."""
    _input_shape(graph, "sample", rank=4)
    (sample,) = (value for value in graph.inputs if value.name == "sample")
    size = ir.node("Shape", [sample], {"start": 2, "end": 4}, name="sws/size")
    size.outputs[0].name = "sws/size"
    graph.insert_before(before, size)
    grids = {}
    for factor in sorted(set(factors)):
        divisor = ir.node("Constant", [], {"value_ints": [factor, factor]}, name=f"sws/factor_{factor}")
        grid = ir.node("Div", [size.outputs[0], divisor.outputs[0]], name=f"sws/grid_d{factor}")
        for node in (divisor, grid):
            node.outputs[0].name = node.name
            graph.insert_before(before, node)
        grids[factor] = grid.outputs[0]
    return grids


def _input_shape(graph: ir.Graph, name: str, rank: int) -> ir.Shape:
    shapes = [value.shape for value in graph.inputs if value.name == name]
    if not shapes or shapes[0] is None or len(shapes[0]) != rank:
        raise GraphError(f"cross-attention needs an input '{name}' of rank {rank} whose shape is declared")
    return shapes[0]


def _replace_site(graph: ir.Graph, site: Site, inputs: Sequence[ir.Value], with_metrics: bool) -> ir.Node:
    node = ir.node(
        "CrossAttention" if site.key_grid == TEXT else "Attention",
        [site.q, site.k, site.v, *inputs],
        attributes={"num_heads": site.heads, "scale": site.scale},
        domain=DOMAIN,
        num_outputs=2 if with_metrics else 1,
        name=f"sws/{site.name}",
    )
    y = node.outputs[0]
    if with_metrics:
        node.outputs[1].name = f"sws/{site.name}/metrics"
    y.name = f"sws/{site.name}/y"
    y.type = site.y.type
    y.shape = site.y.shape
    graph.insert_before(site.node, node)
    ir.convenience.replace_all_uses_with(site.y, y)
    return node
