"""Replace attention sites by calls of the SWS functions, with one transport and one state a grid."""

import dataclasses
from collections.abc import Iterable, Sequence
from fractions import Fraction

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from graph_passes.debug_outputs import append_debug_outputs, debug_order
from graph_passes.errors import GraphError
from graph_passes.find_sites import Site
from graph_passes.functions import DOMAIN, Guard, build_functions
from graph_passes.parameters import STATE_RADIUS, SwsParameters, diamond_offsets

FLOAT = ir.DataType.FLOAT
BAND = len(diamond_offsets(STATE_RADIUS))


@dataclasses.dataclass(frozen=True)
class StatePair:
    """A state input, the output that is fed back to it, and the downsampling factor of its grid."""

    input: str
    output: str
    factor: int


def state_pair(factor: int) -> StatePair:
    """The state of the grid that is `factor` times coarser than the latent."""
    return StatePair(f"sws_state_d{factor}", f"sws_state_d{factor}_out", factor)


class InsertSws(InPlacePass):
    """Insert `sws.Schedule` once, `sws.Transport` once a grid and `sws.Attention` once a site.

    Adds the inputs `sigma` and `intensity` [B] and a pair `sws_state_d<factor>` /
    `sws_state_d<factor>_out` [B, 145, height/factor, width/factor] for each grid; on request also the
    debug outputs. The rest of the graph, sites that are not given and cross-attention among it, is not
    touched.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        parameters: SwsParameters,
        guard: Guard = "literal",
        guard_rows: Fraction = Fraction(1),
        statistics: ir.DataType = FLOAT,
        debug_outputs: bool = False,
    ) -> None:
        """Rewrite `sites`; the form of the guard is that of `build_functions`."""
        super().__init__()
        self.sites = sites
        self.parameters = parameters
        self.guard: Guard = guard
        self.guard_rows = guard_rows
        self.statistics = statistics
        self.debug_outputs = debug_outputs

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the sites; nothing changes when there are none."""
        if not self.sites:
            return PassResult(model, modified=False)
        if any(value.name == "sigma" for value in model.graph.inputs):
            raise GraphError("the graph has SWS already (input 'sigma'); start from an export without SWS")
        dtype = model.graph.outputs[0].dtype
        if dtype is None:
            raise GraphError("the dtype of the graph's output is unknown")
        functions = build_functions(
            self.parameters, dtype, self.guard, self.guard_rows, self.statistics, self.debug_outputs
        )
        for function in functions.values():
            model.functions[function.identifier()] = function
        model.graph.opset_imports[DOMAIN] = 1

        graph = model.graph
        sigma = _add_input(graph, "sigma", ["batch"])
        intensity = _add_input(graph, "intensity", ["batch"])
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
        transports = {}
        for factor in sorted({site.factor for site in self.sites}):
            transports[factor] = _insert_transport(graph, first, factor, blend)
        nodes = {
            site.name: _replace_site(graph, site, transports[site.factor], site_inputs, self.debug_outputs)
            for site in self.sites
        }
        if self.debug_outputs:
            figures = [nodes[site.name].outputs[1] for site in debug_order(self.sites)]
            append_debug_outputs(graph, figures, kl_cap=schedule.outputs[3])
        return PassResult(model, modified=True)


def _add_input(graph: ir.Graph, name: str, shape: Iterable[int | str]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(shape))
    graph.inputs.append(value)
    return value


def _insert_transport(graph: ir.Graph, before: ir.Node, factor: int, blend: ir.Value) -> ir.Value:
    pair = state_pair(factor)
    sides = [side if factor == 1 else f"{side}/{factor}" for side in ("height", "width")]
    shape: list[int | str] = ["batch", BAND, *sides]
    state = _add_input(graph, pair.input, shape)
    node = ir.node("Transport", [state, blend], domain=DOMAIN, name=f"sws/transport_d{factor}")
    (transport,) = node.outputs
    transport.name = pair.output
    transport.type = ir.TensorType(FLOAT)
    transport.shape = ir.Shape(shape)
    graph.insert_before(before, node)
    graph.outputs.append(transport)
    return transport


def _replace_site(
    graph: ir.Graph, site: Site, transport: ir.Value, site_inputs: Sequence[ir.Value], figures: bool
) -> ir.Node:
    node = ir.node(
        "Attention",
        [site.q, site.k, site.v, transport, *site_inputs],
        attributes={"num_heads": site.heads, "scale": site.scale},
        domain=DOMAIN,
        num_outputs=2 if figures else 1,
        name=f"sws/{site.name}",
    )
    y = node.outputs[0]
    if figures:
        node.outputs[1].name = f"sws/{site.name}/figures"
    y.name = f"sws/{site.name}/y"
    y.type = site.y.type
    y.shape = site.y.shape
    graph.insert_before(site.node, node)
    ir.convenience.replace_all_uses_with(site.y, y)
    return node
