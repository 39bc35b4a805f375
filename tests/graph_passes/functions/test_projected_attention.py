"""A site that transports the input of its projections, against one that transports keys and values."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.functions import build_functions
from graph_passes.guard import GuardOptions
from graph_passes.parameters import STATE_RADIUS, SwsParameters, diamond_offsets
from graph_passes.target import TARGETS
from tests.graph_passes.functions.calls import Array, Call
from tests.graph_passes.functions.fused_attention import Emulation
from tests.graph_passes.functions.oracle import Oracle
from tests.graph_passes.functions.rows import KINDS, site_rows
from tests.graph_passes.functions.test_banded_transport import dense, random_band

PARAMETERS = SwsParameters()
HEIGHT, WIDTH, HEADS, SIZE = 12, 24, 2, 40
CHANNELS = HEADS * SIZE


@cache
def site(function: str, rows: str = "1") -> Call:
    guard, dtype = GuardOptions.parse("fused", rows), ir.DataType.FLOAT16
    functions = build_functions(PARAMETERS, dtype, TARGETS["tensorrt-rtx"], guard)
    shapes: dict[str, Sequence[int | str]] = {
        name: ["batch", HEIGHT * WIDTH, CHANNELS] for name in ("q", "x", "k", "v")
    }
    shapes |= {name: [CHANNELS, CHANNELS] for name in ("key_weight", "value_weight")}
    shapes["transport"] = ["batch", 145, HEIGHT, WIDTH]
    return Call(functions, function, shapes, dtype, {"num_heads": HEADS, "scale": SIZE**-0.5})


def smoothing() -> Array:
    """A transport whose rows have the sum 1, [1, 145, H, W]."""
    distance = np.abs(diamond_offsets(STATE_RADIUS)).sum(1)
    band = random_band(HEIGHT, WIDTH)[:1] * np.exp(-distance / 4)[:, None, None]
    return (band / band.sum(1, keepdims=True)).astype(np.float32)


def schedule(amplitude: float, tau_q: float, kappa: float = 0.02) -> dict[str, Array]:
    values = {"tau_q": tau_q, "amplitude": amplitude, "kappa": kappa, "key_gate": 1.0, "value_gain": 0.6}
    return {name: np.array([value], np.float32) for name, value in values.items()}


def exact_projection(seed: int) -> Array:
    """A permutation with signs: products with it are exact in every precision."""
    rng = np.random.default_rng(seed)
    return (np.eye(CHANNELS)[rng.permutation(CHANNELS)] * rng.choice([-1, 1], CHANNELS)).astype(np.float16)


def both(amplitude: float, tau_q: float, rows: str = "1") -> tuple[Array, Array]:
    """The outputs of `ProjectedAttention` and of `Attention` for the same site, in ONNX Runtime."""
    q, x, _ = (tokens[None].astype(np.float16) for tokens in site_rows("mid", HEIGHT, WIDTH, HEADS, SIZE, 0))
    weights = [exact_projection(seed) for seed in (1, 2)]
    common = {"q": q, "transport": smoothing(), **schedule(amplitude, tau_q)}
    (found,) = site("ProjectedAttention", rows=rows)(
        x=x, key_weight=weights[0], value_weight=weights[1], **common
    )
    (expected,) = site("Attention", rows=rows)(k=x @ weights[0], v=x @ weights[1], **common)
    return found, expected


@pytest.mark.parametrize("rows", ["1", "1/8", "kl:1/8"])
def test_equals_a_site_that_transports_both_outputs(rows: str) -> None:
    found, expected = both(1.0, 1.3, rows)
    unmixed, _ = both(0.0, 1.3, rows)
    largest = np.abs(expected).max()
    assert np.abs(found - expected).max() < 3e-3 * largest
    assert np.abs(unmixed - expected).max() > 3e-2 * largest


def test_no_amplitude_is_an_exact_bypass() -> None:
    found, expected = both(0.0, 1.0)
    np.testing.assert_array_equal(found, expected)


@cache
def counting() -> Emulation:
    """The site with the share of the steps within the budget as its output."""
    model = site("ProjectedAttention").model
    *_, compared = (node for node in model.graph if node.op_type == "Less")
    (cast,) = compared.outputs[0].consumers()
    (mean,) = cast.outputs[0].consumers()
    mean.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs[:] = mean.outputs
    return Emulation(model)


def test_step_is_the_exact_one_or_its_neighbour() -> None:
    """That of float16 keys, for rows of five kinds and with the rounding of fused float16 attention."""
    transport = smoothing()
    matrix = dense(transport)[0]
    rng = np.random.default_rng(3)
    weight = np.linalg.qr(rng.standard_normal((CHANNELS, CHANNELS)))[0].astype(np.float16)
    queries, tokens, amplitudes, budgets, expected = [], [], [], [], []
    for seed, kind in enumerate(KINDS):
        q, x, _ = site_rows(kind, HEIGHT, WIDTH, HEADS, SIZE, seed)
        q, x = (q @ weight).astype(np.float16), x.astype(np.float16)
        k = (x.astype(np.float32) @ weight.astype(np.float32)).astype(np.float16)
        k_perm = (matrix @ k.astype(np.float32)).astype(np.float16)
        oracle = Oracle(q.astype(np.float64), k.astype(np.float64), k_perm.astype(np.float64), HEADS, 1.2)
        # Small amplitudes have the smallest differences between neighbouring steps.
        for amplitude, share in ((1.0, 0.9), (1.0, 0.2), (0.1, 0.5)):
            mix = amplitude * oracle.entropy_factor()
            budget = share * oracle.divergence(PARAMETERS.key_cap * mix * 127 / 128)
            queries.append(q)
            tokens.append(x)
            amplitudes.append(amplitude)
            budgets.append(budget)
            expected.append(oracle.largest_step(mix, budget, PARAMETERS))
    count = len(expected)
    levels = {name: np.repeat(value, count) for name, value in schedule(1.0, 1.2).items()}
    levels |= {"amplitude": np.array(amplitudes, np.float32), "kappa": np.array(budgets, np.float32)}
    (within,) = counting()(
        q=np.stack(queries),
        x=np.stack(tokens),
        key_weight=weight,
        value_weight=weight,
        transport=np.repeat(transport, count, axis=0),
        **levels,
    )
    moved = np.rint(127 * within.ravel()).astype(int) - expected
    assert np.abs(moved).max() <= 1, moved
    assert np.count_nonzero(moved) <= 0.2 * len(moved), moved
