"""Choose between two forms of the key guard by the number of tokens of a site."""

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from graph_passes.conditions import ensure_defined
from graph_passes.functions import DOMAIN, MATERIALIZED_LOGITS
from graph_passes.set_static_shapes import static_dimension

MATERIALIZED_TOKENS = 256
"""Most query rows, and most keys, of a site whose guard materializes its logits."""
HEAD_SIZES = range(16, 257 - 8, 8)
"""Head sizes with fused attention, also with the 8 channels that the guard adds."""

_SITES = ("Attention", "CrossAttention")


class ChooseGuard(InPlacePass):
    """Use the guard with materialized float32 logits at sites with few tokens, or without a fused attention.

    Run it before `sws.Attention` is inlined, on a model whose functions have a guard `MATERIALIZED_LOGITS`
    beside the one for fused attention. A model without it is not changed. A site with dynamic shapes has as
    many tokens as the largest sizes allow; without these, it keeps the guard for fused attention.
    """

    def __init__(self, largest: Mapping[str, int]) -> None:
        """Choose for sizes up to `largest`, by symbol: `height` and `width` of the latent, `tokens`."""
        super().__init__()
        self.largest = largest

    def call(self, model: ir.Model) -> PassResult:
        """Replace the calls of functions of sites."""
        if (DOMAIN, "KeyGuard", MATERIALIZED_LOGITS) not in model.functions:
            return PassResult(model, modified=False)
        modified = False
        for node in model.graph:
            if (node.domain, node.overload) != (DOMAIN, "") or node.op_type not in _SITES:
                continue
            if self._materializes_logits(node):
                node.overload = _with_materialized_logits(model, node.op_type)
                modified = True
        return PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """The model has the functions that sites call now, and the guards that these call."""
        ensure_defined(model)

    def _materializes_logits(self, node: ir.Node) -> bool:
        query, transport = node.inputs[0], node.inputs[3]
        assert query is not None
        assert transport is not None
        if query.shape is None or transport.shape is None:
            return False
        channels = query.shape[2]
        if isinstance(channels, int) and channels // node.attributes["num_heads"].as_int() not in HEAD_SIZES:
            return True
        rows, height, width = (
            static_dimension(dim, self.largest) for dim in (query.shape[1], *transport.shape[2:])
        )
        if not (isinstance(height, int) and isinstance(width, int)):
            return False
        if node.op_type == "Attention":
            rows = height * width
        return isinstance(rows, int) and max(rows, height * width) <= MATERIALIZED_TOKENS


def _with_materialized_logits(model: ir.Model, name: str) -> str:
    """The overload of `sws.<name>` whose guard materializes its logits, added to the model if missing."""
    if (DOMAIN, name, MATERIALIZED_LOGITS) not in model.functions:
        function = model.functions[DOMAIN, name, ""].clone()
        function.overload = MATERIALIZED_LOGITS
        for node in function:
            if (node.domain, node.op_type) == (DOMAIN, "KeyGuard"):
                node.overload = MATERIALIZED_LOGITS
        model.functions[function.identifier()] = function
    return MATERIALIZED_LOGITS
