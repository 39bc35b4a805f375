"""Find the inputs of the projections of a cross-attention site."""

import dataclasses

import onnx_ir as ir

from graph_passes.errors import GraphError
from graph_passes.find_sites import Site, unquantized


@dataclasses.dataclass(frozen=True)
class ProjectionInputs:
    """The inputs of the projections of a cross-attention site, which have no bias.

    Attributes:
        hidden: Normalised hidden states [B, T, C], projected to queries.
        text: Text embeddings [B, n, X], projected to keys and values.
        hidden_width: C.
        text_width: X.
    """

    hidden: ir.Value
    text: ir.Value
    hidden_width: int
    text_width: int


def find_projection_inputs(site: Site) -> ProjectionInputs:
    """The tensors that the queries, keys and values of `site` are projected from.

    Raises:
        GraphError: A projection is not a product with a weight of known shape, or has a bias; the message
            names the site.
    """
    queries = _projection(site, site.q, "queries")
    keys = _projection(site, site.k, "keys")
    values = _projection(site, site.v, "values")
    if keys[0] is not values[0]:
        raise GraphError(f"{site.name}: its keys and values are projections of different tensors")
    return ProjectionInputs(queries[0], keys[0], queries[1], keys[1])


def _projection(site: Site, value: ir.Value, what: str) -> tuple[ir.Value, int]:
    """The input of the linear layer without bias whose output is `value`, and its width."""
    node = value.producer()
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[1] is None:
        found = "no node" if node is None else node.op_type
        raise GraphError(
            f"{site.name}: the tensor that its {what} are projected from was not found: expected MatMul "
            f"without a bias, found {found}; --preset comfyui-node needs it, --preset sws does not"
        )
    shape = node.inputs[1].shape
    width = shape[0] if shape is not None and len(shape) == 2 else None
    if not isinstance(width, int):
        raise GraphError(
            f"{site.name}: the weight of the projection of its {what} has the shape {shape}, expected two "
            "static dimensions"
        )
    return unquantized(node.inputs[0]), width
