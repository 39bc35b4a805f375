"""Compute the constant parts of a graph at export."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnxscript import optimizer

from graph_passes.conditions import require_lowered
from graph_passes.target import PLUGIN_OPERATORS

LARGEST = 2**23
"""Elements of the largest constant that is folded: three scales of a band on 128 x 128 tokens."""


class FoldConstants(InPlacePass):
    """Replace nodes whose inputs are constants by constants, and known sizes by numbers.

    Uses onnxscript's folding with shape inference: with static shapes, all arithmetic on sizes and everything
    that depends on the grid alone becomes constant. Run it before `CleanGraph`, which turns constants into
    initializers: floating-point initializers are weights here, and nodes that read them are not folded.
    Neither are nodes with several outputs.
    """

    def requires(self, model: ir.Model) -> None:
        """All functions of domain `sws` but plugin operators are lowered (`require_lowered`).

        Arithmetic on sizes inside a function cannot be folded.
        """
        require_lowered(model, PLUGIN_OPERATORS)

    def call(self, model: ir.Model) -> PassResult:
        """Fold until nothing changes."""
        weights = {
            value
            for value in model.graph.initializers.values()
            if value.dtype and value.dtype.is_floating_point()
        }

        def may_fold(node: ir.Node) -> bool | None:
            if len(node.outputs) > 1 or not weights.isdisjoint(node.inputs):
                return False
            return None

        def fold(*, infer: bool) -> bool:
            return bool(
                optimizer.fold_constants(
                    model,
                    onnx_shape_inference=infer,
                    input_size_limit=LARGEST,
                    output_size_limit=LARGEST,
                    should_fold=may_fold,
                )
            )

        modified = False
        while fold(infer=True):
            modified = True
            # Nodes are visited in order, so shapes are known now, and nearly always there is nothing left to
            # fold. To infer them again would take most of the time.
            if not fold(infer=False):
                break
        return PassResult(model, modified=modified)
