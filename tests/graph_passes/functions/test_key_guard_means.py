"""The key guard of the GPU targets against float64, with fused float16 attention emulated."""

import collections
import functools
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.guard import misses_along_a_sampling
from graph_passes.functions import MATERIALIZED_LOGITS, build_functions
from graph_passes.functions.building import Op, define_function
from graph_passes.functions.key_guard_means import CurvatureRows
from graph_passes.guard import GuardOptions
from graph_passes.parameters import SwsParameters
from graph_passes.target import TARGETS
from tests.export_runs import TRAINED
from tests.graph_passes.functions.calls import FLOAT, Array, Call
from tests.graph_passes.functions.fused_attention import Emulation, fused_attention
from tests.graph_passes.functions.oracle import Oracle
from tests.graph_passes.functions.rows import KINDS, site_rows

PARAMETERS = SwsParameters()
DTYPES = {ir.DataType.FLOAT16: np.float16, ir.DataType.BFLOAT16: ml_dtypes.bfloat16}
LARGEST_ERROR = 1e-3
"""Of the entropy factor."""


TARGET = TARGETS["tensorrt-rtx"]


@functools.cache
def guard(heads: int, size: int, dtype: ir.DataType = ir.DataType.FLOAT16, name: str = "KeyGuard") -> Call:
    queries, keys = (["batch", count, heads * size] for count in ("rows", "tokens"))
    functions = build_functions(PARAMETERS, dtype, TARGET, GuardOptions("fused"))
    attributes = {"num_heads": heads, "scale": size**-0.5}
    return Call(functions, name, {"q": queries, "k": keys, "k_perm": keys}, FLOAT, attributes)


@functools.cache
def emulated(heads: int, size: int, dtype: ir.DataType = ir.DataType.FLOAT16) -> Emulation:
    return Emulation(guard(heads, size, dtype).model)


Sample = tuple[Array, Array, Array]
"""q, k and k_perm of one member of a batch."""


def moved_steps(
    call: Emulation, samples: list[Sample], heads: int, narrow: type, error: float = LARGEST_ERROR
) -> list[int]:
    """By how many steps a guard misses the exact one, for up to five budgets; checks the entropy factors.

    Each sample has its own temperature and amplitude. Budgets are those of the default schedule, or ones that
    bind under the cap. All samples as a batch give the results of each one alone.
    """
    count = len(samples)
    tau_q, amplitude = (np.linspace(*ends, count, dtype=np.float32) for ends in ((1.1, 1.5), (1.0, 0.8)))
    alphas, mixes, kappas, moved = [], [], [], []
    for i, sample in enumerate(samples):
        q, k, k_perm = (x.astype(narrow) for x in sample)
        oracle = Oracle(*(x.astype(np.float64) for x in (q, k, k_perm)), heads, float(tau_q[i]))
        exact = float(amplitude[i]) * oracle.entropy_factor()
        kappa = np.array(oracle.binding_budgets(exact, PARAMETERS), np.float32)
        alpha, mix = run(
            call, [q[None], k[None], k_perm[None]], tau_q[i : i + 1], amplitude[i : i + 1], kappa
        )
        assert mix[0] == pytest.approx(exact, abs=error)
        steps = alpha / (PARAMETERS.key_cap * mix[0] / 128)
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
        expected = [oracle.largest_step(exact, float(budget), PARAMETERS) for budget in kappa]
        moved += [int(step - right) for step, right in zip(np.rint(steps), expected, strict=True)]
        alphas.append(alpha[-1])
        mixes.append(mix[0])
        kappas.append(kappa[-1])
    batch = [np.stack(x).astype(narrow) for x in zip(*samples, strict=True)]
    alpha, mix = run(call, batch, tau_q, amplitude, np.array(kappas))
    np.testing.assert_allclose(alpha, alphas, rtol=2e-4)
    np.testing.assert_allclose(mix, mixes, rtol=2e-4)
    return moved


def run(
    call: Emulation, tokens: list[Array], tau_q: Array, amplitude: Array, kappa: Array
) -> tuple[Array, Array]:
    """alpha_k and the amplitude a. Of one sample, several budgets are broadcast."""
    ones = np.ones(len(tau_q), np.float32)
    named = {"tau_q": tau_q, "amplitude": amplitude, "key_gate": ones, "value_gain": ones, "kappa": kappa}
    alpha, mix = call(**dict(zip(("q", "k", "k_perm"), tokens, strict=True)), **named)
    return alpha, mix


def five_kinds(height: int, width: int, heads: int, size: int, rows: int | None = None) -> list[Sample]:
    return [site_rows(kind, height, width, heads, size, seed, rows) for seed, kind in enumerate(KINDS)]


def assert_neighbours(moved: list[int], share: float = 0.2) -> None:
    """At most a neighbouring step of 128, and the exact one in most cases."""
    assert np.abs(moved).max() <= 1, moved
    assert np.count_nonzero(moved) <= share * len(moved), moved


@pytest.mark.parametrize(
    ("height", "width", "heads", "size", "rows"), [(12, 24, 2, 40, 192), (12, 24, 8, 24, 264)]
)
def test_step_is_the_exact_one_or_its_neighbour(
    height: int, width: int, heads: int, size: int, rows: int
) -> None:
    """Five samples with rows of five kinds in a batch, on grids that are not square.

    The curvature is the mean over all of 2 x 192 rows, and over every third of 8 x 264.
    """
    samples = five_kinds(height, width, heads, size, rows)
    assert_neighbours(moved_steps(emulated(heads, size), samples, heads, np.float16))


def test_a_small_largest_step() -> None:
    """At a small L the change of K' is far smaller than K': L must be rounded alike at all three nodes."""
    moved = []
    for q, k, k_perm in five_kinds(12, 24, 2, 40, 96):
        narrow = [x.astype(np.float16) for x in (q, k, k_perm)]
        oracle = Oracle(*(x.astype(np.float64) for x in narrow), 2, 1.2)
        exact = 0.1 * oracle.entropy_factor()
        last = oracle.divergence(PARAMETERS.key_cap * exact * 127 / 128)
        kappa = np.array([0.95, 0.8, 0.6, 0.3], np.float32) * np.float32(last)
        alpha, mix = run(
            emulated(2, 40),
            [x[None] for x in narrow],
            np.array([1.2], np.float32),
            np.array([0.1], np.float32),
            kappa,
        )
        steps = np.rint(alpha / (PARAMETERS.key_cap * mix[0] / 128))
        expected = [oracle.largest_step(exact, float(budget), PARAMETERS) for budget in kappa]
        moved += [int(step - right) for step, right in zip(steps, expected, strict=True)]
    assert_neighbours(moved, 0.1)


def test_mean_logits_have_the_temperature_of_the_weights() -> None:
    """The factor of the logits is rounded to float16, here by 5e-4; the largest logits are 80."""
    q, k, k_perm = (x.astype(np.float16) for x in site_rows("mixed", 16, 16, 4, 80, 3, 192))
    tau_q, one = np.array([1.788], np.float32), np.ones(1, np.float32)
    oracle = Oracle(*(x.astype(np.float64) for x in (q, k, k_perm)), 4, 1.788)
    _, mix = run(emulated(4, 80), [q[None], k[None], k_perm[None]], tau_q, one, one)
    assert mix[0] == pytest.approx(oracle.entropy_factor(), abs=5e-4)


def test_bfloat16_model() -> None:
    samples = five_kinds(12, 24, 2, 40, 192)
    call = emulated(2, 40, ir.DataType.BFLOAT16)
    assert_neighbours(moved_steps(call, samples, 2, ml_dtypes.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize(("side", "heads", "size"), [(32, 4, 80), (32, 4, 64), (64, 2, 40), (64, 2, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_at_the_sizes_of_models(dtype: ir.DataType, side: int, heads: int, size: int) -> None:
    samples = five_kinds(side, side, heads, size, 768)
    assert_neighbours(moved_steps(emulated(heads, size, dtype), samples, heads, DTYPES[dtype]))


@pytest.mark.slow
def test_trained_example_along_a_sampling() -> None:
    """Its own queries and keys, at its own budgets and at one that binds."""
    (result,) = misses_along_a_sampling(TRAINED)
    assert result["cases"] >= 40
    assert result["by_at_most"] <= 1
    assert result["entropy_factor_error"] <= LARGEST_ERROR


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, FLOAT])
def test_materialized_logits(dtype: ir.DataType) -> None:
    """For few tokens, and for a float32 model."""
    name = "KeyGuard" if dtype == FLOAT else f"KeyGuard.{MATERIALIZED_LOGITS}"
    narrow = np.float32 if dtype == FLOAT else np.float16
    call = Emulation(guard(2, 40, dtype, name).model)
    moved = moved_steps(call, five_kinds(8, 12, 2, 40), 2, narrow, error=1e-4)
    assert_neighbours(moved)


def test_the_emulation_rounds() -> None:
    """Errors are those of the rounded output and of rounded weights."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 300, 40)).astype(np.float16) for _ in range(3))
    logits = q.astype(np.float64) @ k.astype(np.float64).transpose(0, 1, 3, 2)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    exact = weights / weights.sum(-1, keepdims=True) @ v.astype(np.float64)
    found = fused_attention(q, k, v, 1.0)
    rounding = np.abs(exact - exact.astype(np.float16)).mean()
    assert rounding < np.abs(exact - found).mean() < 2 * rounding


@pytest.mark.parametrize(
    ("rows", "chosen"), [(40, slice(None)), (682, slice(None)), (2500, slice(3, None, 7))]
)
def test_rows_of_the_curvature(rows: int, chosen: slice) -> None:
    """About 1024 of three heads; their mean is that of the gathered rows, beside the mean over all."""

    def body(op: Op, x: Any) -> Any:
        curvature = CurvatureRows(op, op.Shape(x, start=2, end=3))
        return curvature.means(op, x), curvature.of(op, x)

    attribute = ir.Attr("num_heads", ir.AttributeType.INT, None)
    function = define_function("Rows", body, {"x": FLOAT}, ["means", "some"], [attribute])
    shapes: dict[str, Sequence[int | str]] = {"x": ["batch", "heads", "rows", 1]}
    call = Call({"Rows": function}, "Rows", shapes, FLOAT, {"num_heads": 3})
    x = np.random.default_rng(0).standard_normal((2, 3, rows, 1), dtype=np.float32)
    means, some = call(x=x)
    np.testing.assert_array_equal(some, x[:, :, chosen])
    expected = [y.mean((1, 2, 3)) for y in (x, some)]
    np.testing.assert_allclose(means, np.stack(expected, axis=1)[:, None, None], atol=1e-6)


def test_entropies_of_flat_rows() -> None:
    """They differ by little, and the entropy factor is relative to the difference."""
    q, k, k_perm = (x.astype(np.float16) for x in site_rows("flat", 64, 64, 1, 40, 0, 192))
    one = np.ones(1, np.float32)
    exact = Oracle(*(x.astype(np.float64) for x in (q, k, k_perm)), 1, 1.0).entropy_factor()
    _, mix = run(emulated(1, 40), [q[None], k[None], k_perm[None]], one, one, one)
    assert mix[0] == pytest.approx(exact, abs=5e-4)


def operators(call: Call) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in call.model.graph.all_nodes())


def test_fused_form_has_four_attentions_and_no_logits() -> None:
    kinds = operators(guard(2, 40))
    assert kinds["Attention"] == 4
    assert not {"Softmax", "LogSoftmax", "If", "Einsum", "MatMul"} & kinds.keys()
    for node in guard(2, 40).model.graph:
        if node.op_type == "Attention":
            assert node.attributes["scale"].as_float() == 1.0


def test_stored_form_is_products_and_softmax_alone() -> None:
    """Slices and paddings of dynamic shapes are a dozen layers each in TensorRT."""
    kinds = operators(guard(2, 40, FLOAT))
    assert (kinds["Softmax"], kinds["Einsum"], kinds["MatMul"]) == (3, 3, 4)
    assert not {"Attention", "If", "Slice", "Pad", "Split"} & kinds.keys()


def test_rows_beyond_every_kernel_stay_finite() -> None:
    """Logits of thousands: the mixing stays within its cap."""
    samples = [(50 * q, k, k_perm) for q, k, k_perm in five_kinds(12, 24, 2, 40, 64)]
    batch = [np.stack(x).astype(np.float16) for x in zip(*samples, strict=True)]
    ones = np.ones(5, np.float32)
    alpha, mix = emulated(2, 40)(
        **dict(zip(("q", "k", "k_perm"), batch, strict=True)),
        **dict.fromkeys(("tau_q", "amplitude", "kappa", "key_gate", "value_gain"), ones),
    )
    assert np.isfinite([alpha, mix]).all()
    assert (alpha >= 0).all()
    assert (alpha <= 0.3 * mix).all()
