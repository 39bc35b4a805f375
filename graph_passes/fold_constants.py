"""Compute while exporting what depends on no input."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnxscript import optimizer

LARGEST = 2**23
"""Elements of the largest constant read or made: enough for three scales of a band on 128 x 128 tokens."""


class FoldConstants(InPlacePass):
    """Replace nodes whose inputs are constants by their results, and sizes that are known by numbers.

    onnxscript's folding, which infers shapes on the way: where sizes are fixed, all arithmetic on sizes and
    everything that depends on the grid alone becomes constant. Run it before `CleanGraph`: floating-point
    initializers are taken for weights and stay as they are, constants are nodes until then. Nodes of
    several outputs stay.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Fold until nothing is left to fold."""
        weights = {
            value
            for value in model.graph.initializers.values()
            if value.dtype and value.dtype.is_floating_point()
        }

        def may_fold(node: ir.Node) -> bool | None:
            if len(node.outputs) > 1 or not weights.isdisjoint(node.inputs):
                return False
            return None

        modified = False
        while optimizer.fold_constants(
            model,
            onnx_shape_inference=True,
            input_size_limit=LARGEST,
            output_size_limit=LARGEST,
            should_fold=may_fold,
        ):
            modified = True
        return PassResult(model, modified=modified)
