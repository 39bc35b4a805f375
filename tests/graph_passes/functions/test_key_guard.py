"""The fused guards find the step of the literal guard, on worst cases."""

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_passes.errors import GraphError
from graph_passes.functions import build_functions
from graph_passes.functions.building import Op, define_function
from graph_passes.functions.key_guard_inputs import GuardInputs
from graph_passes.functions.row_statistics import RowStatistics
from graph_passes.guard import GuardForm, GuardOptions
from graph_passes.parameters import SwsParameters
from graph_passes.target import TARGETS
from tests.graph_passes.functions.calls import FLOAT, Array, Call
from tests.graph_passes.functions.oracle import Oracle

HEADS, SIZE = 2, 16
WIDTH = HEADS * SIZE
FLOAT16 = ir.DataType.FLOAT16

STORED = "tensorrt-rtx"

Tokens = tuple[Array, Array, Array]


@cache
def guard(
    form: GuardForm,
    parameters: SwsParameters = SwsParameters(),  # noqa: B008  (frozen)
    dtype: ir.DataType = FLOAT,
    target: str = "onnxruntime",
    heads: int = HEADS,
    size: int = SIZE,
) -> Call:
    rows = ["batch", "rows", heads * size]
    keys = ["batch", "tokens", heads * size]
    return Call(
        build_functions(parameters, dtype, TARGETS[target], GuardOptions(form)),
        "KeyGuard",
        {"q": rows, "k": keys, "k_perm": keys},
        FLOAT,
        {"num_heads": heads, "scale": size**-0.5},
    )


def per_sample(kappa: float) -> dict[str, Array]:
    """Two samples with their own temperature, amplitude and budget."""
    values = {
        "tau_q": [1.0, 1.5],
        "amplitude": [1.0, 0.6],
        "kappa": [kappa, 0.7 * kappa],
        "key_gate": [1.0, 1.0],
        "value_gain": [0.6, 0.5],
    }
    return {name: np.array(value, np.float32) for name, value in values.items()}


def steps(call: Call, tokens: Tokens, kappa: float, parameters: SwsParameters) -> tuple[Array, Array]:
    """Step of the grid and value mixing that a guard finds, [2] each."""
    q, k, k_perm = tokens
    alpha, value_share = call(q=q, k=k, k_perm=k_perm, **per_sample(kappa))
    gain = per_sample(kappa)["value_gain"]
    limit = parameters.key_cap * value_share / gain
    steps = alpha / np.maximum(limit, 1e-30) * 2**parameters.bisection_steps
    return np.rint(steps), value_share


def noise(count: int, seed: int = 0, width: int = WIDTH) -> Tokens:
    rng = np.random.default_rng(seed)
    q, k, e = (rng.standard_normal((2, count, width), dtype=np.float32) for _ in range(3))
    k_perm = 0.5 * k + 0.3 * np.roll(k, 1, axis=1) + 0.1 * e
    return q, k, k_perm.astype(np.float32)


def scaled(factor: float) -> Callable[[Tokens], Tokens]:
    return lambda tokens: (np.float32(factor) * tokens[0], *tokens[1:])


def one_hot(tokens: Tokens) -> Tokens:
    _, k, _ = tokens
    return np.float32(12) * k, k, np.float32(0.7) * np.roll(k, 1, axis=1)


def equal_rows(tokens: Tokens) -> Tokens:
    q, k, k_perm = tokens
    return np.broadcast_to(3 * q[:, :1], q.shape).copy(), k, k_perm


def unrelated(tokens: Tokens) -> Tokens:
    q, k, _ = tokens
    return 2 * q, k, np.random.default_rng(7).standard_normal(k.shape, dtype=np.float32)


def long_keys(tokens: Tokens) -> Tokens:
    """Three keys eight times as long as the others."""
    q, k, _ = tokens
    k = k.copy()
    k[:, [3, 20, 41]] *= 8
    return q, k, np.float32(0.8) * k.mean(1, keepdims=True) + np.float32(0.2) * k


def few_rows(tokens: Tokens) -> Tokens:
    """One row in twenty carries the divergence."""
    q, k, k_perm = tokens
    q = 4 * q
    q[:, q.shape[1] // 20 :] *= 0.05
    return q, k, k_perm


def offset(tokens: Tokens) -> Tokens:
    """All keys share a large vector, which no weight depends on."""
    q, k, k_perm = tokens
    return 2 * q + 4, k + 8, k_perm + 8


CASES: dict[str, Callable[[Tokens], Tokens]] = {
    "flat": scaled(0.3),
    "usual": scaled(1),
    "peaked": scaled(4),
    "large logits": scaled(16),
    "one-hot rows": one_hot,
    "equal rows": equal_rows,
    "unrelated keys": unrelated,
    "long keys": long_keys,
    "few rows": few_rows,
    "offset": offset,
}


def grid_of_budgets() -> list[Any]:
    """(key_cap, tokens, kappa): each value in default tests, all combinations in slow ones."""
    default = {(0.3, 64, 0.09), (1.0, 64, 0.003), (1.0, 250, 0.02)}
    combinations = itertools.product((0.3, 1.0), (64, 250), (0.09, 0.02, 0.003))
    return [
        pytest.param(*values, marks=() if values in default else pytest.mark.slow) for values in combinations
    ]


@pytest.mark.parametrize(("key_cap", "count", "kappa"), grid_of_budgets())
@pytest.mark.parametrize("case", CASES)
def test_same_step(case: str, key_cap: float, count: int, kappa: float) -> None:
    parameters = SwsParameters(key_cap=key_cap)
    tokens = CASES[case](noise(count))
    expected, share = steps(guard("literal", parameters), tokens, kappa, parameters)
    found, found_share = steps(guard("fused", parameters), tokens, kappa, parameters)
    # A divergence within 1e-4 of the budget may fall on either side.
    assert np.abs(found - expected).max() <= (1 if case == "offset" else 0)
    assert np.abs(found_share - share).max() < 1e-4


def assert_exact(tokens: Tokens, inputs: dict[str, Array], parameters: SwsParameters, **size: int) -> int:
    """Check a guard with branches against float64, sample by sample; how many budgets bind."""
    call = guard("fused", parameters, **size)
    alpha, value_share = call(q=tokens[0], k=tokens[1], k_perm=tokens[2], **inputs)
    last, binding = 2**parameters.bisection_steps - 1, 0
    for i, share in enumerate(alpha):
        oracle = Oracle(*(x[i] for x in tokens), size.get("heads", HEADS), float(inputs["tau_q"][i]))
        mix = float(value_share[i] / inputs["value_gain"][i])
        assert abs(mix - float(inputs["amplitude"][i]) * oracle.entropy_factor()) < 2e-5
        unit = parameters.key_cap * mix / (last + 1)
        step = round(float(share) / unit)
        assert abs(share / unit - step) < 1e-3
        budget = float(inputs["kappa"][i])
        # Both neighbours were evaluated, to the precision of float32.
        assert oracle.divergence(unit * step) <= budget * (1 + 2e-3)
        if step < last:
            binding += 1
            assert oracle.divergence(unit * (step + 1)) >= budget * (1 - 2e-3)
    return binding


@pytest.mark.parametrize("kappa", [0.09, 0.01, 0.003])
@pytest.mark.parametrize("key_cap", [0.3, 1.0])
def test_the_step_is_exact_for_queries_of_very_different_lengths(key_cap: float, kappa: float) -> None:
    parameters, binding = SwsParameters(key_cap=key_cap), 0
    for seed in range(12):
        q, k, k_perm = noise(48 + 8 * (seed % 3), seed)
        binding += assert_exact((log_normal(q, seed), k, k_perm), per_sample(kappa), parameters)
    assert binding >= 1


def log_normal(q: Array, seed: int) -> Array:
    """Queries of very different lengths, so that a few rows carry the divergence."""
    lengths = np.exp(np.random.default_rng(seed).normal(0, 2, q.shape[:2]))
    return q * lengths[..., None].astype(np.float32)


@pytest.mark.parametrize("factor", [60.0, 300.0])
def test_large_logits(factor: float) -> None:
    q, k, k_perm = noise(64)
    tokens = (np.float32(factor) * q, k, k_perm)
    inputs = per_sample(0.05)
    alpha, value_share = guard("fused")(q=tokens[0], k=tokens[1], k_perm=tokens[2], **inputs)
    for i in range(2):
        oracle = Oracle(*(x[i] for x in tokens), HEADS, float(inputs["tau_q"][i]))
        mix = value_share[i] / inputs["value_gain"][i]
        # Logits of 1000 have an error of 1e-4 in float32.
        assert abs(mix - inputs["amplitude"][i] * oracle.entropy_factor()) < 3e-7 * oracle.largest_logit()
        step = alpha[i] / (0.3 * mix / 128)
        assert abs(step - oracle.largest_step(float(mix), float(inputs["kappa"][i]), SwsParameters())) < 1.01


def test_a_peak_between_the_surveyed_keys() -> None:
    """Two keys have all the weight, hundreds of nats above the keys that the bounds evaluate."""
    q, k, k_perm = noise(64)
    k = k.copy()
    k[:, [3, 5]] += 100
    q = np.abs(q)
    _, value_share = guard("fused")(q=q, k=k, k_perm=k_perm, **per_sample(0.05))
    oracle = Oracle(q[0], k[0], k_perm[0], HEADS, 1.0)
    assert oracle.largest_logit() > 200
    assert 0.2 < oracle.entropy().max() < 0.7
    assert value_share[0] / 0.6 == pytest.approx(oracle.entropy_factor(), abs=1e-3)
    _, stored = guard("fused", target=STORED)(q=q, k=k, k_perm=k_perm, **per_sample(0.05))
    assert stored[0] / 0.6 == pytest.approx(oracle.entropy_factor(), abs=1e-3)


def test_budgets_bind_in_the_cases() -> None:
    """Otherwise `test_same_step` would compare the last step only."""
    parameters = SwsParameters(key_cap=1.0)
    found = [steps(guard("fused", parameters), CASES[case](noise(64)), 0.02, parameters)[0] for case in CASES]
    assert sum((step < 127).any() for step in found) >= 6
    assert len(np.unique(found)) > 6


@pytest.mark.parametrize("bisection_steps", [1, 2, 5, 8])
def test_same_step_on_other_grids(bisection_steps: int) -> None:
    parameters = SwsParameters(key_cap=1.0, bisection_steps=bisection_steps)
    for kappa in (0.09, 0.02, 0.003):
        tokens = CASES["peaked"](noise(64))
        expected, _ = steps(guard("literal", parameters), tokens, kappa, parameters)
        found, _ = steps(guard("fused", parameters), tokens, kappa, parameters)
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("target", ["onnxruntime", STORED])
def test_samples_are_independent(target: str) -> None:
    """One budget binds, one does not, one sample is gated, one has no amplitude."""
    call = guard("fused", target=target)
    q, k, k_perm = (np.repeat(x[:1], 4, 0) for x in noise(64))
    q *= np.array([16, 1, 16, 4], np.float32)[:, None, None]
    inputs = {
        "tau_q": np.array([1.0, 1.5, 1.2, 1.1], np.float32),
        "amplitude": np.array([1.0, 0.6, 0.9, 0.0], np.float32),
        "kappa": np.array([0.003, 0.09, 0.003, 0.003], np.float32),
        "key_gate": np.array([1, 1, 0, 1], np.float32),
        "value_gain": np.full(4, 0.5, np.float32),
    }
    alpha, value_share = call(q=q, k=k, k_perm=k_perm, **inputs)
    step = alpha[:2] / (0.3 * value_share[:2] / 0.5 / 128)
    assert 0 < step[0] < 126.5 < step[1]
    assert alpha[2:].tolist() == [0, 0]
    assert value_share[2] > 0.05 > value_share[3] == 0
    for i in range(4):
        alone = call(
            q=q[i : i + 1],
            k=k[i : i + 1],
            k_perm=k_perm[i : i + 1],
            **{name: value[i : i + 1] for name, value in inputs.items()},
        )
        np.testing.assert_allclose([alone[0][0], alone[1][0]], [alpha[i], value_share[i]], rtol=3e-5)


def test_nan_stays_in_its_sample() -> None:
    q, k, k_perm = noise(64)
    q = 16 * q
    expected, _ = guard("fused")(q=q, k=k, k_perm=k_perm, **per_sample(0.003))
    q[0, 0, 0] = np.nan
    found, _ = guard("fused")(q=q, k=k, k_perm=k_perm, **per_sample(0.003))
    assert found[1] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize("case", ["usual", "large logits", "long keys"])
def test_graph_optimisations_change_no_step(case: str) -> None:
    parameters = SwsParameters(key_cap=1.0)
    q, k, k_perm = CASES[case](noise(64))
    inputs = {"q": q, "k": k, "k_perm": k_perm, **per_sample(0.02)}
    call = guard("fused", parameters)
    np.testing.assert_allclose(call.unoptimized(**inputs), call(**inputs), rtol=2e-5)


def attentions(q_factor: float, key_cap: float = 0.3, **changed: float) -> int:
    """Attentions that the guard with branches executes."""
    q, k, k_perm = noise(64)
    inputs = per_sample(0.05) | {name: np.full(2, value, np.float32) for name, value in changed.items()}
    call = guard("fused", SwsParameters(key_cap=key_cap))
    executed = call.executed(q=np.float32(q_factor) * q, k=k, k_perm=k_perm, **inputs)
    return executed["Attention"]


def test_unneeded_attentions_are_not_executed() -> None:
    assert attentions(4, key_gate=0) == 1
    # The bound decides, one evaluation decides, several are needed.
    assert attentions(1, amplitude=0.05) == 1
    assert attentions(1) == 2
    assert 4 <= attentions(4, key_cap=1.0, kappa=0.01) <= 6


def test_extreme_logits_take_one_more_pass_and_large_ones_none() -> None:
    assert attentions(20, amplitude=0.01) == 1
    assert attentions(300, amplitude=1e-4) == 2
    # Shares so large that logits change by 60 nats need one more attention per evaluation.
    assert attentions(3000, key_cap=1.0, kappa=100) == 4


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(2, 40),
    spread=st.floats(0, 2),
    factor=st.floats(0.01, 30),
    share=st.floats(0, 1),
)
def test_the_bound_is_an_upper_bound(
    seed: int, count: int, spread: float, factor: float, share: float
) -> None:
    rng = np.random.default_rng(seed)
    q, k, k_perm = noise(count, seed)
    q = q * np.float32(factor) * np.exp(rng.normal(0, spread, q.shape)).astype(np.float32)
    k = k * np.exp(rng.normal(0, spread, k.shape)).astype(np.float32)
    shares = np.array([share, share / 2], np.float32)
    (bound,) = divergence_bound()(q=q, k=k, k_perm=k_perm, tau_q=np.array([1, 2], np.float32), share=shares)
    for i, tau_q in enumerate((1.0, 2.0)):
        oracle = Oracle(q[i], k[i], k_perm[i], HEADS, tau_q)
        assert oracle.divergence(float(shares[i])) <= bound[i] * (1 + 1e-5) + 1e-12


def test_the_bound_is_sharp_for_two_keys_and_flat_rows() -> None:
    """Half of the weight at either end of the range, to second order in the share."""
    q = np.ones((2, 1, WIDTH), np.float32)
    k = np.zeros((2, 2, WIDTH), np.float32)
    k_perm = np.stack([np.ones(WIDTH), -np.ones(WIDTH)])[None].repeat(2, 0).astype(np.float32)
    share = np.full(2, 0.01, np.float32)
    (bound,) = divergence_bound()(q=q, k=k, k_perm=k_perm, tau_q=np.ones(2, np.float32), share=share)
    assert bound[0] == pytest.approx(Oracle(q[0], k[0], k_perm[0], HEADS, 1.0).divergence(0.01), rel=1e-2)


@cache
def divergence_bound() -> Call:
    def body(op: Op, q: Any, k: Any, k_perm: Any, tau_q: Any, share: Any) -> Any:
        rows = RowStatistics(op, GuardInputs(q, k, k_perm, tau_q, *[None] * 4), FLOAT)
        return rows.divergence_bound(op, share)

    inputs = dict.fromkeys(("q", "k", "k_perm", "tau_q", "share"), FLOAT)
    attributes = [
        ir.Attr("num_heads", ir.AttributeType.INT, None),
        ir.Attr("scale", ir.AttributeType.FLOAT, None),
    ]
    function = define_function("Bound", body, inputs, ["bound"], attributes)
    shape = ["batch", "tokens", WIDTH]
    return Call(
        {"Bound": function},
        "Bound",
        {"q": ["batch", "rows", WIDTH], "k": shape, "k_perm": shape},
        FLOAT,
        {"num_heads": HEADS, "scale": SIZE**-0.5},
    )


@pytest.mark.parametrize("form", ["literal", "fused"])
def test_zero_amplitude_or_gate_mixes_no_keys(form: GuardForm) -> None:
    q, k, k_perm = noise(64)
    inputs = per_sample(0.05) | {"amplitude": np.array([0, 1], np.float32)}
    inputs["key_gate"] = np.array([1, 0], np.float32)
    alpha, value_share = guard(form)(q=q, k=k, k_perm=k_perm, **inputs)
    assert alpha.tolist() == [0, 0]
    assert value_share[0] == 0
    assert value_share[1] > 0.1


@pytest.mark.parametrize("form", ["literal", "fused"])
def test_equal_keys_give_finite_results(form: GuardForm) -> None:
    q, k, _ = noise(64)
    same = np.broadcast_to(k[:, :1], k.shape).copy()
    alpha, value_share = guard(form)(q=q, k=same, k_perm=same, **per_sample(0.05))
    assert np.isfinite([alpha, value_share]).all()


def rounded(tokens: Tokens, dtype: type) -> list[np.ndarray]:
    return [array.astype(dtype) for array in tokens]


@pytest.mark.parametrize("case", ["flat", "usual", "peaked", "one-hot rows", "equal rows", "long keys"])
def test_float16_inputs(case: str) -> None:
    """float32 statistics on a float16 model: the step of its own rounded tensors."""
    narrow = rounded(CASES[case](noise(128)), np.float16)
    wide = tuple(array.astype(np.float32) for array in narrow)
    parameters = SwsParameters()
    call = guard("fused", dtype=FLOAT16)
    for kappa in (0.09, 0.02, 0.003):
        expected, _ = steps(guard("literal"), wide, kappa, parameters)  # type: ignore[arg-type]
        found, _ = steps(call, tuple(narrow), kappa, parameters)  # type: ignore[arg-type]
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("kappa", [0.09, 0.02, 0.003])
@pytest.mark.parametrize("case", ["usual", "peaked", "large logits", "long keys"])
def test_bfloat16_inputs(case: str, kappa: float) -> None:
    """ONNX Runtime has no bfloat16: its numbers in float32, whose products are exact, as in the model."""
    tokens = tuple(as_bfloat16(x) for x in CASES[case](noise(64)))
    assert_exact(tokens, per_sample(kappa), SwsParameters(key_cap=1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 0), ("bfloat16", 1)])
def test_16_bit_operands_move_the_step_by_one_at_most(dtype: str, largest: int) -> None:
    """What tensor cores do: products of 16-bit queries and mixed keys, accumulated in float32."""
    narrow = as_bfloat16 if dtype == "bfloat16" else lambda x: x.astype(np.float16).astype(np.float32)
    parameters = SwsParameters(key_cap=1.0)
    for seed in range(4):
        q, k, k_perm = (narrow(x[0]) for x in CASES["peaked"](noise(64, seed)))
        exact = Oracle(q, k, k_perm, HEADS, 1.3)
        mix = exact.entropy_factor()
        step = exact.largest_step(mix, 0.02, parameters)
        assert 10 < step < 127
        within = []
        for n in range(step - 2, step + 4):
            keys = narrow(k + np.float32(mix * n / 128) * (k_perm - k))
            divergence = Oracle(narrow(q / np.float32(1.3)), k, keys, HEADS, 1.0).divergence(1.0)
            within.append(divergence <= 0.02)
        assert abs(sum(within) - 3) <= largest


def as_bfloat16(x: Array) -> Array:
    """The nearest bfloat16 numbers, in float32."""
    bits = x.astype(np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return nearest.astype(np.uint32).view(np.float32)


def test_the_guard_with_branches_materializes_no_logits() -> None:
    kinds = [node.op_type for node in guard("fused").model.graph.all_nodes()]
    assert not {"Softmax", "LogSoftmax"} & set(kinds)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1024, 4096, 16384])
def test_the_step_is_exact_at_real_sizes(count: int) -> None:
    """A head of 8 channels, against float64 a thousand rows at a time."""
    parameters, size = SwsParameters(), 8
    for factor, kappa in ((2.0, 0.05), (4.0, 0.003)):
        q, k, k_perm = (x[0] for x in noise(count, width=size))
        q = np.float32(factor) * q
        inputs = {name: value[:1] for name, value in per_sample(kappa).items()}
        call = guard("fused", parameters, heads=1, size=size)
        alpha, value_share = call(q=q[None], k=k[None], k_perm=k_perm[None], **inputs)
        unit = 0.3 * float(value_share[0]) / 0.6 / 128
        step = round(float(alpha[0]) / unit)
        entropies, divergences = [], []
        for begin in range(0, count, 1024):
            rows = Oracle(q[begin : begin + 1024], k, k_perm, 1, 1.0)
            entropies.append(rows.entropy())
            divergences.append([rows.divergence(unit * step), rows.divergence(unit * (step + 1))])
        entropy = np.concatenate(entropies, 1)
        factor_found = (entropy.mean() - entropy.min()) / np.ptp(entropy)
        assert value_share[0] / 0.6 == pytest.approx(factor_found, abs=2e-5)
        within, beyond = np.mean(divergences, 0)
        assert within <= kappa * (1 + 1e-3)
        assert step == 127 or beyond >= kappa * (1 - 1e-3)
        assert (step < 127) == (kappa == 0.003)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (SwsParameters(kl_floor=0.0, kl_slope=0.0), "KL budget falls to 0 nats"),
        (SwsParameters(kl_floor=0.0, kl_slope=0.003), r"KL budget falls to 0\.00075 nats"),
        (SwsParameters(bisection_steps=9), "bisection_steps is 9"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters: SwsParameters, message: str) -> None:
    with pytest.raises(GraphError, match=f"{message}.*use guard literal"):
        build_functions(parameters, FLOAT, TARGETS["onnxruntime"], GuardOptions("fused"))
    assert build_functions(parameters, FLOAT, TARGETS["onnxruntime"], GuardOptions("literal"))
