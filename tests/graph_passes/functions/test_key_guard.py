"""The fused guard lands on the literal guard's step: on the worst cases, not on the average."""

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.errors import GraphError
from graph_passes.functions import Guard, build_functions
from graph_passes.parameters import SwsParameters
from tests.graph_passes.functions.calls import FLOAT, Array, Call

HEADS, SIZE = 2, 16
WIDTH = HEADS * SIZE
FLOAT16 = ir.DataType.FLOAT16

Tokens = tuple[Array, Array, Array]


@cache
def guard(
    form: Guard,
    parameters: SwsParameters = SwsParameters(),  # noqa: B008  (frozen)
    dtype: ir.DataType = FLOAT,
    statistics: ir.DataType = FLOAT,
    heads: int = HEADS,
    size: int = SIZE,
) -> Call:
    rows = ["batch", "rows", heads * size]
    keys = ["batch", "tokens", heads * size]
    return Call(
        build_functions(parameters, dtype, form, statistics=statistics),
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


def needles(tokens: Tokens) -> Tokens:
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
    "needles": needles,
    "few rows": few_rows,
    "offset": offset,
}


@pytest.mark.parametrize("kappa", [0.09, 0.02, 0.003])
@pytest.mark.parametrize("count", [64, 250])
@pytest.mark.parametrize("key_cap", [0.3, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_same_step(case: str, key_cap: float, count: int, kappa: float) -> None:
    parameters = SwsParameters(key_cap=key_cap)
    tokens = CASES[case](noise(count))
    expected, share = steps(guard("literal", parameters), tokens, kappa, parameters)
    found, found_share = steps(guard("fused", parameters), tokens, kappa, parameters)
    # A divergence within 1e-4 of the budget may fall on either side.
    assert np.abs(found - expected).max() <= (1 if case == "offset" else 0)
    assert np.abs(found_share - share).max() < 1e-4


def test_budgets_bind_in_the_cases() -> None:
    """Otherwise the test of equal steps would only ever see the last step."""
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


def test_samples_do_not_see_each_other() -> None:
    q, k, k_perm = noise(64)
    tokens = (np.stack([4 * q[0], 16 * q[0]]), np.stack([k[0], 3 * k[0]]), np.stack([k_perm[0], k_perm[0]]))
    inputs = per_sample(0.02)
    both = guard("fused")(q=tokens[0], k=tokens[1], k_perm=tokens[2], **inputs)
    for i in range(2):
        alone = guard("fused")(
            q=tokens[0][i : i + 1],
            k=tokens[1][i : i + 1],
            k_perm=tokens[2][i : i + 1],
            **{name: value[i : i + 1] for name, value in inputs.items()},
        )
        np.testing.assert_allclose([alone[0][0], alone[1][0]], [both[0][i], both[1][i]], rtol=1e-5)


@pytest.mark.parametrize("form", ["literal", "fused"])
def test_nothing_is_mixed_without_amplitude_or_gate(form: Guard) -> None:
    q, k, k_perm = noise(64)
    inputs = per_sample(0.05) | {"amplitude": np.array([0, 1], np.float32)}
    inputs["key_gate"] = np.array([1, 0], np.float32)
    alpha, value_share = guard(form)(q=q, k=k, k_perm=k_perm, **inputs)
    assert alpha.tolist() == [0, 0]
    assert value_share[0] == 0
    assert value_share[1] > 0.1


@pytest.mark.parametrize("form", ["literal", "fused"])
def test_equal_keys_give_finite_results(form: Guard) -> None:
    q, k, _ = noise(64)
    same = np.broadcast_to(k[:, :1], k.shape).copy()
    alpha, value_share = guard(form)(q=q, k=same, k_perm=same, **per_sample(0.05))
    assert np.isfinite([alpha, value_share]).all()


def test_rows_too_peaked_to_read_stay_within_their_cap() -> None:
    q, k, k_perm = noise(64)
    alpha, value_share = guard("fused")(q=300 * q, k=k, k_perm=k_perm, **per_sample(0.05))
    assert np.isfinite([alpha, value_share]).all()
    assert (alpha >= 0).all()
    assert (alpha <= 0.3 * value_share / np.array([0.6, 0.5])).all()


def rounded(tokens: Tokens, dtype: type) -> list[np.ndarray]:
    return [array.astype(dtype) for array in tokens]


@pytest.mark.parametrize("case", ["flat", "usual", "peaked", "one-hot rows", "equal rows", "needles"])
def test_float16_inputs(case: str) -> None:
    """float32 statistics on a float16 model: the step of its own rounded tensors."""
    narrow = rounded(CASES[case](noise(128)), np.float16)
    wide = tuple(array.astype(np.float32) for array in narrow)
    parameters = SwsParameters()
    for kappa in (0.09, 0.02, 0.003):
        expected, _ = steps(guard("literal"), wide, kappa, parameters)  # type: ignore[arg-type]
        found, _ = steps(guard("fused", dtype=FLOAT16), tuple(narrow), kappa, parameters)  # type: ignore[arg-type]
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("case", ["flat", "usual", "peaked", "one-hot rows"])
def test_float16_statistics(case: str) -> None:
    """For TensorRT-RTX: within three of 128 steps at the budgets that the defaults give to mixed keys."""
    narrow = rounded(CASES[case](noise(128)), np.float16)
    wide = tuple(array.astype(np.float32) for array in narrow)
    parameters = SwsParameters()
    call = guard("fused", dtype=FLOAT16, statistics=FLOAT16)
    for kappa in (0.09, 0.06, 0.043):
        expected, share = steps(guard("literal"), wide, kappa, parameters)  # type: ignore[arg-type]
        found, found_share = steps(call, tuple(narrow), kappa, parameters)  # type: ignore[arg-type]
        assert np.abs(found - expected).max() <= 3
        assert np.abs(found_share - share).max() < 0.01


def test_float16_statistics_are_attention_in_float16() -> None:
    call = guard("fused", dtype=FLOAT16, statistics=FLOAT16)
    casts = [node for node in call.model.graph if node.op_type == "Cast"]
    assert any(node.attributes["to"].value == FLOAT16 for node in casts)
    assert sum(node.op_type == "Attention" for node in call.model.graph) == 5


def test_fused_guard_stores_no_logits() -> None:
    kinds = [node.op_type for node in guard("fused").model.graph]
    assert kinds.count("Attention") == 4
    assert not {"Softmax", "LogSoftmax"} & set(kinds)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1024, 4096, 16384])
def test_same_step_at_real_sizes(count: int) -> None:
    parameters = SwsParameters(bisection_steps=7)
    for factor, kappa in ((2.0, 0.05), (4.0, 0.003)):
        q, k, k_perm = noise(count, width=8)
        tokens = (np.float32(factor) * q[:1], k[:1], k_perm[:1])
        inputs = {name: value[:1] for name, value in per_sample(kappa).items()}
        found = [
            guard(form, parameters, heads=1, size=8)(q=tokens[0], k=tokens[1], k_perm=tokens[2], **inputs)
            for form in ("literal", "fused")
        ]
        (alpha, share), (fused_alpha, fused_share) = found
        np.testing.assert_allclose(fused_share, share, rtol=1e-4)
        limit = parameters.key_cap * share / inputs["value_gain"]
        assert np.rint(fused_alpha / limit * 128) == np.rint(alpha / limit * 128)


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
        build_functions(parameters, FLOAT, "fused")
    assert build_functions(parameters, FLOAT, "literal")
