"""The SWS operators as model-local ONNX functions of domain `sws`.

Each function is built once for given parameters and a model dtype; iteration counts are unrolled while it
is built, so that no function holds a Loop. B is the batch, T = H * W the tokens of a grid, C the
heads times the head size.
"""

from fractions import Fraction

import onnx_ir as ir

from graph_passes.functions.attention import build_attention
from graph_passes.functions.banded_transport import build_banded_transport
from graph_passes.functions.comfyui_node_attention import build_comfyui_node_attention
from graph_passes.functions.comfyui_node_guard import build_comfyui_node_guard, build_comfyui_node_keys
from graph_passes.functions.comfyui_node_schedule import build_comfyui_node_schedule
from graph_passes.functions.comfyui_node_transport import (
    build_comfyui_node_momentum,
    build_comfyui_node_transport,
)
from graph_passes.functions.dense_transport import build_dense_transport
from graph_passes.functions.key_guard import Guard, build_key_guard
from graph_passes.functions.key_guard_fused import check_fused_guard
from graph_passes.functions.schedule import build_schedule
from graph_passes.functions.site_metrics import build_site_metrics
from graph_passes.functions.transport import build_transport
from graph_passes.parameters import SwsParameters

__all__ = ["DOMAIN", "Guard", "build_comfyui_node_functions", "build_functions", "check_fused_guard"]

DOMAIN = "sws"


def build_functions(
    parameters: SwsParameters,
    dtype: ir.DataType,
    guard: Guard = "literal",
    guard_rows: Fraction = Fraction(1),
    branches: bool = False,
    figures: bool = False,
    *,
    cross_attention: bool = False,
    stored: bool = False,
) -> dict[str, ir.Function]:
    """All functions of domain `sws` by name, for a model whose activations have `dtype`.

    Args:
        parameters: Constants of the method.
        dtype: Of the model's activations.
        guard: Form of `KeyGuard`, see `build_key_guard`.
        guard_rows: Share of the query rows that the guard sees, see `build_attention`.
        branches: For ONNX Runtime: let the fused guard have `If` nodes, likewise, and split heads with nodes.
        figures: Let `Attention` give the figures of its site as a second output.
        cross_attention: Add what sites with keys of the text are made of.
        stored: Let the fused guard store logits, see `build_key_guard`.

    Raises:
        GraphError: The parameters are outside the range in which the fused guard is exact, or the share of
            rows is not supported.
    """
    carries_values = branches and guard == "fused" and guard_rows == 1 and dtype == ir.DataType.FLOAT
    functions = [
        build_schedule(parameters),
        build_transport(parameters),
        build_banded_transport(dtype),
        build_key_guard(parameters, dtype, guard, branches, stored),
        build_attention(parameters, dtype, guard_rows, carries_values, figures, heads_apart=branches),
    ]
    if cross_attention:
        functions += [
            build_dense_transport(dtype),
            build_attention(
                parameters, dtype, guard_rows, carries_values, figures, cross=True, heads_apart=branches
            ),
        ]
    if figures:
        functions.append(build_site_metrics(dtype))
    return {function.name: function for function in functions}


def build_comfyui_node_functions(
    parameters: SwsParameters, dtype: ir.DataType, figures: bool = False
) -> dict[str, ir.Function]:
    """All functions of the published node by name, for a model whose activations have `dtype`.

    Args:
        parameters: Constants of the method.
        dtype: Of the model's activations.
        figures: Let `ComfyUINodeGuard` and `ComfyUINodeAttention` give out what they find.
    """
    functions = [
        build_comfyui_node_schedule(parameters),
        build_comfyui_node_transport(parameters, dtype),
        build_comfyui_node_momentum(parameters),
        build_comfyui_node_keys(dtype),
        build_comfyui_node_guard(parameters, dtype, figures),
        build_comfyui_node_attention(dtype, figures),
    ]
    return {function.name: function for function in functions}
