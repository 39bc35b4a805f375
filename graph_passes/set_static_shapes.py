"""Replace symbolic dimensions by static ones."""

from collections.abc import Iterator, Mapping
from fractions import Fraction

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError


class SetStaticShapes(InPlacePass):
    """Replace symbols by numbers in all shapes of the graph.

    A symbolic dimension is a symbol such as `height`, or a product of symbols with an optional divisor, such
    as `height/2` or `height*width/64`. One with a symbol that has no static size stays. Nodes are not
    changed: `FoldConstants` removes those whose result is constant now.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Set the symbols in `sizes`; `height` and `width` are those of the latent."""
        super().__init__()
        self.sizes = sizes

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the shapes of inputs, outputs and intermediate values."""
        modified = False
        for value in _values(model.graph):
            if value.shape is None:
                continue
            dims = [static_dimension(dim, self.sizes) for dim in value.shape]
            if dims != list(value.shape):
                value.shape = ir.Shape(dims)
                modified = True
        return PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """No dimension of an input is one of the symbols in `sizes`.

        Raises:
            PostconditionError: Names the first input with such a dimension.
        """
        for value in model.graph.inputs:
            for dim in value.shape or ():
                if not isinstance(dim, int) and dim.value in self.sizes:
                    raise PostconditionError(f"input {value.name}: dimension {dim.value} is not static")


def static_dimension(dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | ir.SymbolicDim:
    """The number that a dimension has with `sizes`, or the dimension itself if that is not known."""
    if isinstance(dim, int) or dim.value is None:
        return dim
    product, _, divisor = dim.value.partition("/")
    factors = [int(name) if name.isdigit() else sizes.get(name) for name in product.split("*")]
    if None in factors or not (divisor or "1").isdigit():
        return dim
    size = Fraction(1, int(divisor or 1))
    for factor in factors:
        size *= factor or 0
    return int(size) if size.denominator == 1 else dim


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs
