"""Find the attention sites of a UNet graph, and those of them that SWS supports."""

import dataclasses
import math
import re

import onnx_ir as ir

from graph_passes.grids import TEXT, Grid

HEAD_SPLIT = (0, 2, 1, 3)
"""Permutation of the Transpose between [B, T, heads, C] and [B, heads, T, C]."""

_SITE_NAME = re.compile(r"(?:down_blocks|up_blocks|mid_block)[\w.]*\.attn\d+")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)")
_TEXT_INPUT = "encoder_hidden_states"


@dataclasses.dataclass(frozen=True)
class Site:
    """One attention site. B is the batch, T the image tokens, C the channels, L the tokens of the keys.

    Attributes:
        name: Path of the attention module, such as `mid_block.attentions.0.transformer_blocks.0.attn1`.
        node: The `Attention` node.
        q: Queries [B, T, C], before the heads are split.
        k: Keys [B, L, C]; L = T in self-attention.
        v: Values [B, L, C].
        y: Output [B, T, C] of the site, after the heads are joined.
        heads: Number of heads.
        scale: Factor of the logits.
        factor: Downsampling of the grid of the queries relative to the latent.
        key_grid: Grid of keys and values: that of the queries, or `TEXT` in cross-attention.
    """

    name: str
    node: ir.Node
    q: ir.Value
    k: ir.Value
    v: ir.Value
    y: ir.Value
    heads: int
    scale: float
    factor: int
    key_grid: Grid


@dataclasses.dataclass(frozen=True)
class SkippedSite:
    """An attention node without SWS, and the reason."""

    name: str
    reason: str


class _Skipped(Exception):  # noqa: N818  (control flow inside this module, never an error)
    """The reason to skip a node."""


def find_sites(model: ir.Model, *, cross_attention: bool = False) -> tuple[list[Site], list[SkippedSite]]:
    """All `Attention` nodes in graph order: those that SWS supports, and the others with a reason.

    A site is supported if queries, keys and values are projections of one tensor (self-attention), there is
    no mask, heads and head size are known, and its name contains the block of the UNet, which gives its grid.

    Args:
        model: A plain UNet.
        cross_attention: Include sites whose keys and values are projections of `encoder_hidden_states`.
    """
    levels = count_levels(model)
    sites: list[Site] = []
    skipped: list[SkippedSite] = []
    for node in model.graph:
        if node.op_type != "Attention" or node.domain != "":
            continue
        found = _SITE_NAME.search(_dotted_name(node))
        name = found.group() if found else ""
        try:
            site = _read_site(node, name, levels)
            if site.key_grid == TEXT and not cross_attention:
                raise _Skipped("cross-attention: keys and values come from the text")
            sites.append(site)
        except _Skipped as reason:
            skipped.append(SkippedSite(name or node.name or "unnamed", str(reason)))
    return sites, skipped


def _dotted_name(node: ir.Node) -> str:
    """The node's name as a module path; other exporters separate modules by slashes."""
    return (node.name or "").strip("/").replace("/", ".")


def count_levels(model: ir.Model) -> int:
    """Number of resolutions of the UNet: one more than the highest index of its blocks."""
    indices = [int(index) for node in model.graph for _, index in _BLOCK.findall(_dotted_name(node))]
    return max(indices, default=0) + 1


def _read_site(node: ir.Node, name: str, levels: int) -> Site:
    if len([value for value in node.inputs if value is not None]) != 3:
        raise _Skipped("it has a mask or a key cache")
    if node.attributes.get_int("is_causal", 0) or node.attributes.get_float("softcap"):
        raise _Skipped("it is causal or caps its logits")
    heads, head_size = _head_shape(node.inputs[0])
    if any(_head_shape(value) != (heads, head_size) for value in node.inputs[1:3]):
        raise _Skipped("its keys or values have other heads than its queries")
    q, k, v = (_before_head_split(value) for value in node.inputs)
    attends_text = _attends_text(q, k, v)
    others = node.inputs[0].consumers() if node.inputs[0] is not None else ()
    if any(other.op_type == "Attention" and other is not node for other in others):
        raise _Skipped("cross-attention with an IP-Adapter: its queries also attend to images")
    if not name:
        raise _Skipped("its name does not contain the block of the UNet that it belongs to")
    factor = _downsampling(name, levels)
    return Site(
        name=name,
        node=node,
        q=q,
        k=k,
        v=v,
        y=_after_head_join(node.outputs[0]),
        heads=heads,
        scale=node.attributes.get_float("scale") or 1.0 / math.sqrt(head_size),
        factor=factor,
        key_grid=TEXT if attends_text else Grid(factor),
    )


def _attends_text(q: ir.Value, k: ir.Value, v: ir.Value) -> bool:
    """Whether keys and values are projections of the text, and not of the source of the queries."""
    queries, keys, values = (_projection_source(value) for value in (q, k, v))
    if queries is None or keys is None or values is None:
        raise _Skipped("its queries, keys or values are not plain projections")
    if keys is not values:
        raise _Skipped("its keys and values come from different tensors")
    if keys is queries:
        return False
    if not _is_text(keys):
        raise _Skipped(f"cross-attention: keys and values come from another tensor than {_TEXT_INPUT}")
    return True


def _is_text(value: ir.Value) -> bool:
    """Whether a value is the text input, possibly in another dtype or rounded to 8 bits."""
    value = unquantized(value)
    node = value.producer()
    while node is not None and node.op_type in ("Cast", "Identity") and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value.is_graph_input() and value.name == _TEXT_INPUT


def unquantized(value: ir.Value) -> ir.Value:
    """The tensor that `value` is the 8-bit rounding of; `value` itself if it is none."""
    found = value
    for op_type in ("DequantizeLinear", "QuantizeLinear"):
        node = found.producer()
        if node is None or node.op_type != op_type or node.inputs[0] is None:
            return value
        found = node.inputs[0]
    return found


def _head_shape(value: ir.Value | None) -> tuple[int, int]:
    shape = value.shape if value is not None else None
    if shape is None:
        raise _Skipped("its shape is not known")
    if len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[3], int):
        return shape[1], shape[3]
    raise _Skipped(f"expected inputs of shape [batch, heads, tokens, head size], found {shape}")


def _before_head_split(value: ir.Value | None) -> ir.Value:
    """The input [B, T, C] of Transpose(Reshape(.))."""
    transpose = value.producer() if value is not None else None
    if transpose is None or transpose.op_type != "Transpose":
        raise _Skipped("its heads are not split by Reshape and Transpose")
    if tuple(transpose.attributes.get_ints("perm", [])) != HEAD_SPLIT:
        raise _Skipped("its heads are transposed in an unknown way")
    reshape = transpose.inputs[0].producer() if transpose.inputs[0] is not None else None
    if reshape is None or reshape.op_type != "Reshape" or reshape.inputs[0] is None:
        raise _Skipped("its heads are not split by Reshape and Transpose")
    return reshape.inputs[0]


def _after_head_join(value: ir.Value) -> ir.Value:
    """The output [B, T, C] of Reshape(Transpose(value))."""
    transpose = _only_consumer(value, "Transpose")
    if tuple(transpose.attributes.get_ints("perm", [])) != HEAD_SPLIT:
        raise _Skipped("its heads are joined in an unknown way")
    return _only_consumer(transpose.outputs[0], "Reshape").outputs[0]


def _only_consumer(value: ir.Value, op_type: str) -> ir.Node:
    consumers = value.consumers()
    if len(consumers) != 1 or consumers[0].op_type != op_type:
        raise _Skipped("its heads are not joined by Transpose and Reshape")
    return consumers[0]


def _projection_source(value: ir.Value) -> ir.Value | None:
    """The tensor that a linear layer, with or without bias, projects to `value`."""
    node = value.producer()
    if node is not None and node.op_type == "Add":
        producers = [operand.producer() for operand in node.inputs if operand is not None]
        node = next((producer for producer in producers if producer and producer.op_type == "MatMul"), None)
    if node is None or node.op_type != "MatMul":
        return None
    return node.inputs[0]


def _downsampling(name: str, levels: int) -> int:
    """Downsampling of a block's grid: each down block except the last halves it, up blocks reverse that."""
    if name.startswith("mid_block"):
        return int(2 ** (levels - 1))
    side, index = _BLOCK.findall(name)[0]
    level = int(index) if side == "down" else levels - 1 - int(index)
    return int(2**level)
