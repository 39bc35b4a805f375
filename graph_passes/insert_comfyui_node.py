"""Replace cross-attention sites by the computation of the published ComfyUI node, with one state for all."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from graph_passes.activation_dtype import activation_dtype
from graph_passes.conditions import require_attention_opset
from graph_passes.debug_outputs import append_debug_outputs
from graph_passes.errors import GraphError
from graph_passes.find_projection_inputs import ProjectionInputs, find_projection_inputs
from graph_passes.find_sites import Site
from graph_passes.functions import DOMAIN, build_comfyui_node_functions
from graph_passes.functions.building import add_function, add_initializer
from graph_passes.grids import TEXT
from graph_passes.insert_sws import CALLS, add_input, sides, state_pair
from graph_passes.parameters import SwsParameters
from graph_passes.plain_graph import require_plain

FLOAT = ir.DataType.FLOAT
Bases = Mapping[tuple[int, int], npt.NDArray[np.float32]]
"""Orthonormal bases [wide, narrow] float32, by their two widths."""

_SCHEDULED = ("tau", "amplitude", "kappa", "key_gate", "value_gain")


def basis_widths(sites: Sequence[Site]) -> set[tuple[int, int]]:
    """Pairs of widths (wide, narrow) for which `sites` need an orthonormal basis.

    Raises:
        GraphError: The inputs of the projections of a site were not found.
    """
    pairs = ((found.hidden_width, found.text_width) for found in map(find_projection_inputs, sites))
    return {(max(pair), min(pair)) for pair in pairs if pair[0] != pair[1]}


class InsertComfyUINode(InPlacePass):
    """Insert one `ComfyUINodeSchedule`, one `ComfyUINodeTransport`, and a `ComfyUINodeAttention` per site.

    The pass adds the inputs `sigma` and `intensity` [B] float32 and the pair `sws_state_text` /
    `sws_state_text_out` [1, tokens, tokens] float32. Where u is the counter of calls, it inserts a
    `ComfyUINodeCallSchedule`, and in place of `sigma` the pair `calls` / `calls_out` [1] float32. Each site
    updates the state of the one before, in graph order, which is the order of execution. Float32 keys are
    computed once for each width of the hidden states. Debug outputs are optional. Other nodes are not
    changed.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        parameters: SwsParameters,
        bases: Bases,
        *,
        count_calls: bool = False,
        debug_outputs: bool = False,
    ) -> None:
        """Rewrite `sites`, all cross-attention, with the `bases` for all of their `basis_widths`."""
        super().__init__()
        self.sites = sites
        self.parameters = parameters
        self.bases = bases
        self.count_calls = count_calls
        self.debug_outputs = debug_outputs

    def requires(self, model: ir.Model) -> None:
        """The graph is plain, its opset has `Attention`, and all sites are cross-attention to the text."""
        if self.sites:
            require_plain(model)
            require_attention_opset(model)
        for site in self.sites:
            if site.key_grid != TEXT:
                raise GraphError(f"{site.name}: expected cross-attention to the text, found self-attention")

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the sites."""
        if not self.sites:
            return PassResult(model, modified=False)
        dtype = activation_dtype(model)
        origins = [find_projection_inputs(site) for site in self.sites]
        functions = build_comfyui_node_functions(
            self.parameters,
            dtype,
            site_metrics=self.debug_outputs,
            counted_sites=len(self.sites) if self.count_calls else None,
        )
        for function in functions.values():
            add_function(model, function)
        model.graph.opset_imports[DOMAIN] = 1
        insertion = _Insertion(model.graph, origins[0].text, dtype, self.bases)
        insertion.insert(self.sites, origins, self.count_calls, self.debug_outputs)
        return PassResult(model, modified=True)


class _Insertion:
    def __init__(self, graph: ir.Graph, text: ir.Value, dtype: ir.DataType, bases: Bases) -> None:
        self.graph = graph
        self.text = text
        self.dtype = dtype
        self.bases = bases
        self.keys: dict[int, ir.Value] = {}

    def insert(
        self,
        sites: Sequence[Site],
        origins: Sequence[ProjectionInputs],
        count_calls: bool,
        debug_outputs: bool,
    ) -> None:
        graph, first = self.graph, sites[0].node
        level = add_input(graph, *((CALLS.input, [1]) if count_calls else ("sigma", ["batch"])))
        intensity = add_input(graph, "intensity", ["batch"])
        pair, shape = state_pair(TEXT), [1, *[sides(graph, TEXT)[1]] * 2]
        state = add_input(graph, pair.input, shape)
        if count_calls:
            u, schedules = self._count_calls(level, intensity, first, len(sites))
        else:
            u, schedule = self._schedule(level, intensity, first)
            schedules = [schedule] * len(sites)
        (fresh,) = self._call("ComfyUINodeTransport", [self.text, u], "sws/transport", first)
        fresh.name = "sws/fresh"
        site_metrics = []
        for site, origin, scalars in zip(sites, origins, schedules, strict=True):
            keys = self._keys(site, origin)
            y, state, *metrics = self._call(
                "ComfyUINodeAttention",
                [site.q, site.k, site.v, origin.hidden, keys, state, fresh, *scalars],
                f"sws/{site.name}",
                site.node,
                outputs=3 if debug_outputs else 2,
                attributes={
                    "num_heads": site.heads,
                    "scale": site.scale,
                    "guard_scale": 1.0 / math.sqrt(min(origin.hidden_width, origin.text_width)),
                },
            )
            y.name, state.name = f"sws/{site.name}/y", f"sws/{site.name}/transport"
            y.type, y.shape = site.y.type, site.y.shape
            site_metrics += metrics
            ir.convenience.replace_all_uses_with(site.y, y)
        state.name, state.type, state.shape = pair.output, ir.TensorType(FLOAT), ir.Shape(shape)
        graph.outputs.append(state)
        if debug_outputs:
            per_sample = intensity if count_calls else level
            self._append_debug_outputs(site_metrics, per_sample, kappa=schedules[0][2])

    def _schedule(
        self, sigma: ir.Value, intensity: ir.Value, before: ir.Node
    ) -> tuple[ir.Value, Sequence[ir.Value]]:
        """u [1], and the inputs of `ComfyUINodeAttention` that depend on it, [1] each, for all sites."""
        outputs = self._call("ComfyUINodeSchedule", [sigma, intensity], "sws/schedule", before, outputs=6)
        for output, name in zip(outputs, ("u", *_SCHEDULED), strict=True):
            output.name = f"sws/{name}"
        return outputs[0], outputs[1:]

    def _count_calls(
        self, calls: ir.Value, intensity: ir.Value, before: ir.Node, sites: int
    ) -> tuple[ir.Value, list[Sequence[ir.Value]]]:
        """u of the transport, [1], and the inputs of each `ComfyUINodeAttention` that depend on u, [1]."""
        outputs = self._call("ComfyUINodeCallSchedule", [calls, intensity], "sws/schedule", before, outputs=7)
        for output, name in zip(outputs, ("u", *_SCHEDULED), strict=False):
            output.name = f"sws/{name}"
        after = outputs[-1]
        after.name, after.type, after.shape = CALLS.output, ir.TensorType(FLOAT), ir.Shape([1])
        self.graph.outputs.append(after)
        splits = []
        for output, name in zip(outputs[1:-1], _SCHEDULED, strict=True):
            split = ir.node(
                "Split",
                [output],
                {"axis": 0, "num_outputs": sites},
                num_outputs=sites,
                name=f"sws/{name}_split",
            )
            for site, value in enumerate(split.outputs):
                value.name = f"sws/{name}_{site}"
            self.graph.insert_before(before, split)
            splits.append(split.outputs)
        # The transport is the same for each u > 0. At u = 0 nothing is mixed, and the state is not updated.
        one = self._constant("sws/u_of_transport", np.ones(1, np.float32))
        return one, list(zip(*splits, strict=True))

    def _append_debug_outputs(
        self, site_metrics: Sequence[ir.Value], per_sample: ir.Value, kappa: ir.Value
    ) -> None:
        """Append the debug outputs; the KL budget [1] is repeated for each sample of `per_sample` [B]."""
        for index, value in enumerate(site_metrics):
            value.name = f"sws/debug/site_{index}"
        batch = ir.node("Shape", [per_sample], name="sws/debug/batch")
        spread = ir.node("Expand", [kappa, batch.outputs[0]], name="sws/debug/spread")
        self.graph.extend([batch, spread])
        append_debug_outputs(self.graph, site_metrics, kl_cap=spread.outputs[0])

    def _keys(self, site: Site, origin: ProjectionInputs) -> ir.Value:
        """The text in float32, projected to the width of the site's hidden states, [B, n, C]."""
        width = origin.hidden_width
        if width not in self.keys:
            before, name = site.node, f"sws/keys_{width}"
            if width != origin.text_width:
                inputs = [self.text, self._basis(width, origin.text_width)]
                (self.keys[width],) = self._call("ComfyUINodeKeys", inputs, name, before)
                self.keys[width].name = name
            else:
                self.keys[width] = _upcast(self.graph, self.text, self.dtype, name, before)
        return self.keys[width]

    def _basis(self, width: int, text_width: int) -> ir.Value:
        """The orthonormal basis [text_width, width], transposed if the text is narrower."""
        basis = self.bases[max(width, text_width), min(width, text_width)]
        array = np.ascontiguousarray(basis if text_width > width else basis.T)
        return self._constant(f"sws/basis_{text_width}_{width}", array)

    def _constant(self, name: str, array: npt.NDArray[np.float32]) -> ir.Value:
        return add_initializer(self.graph, ir.tensor(array, name=name))

    def _call(
        self,
        name: str,
        inputs: Sequence[ir.Value],
        node_name: str,
        before: ir.Node,
        outputs: int = 1,
        attributes: Mapping[str, int | float] | None = None,
    ) -> Sequence[ir.Value]:
        node = ir.node(name, inputs, attributes, domain=DOMAIN, num_outputs=outputs, name=node_name)
        self.graph.insert_before(before, node)
        return node.outputs


def _upcast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str, before: ir.Node) -> ir.Value:
    if dtype == FLOAT:
        return value
    node = ir.node("Cast", [value], {"to": int(FLOAT)}, name=name)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node.outputs[0]
