"""`sws.ComfyUINodeTransport`, `sws.ComfyUINodeMomentum`: text transport of the published ComfyUI node.

One dense matrix [1, n, n] for the whole batch; n is the number of text tokens, such as 77.
"""

from typing import Any

import onnx_ir as ir

from graph_passes.functions.building import Op, define_function, per_sample
from graph_passes.parameters import SwsParameters

FLOAT = ir.DataType.FLOAT
INT64 = ir.DataType.INT64
_SUM_FLOOR = 1e-8
_OUTSIDE = -1e4
_COARSE_SIDE = 8


def build_comfyui_node_transport(parameters: SwsParameters, dtype: ir.DataType) -> ir.Function:
    """`ComfyUINodeTransport(text [B, n, X], u [1]) -> fresh [1, n, n]` float32, without history.

    Only the shape of `text`, which has `dtype`, is used.
    """

    def body(op: Op, text: Any, u: Any) -> Any:
        tokens = op.Shape(text, start=1, end=2)
        token = op.Range(0, op.Squeeze(tokens, [0]), 1)
        height, width = _grid(op, tokens, token)
        row = op.Div(token, width)
        column = op.Sub(token, op.Mul(row, width))
        distance = op.Add(_differences(op, row), _differences(op, column))
        radius = _radius(op, height, width, u)
        score = op.Where(op.LessOrEqual(distance, radius), op.Neg(op.Div(distance, radius)), _OUTSIDE)
        transport = op.Softmax(op.Div(score, parameters.tau), axis=-1)
        return op.Unsqueeze(_balanced(op, transport, [1], [0], parameters.sinkhorn_iters), [0])

    return define_function("ComfyUINodeTransport", body, {"text": dtype, "u": FLOAT}, ["fresh"])


def build_comfyui_node_momentum(parameters: SwsParameters) -> ir.Function:
    """`ComfyUINodeMomentum(previous [1, n, n], fresh [1, n, n], mix [1]) -> transport [1, n, n]`, float32.

    `previous` is the transport of the site before. If it is zeros, there is none, and the result is `fresh`.
    If the amplitude `mix` is 0, the node skips the update, and the result is `previous`.
    """

    def body(op: Op, previous: Any, fresh: Any, mix: Any) -> Any:
        average = op.Add(op.Mul(previous, parameters.beta), op.Mul(fresh, 1.0 - parameters.beta))
        average = _balanced(op, average, [2], [1], parameters.rebalance_iters)
        some = op.Greater(op.ReduceMax(previous, [0, 1, 2], keepdims=1), 0.0)
        moved = op.Where(some, average, fresh)
        return op.Where(op.Greater(per_sample(op, mix, 3), 0.0), moved, previous)

    return define_function(
        "ComfyUINodeMomentum", body, {"previous": FLOAT, "fresh": FLOAT, "mix": FLOAT}, ["transport"]
    )


def _grid(op: Op, tokens: Any, token: Any) -> tuple[Any, Any]:
    """Height and width [1] int64 of the grid of n tokens; the width is round(sqrt(n)) if it divides n, or n.

    m(m + 1) < n holds exactly for m = 0 .. round(sqrt(n)) - 1, so counting these m gives the rounded root.
    """
    below = op.Less(op.Mul(token, op.Add(token, [1])), tokens)
    root = op.Cast(op.ReduceSum(op.Cast(below, to=int(FLOAT)), [0], keepdims=1), to=int(INT64))
    divides = op.Equal(op.Mul(op.Div(tokens, root), root), tokens)
    width = op.Where(divides, root, tokens)
    return op.Div(tokens, width), width


def _differences(op: Op, place: Any) -> Any:
    """|a - b| for all pairs of `place` [n] int64, [n, n] float32."""
    place = op.Cast(place, to=int(FLOAT))
    return op.Abs(op.Sub(op.Unsqueeze(place, [1]), op.Unsqueeze(place, [0])))


def _radius(op: Op, height: Any, width: Any, u: Any) -> Any:
    """max(1, int(0.5 * max(1, min(height, width, max(1, int(8 (1 - u)))) // 2))), [1] float32.

    The inner minimum is at most 8. The result is 2 if it is 8, on a grid of at least 8 x 8 at u = 0, else 1.
    """
    shorter = op.Min(height, width)
    coarse = op.And(op.GreaterOrEqual(shorter, [_COARSE_SIDE]), op.LessOrEqual(u, 0.0))
    return op.Where(coarse, 2.0, 1.0)


def _balanced(op: Op, x: Any, along_rows: list[int], along_columns: list[int], iterations: int) -> Any:
    for _ in range(iterations):
        for axes in (along_rows, along_columns):
            x = op.Div(x, op.Max(op.ReduceSum(x, axes, keepdims=1), _SUM_FLOOR))
    return x
