"""The SWS operators as model-local ONNX functions of domain `sws`.

A function is built for given parameters and a model dtype. Iterations are unrolled, so no function has a
Loop. In all descriptions B is the batch, T = H * W the tokens of a grid, h the heads, D the head size and
C = h D the channels.
"""

import functools

import onnx_ir as ir

from graph_passes.functions.attention import build_attention
from graph_passes.functions.banded_transport import build_banded_transport
from graph_passes.functions.comfyui_node_attention import build_comfyui_node_attention
from graph_passes.functions.comfyui_node_guard import build_comfyui_node_guard, build_comfyui_node_keys
from graph_passes.functions.comfyui_node_schedule import (
    build_comfyui_node_call_schedule,
    build_comfyui_node_schedule,
)
from graph_passes.functions.comfyui_node_transport import (
    build_comfyui_node_momentum,
    build_comfyui_node_transport,
)
from graph_passes.functions.dense_transport import build_dense_transport
from graph_passes.functions.key_guard import build_key_guard
from graph_passes.functions.projected_attention import build_projected_attention
from graph_passes.functions.schedule import build_schedule
from graph_passes.functions.site_metrics import build_site_metrics
from graph_passes.functions.transport import build_transport
from graph_passes.guard import GuardOptions
from graph_passes.parameters import SwsParameters
from graph_passes.target import Target

__all__ = ["DOMAIN", "MATERIALIZED_LOGITS", "build_comfyui_node_functions", "build_functions"]

DOMAIN = "sws"
MATERIALIZED_LOGITS = "materialized_logits"
"""Overload of `KeyGuard` for sites with few tokens: `ChooseGuard` selects it."""


def build_functions(
    parameters: SwsParameters,
    dtype: ir.DataType,
    target: Target,
    guard: GuardOptions,
    *,
    site_metrics: bool = False,
    cross_attention: bool = False,
) -> dict[str, ir.Function]:
    """All functions of the preset `sws` by name, for a model whose activations have `dtype`.

    The overload `MATERIALIZED_LOGITS` of a function has the name `<function>.materialized_logits`.

    Args:
        parameters: Constants of the method.
        dtype: Of the model's activations.
        target: Runtime that the graph is for.
        guard: How the key guard is computed.
        site_metrics: Give `Attention` a second output with the metrics of its site.
        cross_attention: Add the functions of sites whose keys are of the text.

    Raises:
        GraphError: The fused guard does not support the parameters, or the share of rows is not supported.
    """
    built = _sws_functions(parameters, dtype, target, guard, site_metrics, cross_attention)
    return _clones(built)


# Building takes a quarter of a rewrite, and an export with static shapes has two rewrites.
@functools.lru_cache(maxsize=16)
def _sws_functions(
    parameters: SwsParameters,
    dtype: ir.DataType,
    target: Target,
    guard: GuardOptions,
    site_metrics: bool,
    cross_attention: bool,
) -> tuple[ir.Function, ...]:
    """The functions of `build_functions`; passes change clones of them."""
    functions = [
        build_schedule(parameters),
        build_transport(parameters, convolutions=not target.slow_convolutions, separate=target.costly_shapes),
        build_banded_transport(dtype),
        build_key_guard(parameters, dtype, target, guard.form, kl_only=guard.kl_only),
        build_attention(parameters, dtype, target, guard, site_metrics=site_metrics),
    ]
    if cross_attention:
        functions += [
            build_dense_transport(dtype, joined=not target.float16_attention),
            build_attention(parameters, dtype, target, guard, site_metrics=site_metrics, cross=True),
        ]
    if site_metrics:
        functions.append(build_site_metrics(dtype))
    if guard.form == "fused" and target.float16_attention and dtype != ir.DataType.FLOAT:
        functions.append(
            build_key_guard(parameters, dtype, target, guard.form, MATERIALIZED_LOGITS, kl_only=guard.kl_only)
        )
        # In bfloat16, rounding before or after the transport changes the guard's result.
        if dtype == ir.DataType.FLOAT16 and not target.plugin_operators and not site_metrics:
            functions.append(build_projected_attention(parameters, guard))
    return tuple(functions)


def build_comfyui_node_functions(
    parameters: SwsParameters,
    dtype: ir.DataType,
    *,
    site_metrics: bool = False,
    counted_sites: int | None = None,
) -> dict[str, ir.Function]:
    """All functions of the preset `comfyui-node` by name, for a model whose activations have `dtype`.

    Args:
        parameters: Constants of the method.
        dtype: Of the model's activations.
        site_metrics: Give `ComfyUINodeGuard` and `ComfyUINodeAttention` an output with the metrics of a site.
        counted_sites: Number of sites, where u is the counter of calls; None where u is computed from sigma.
    """
    return _clones(_comfyui_node_functions(parameters, dtype, site_metrics, counted_sites))


@functools.lru_cache(maxsize=16)
def _comfyui_node_functions(
    parameters: SwsParameters, dtype: ir.DataType, site_metrics: bool, counted_sites: int | None
) -> tuple[ir.Function, ...]:
    """The functions of `build_comfyui_node_functions`; passes change clones of them."""
    return (
        build_comfyui_node_schedule(parameters)
        if counted_sites is None
        else build_comfyui_node_call_schedule(parameters, counted_sites),
        build_comfyui_node_transport(parameters, dtype),
        build_comfyui_node_momentum(parameters),
        build_comfyui_node_keys(dtype),
        build_comfyui_node_guard(parameters, dtype, site_metrics),
        build_comfyui_node_attention(dtype, site_metrics),
    )


def _clones(functions: tuple[ir.Function, ...]) -> dict[str, ir.Function]:
    """A copy of each function, by its name and overload."""
    return {
        ".".join(filter(None, (function.name, function.overload))): function.clone() for function in functions
    }
