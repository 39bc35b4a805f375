"""The functions of `comfyui-node` in ONNX Runtime against the eager reference in float64."""

from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graph_passes.functions import build_comfyui_node_functions
from graph_passes.parameters import SwsParameters
from sws_export.reference import comfyui_node_patch, comfyui_node_schedule, fresh_transport, moving_average
from sws_export.reference.comfyui_node_guard import attention_weights
from sws_export.reference.orthonormal_basis import orthonormal_basis
from tests.graph_passes.functions.calls import FLOAT, Array, Call

DEFAULT = SwsParameters()
HEADS = 2
SIGMAS = (99.0, 25.0, 14.0, 8.0, 3.0, 0.7, 0.29, 0.28, 1e-3)
ONE = {name: [1] for name in ("u", "mix", "tau", "amplitude", "kappa", "key_gate", "value_gain")}
SQUARE = [1, "tokens", "tokens"]


@cache
def call(name: str, parameters: SwsParameters = DEFAULT) -> Call:
    shapes: dict[str, Any] = {
        "text": ["batch", "tokens", "text_width"],
        "basis": ["text_width", "width"],
        "keys": ["batch", "tokens", "width"],
        "hidden": ["batch", "queries", "width"],
        "q": ["batch", "queries", "inner"],
        "k": ["batch", "tokens", "inner"],
        "v": ["batch", "tokens", "inner"],
        **dict.fromkeys(("previous", "fresh"), SQUARE),
        **ONE,
    }
    attributes: dict[str, int | float] = {
        "ComfyUINodeGuard": {"scale": 6**-0.5},
        "ComfyUINodeAttention": {"scale": 4**-0.5, "guard_scale": 6**-0.5, "num_heads": HEADS},
    }.get(name, {})
    return Call(build_comfyui_node_functions(parameters, FLOAT), name, shapes, FLOAT, attributes)


def numbers(value: float) -> Array:
    return np.array([value], np.float32)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_schedule(sigma: float) -> None:
    u, tau, amplitude, kappa, key_gate, value_gain = call("ComfyUINodeSchedule")(
        sigma=np.array([sigma, 1.0], np.float32), intensity=np.array([0.7, 0.1], np.float32)
    )
    expected = comfyui_node_schedule(torch.tensor([sigma], dtype=torch.float64), SwsParameters())
    for found, value in (
        (u, expected.u),
        (tau, expected.tau),
        (amplitude, 0.7 * expected.w),
        (kappa, expected.kappa),
        (key_gate, (expected.u < 0.75).double()),
        (value_gain, 0.6 * expected.g),
    ):
        np.testing.assert_allclose(found, value.numpy(), rtol=1e-5, atol=1e-6)
    if sigma in (99.0, 25.0, 0.28, 1e-3):
        assert amplitude == 0


@settings(max_examples=15, derandomize=True, deadline=None)
@given(tokens=st.integers(1, 100), u=st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
# Square grids, one row, the largest text.
@example(tokens=64, u=0.0)
@example(tokens=72, u=0.4)
@example(tokens=77, u=0.0)
@example(tokens=256, u=0.0)
def test_transport(tokens: int, u: float) -> None:
    (found,) = call("ComfyUINodeTransport")(text=np.zeros((2, tokens, 3), np.float32), u=numbers(u))
    expected = fresh_transport(tokens, torch.tensor([u], dtype=torch.float64), SwsParameters())
    assert found.shape == (1, tokens, tokens)
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=1e-5, atol=1e-9)


def test_parameters_of_the_transport() -> None:
    parameters = SwsParameters(tau=0.7, sinkhorn_iters=1)
    (found,) = call("ComfyUINodeTransport", parameters)(text=np.zeros((1, 9, 3), np.float32), u=numbers(0.5))
    expected = fresh_transport(9, torch.tensor([0.5], dtype=torch.float64), parameters)
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("parameters", [SwsParameters(), SwsParameters(beta=0.5, rebalance_iters=3)])
def test_momentum(parameters: SwsParameters) -> None:
    random = np.random.default_rng(0)
    previous, fresh = random.random((2, 1, 9, 9), dtype=np.float32)
    momentum, none = call("ComfyUINodeMomentum", parameters), np.zeros_like(previous)
    (found,) = momentum(previous=previous, fresh=fresh, mix=numbers(1e-9))
    pair = (torch.from_numpy(values[0]).double() for values in (previous, fresh))
    expected = moving_average(*pair, parameters)
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(momentum(previous=none, fresh=fresh, mix=numbers(0.1))[0], fresh)
    np.testing.assert_array_equal(momentum(previous=previous, fresh=fresh, mix=numbers(0.0))[0], previous)
    np.testing.assert_array_equal(momentum(previous=none, fresh=fresh, mix=numbers(0.0))[0], none)


CAPS = [(0.01, 0.08), (1e-5, 0.0), (1e-6, 0.0), (0.0, 0.0)]
WIDTHS = [(6, 6), (6, 9), (9, 6)]


def case(width: int, text_width: int, batch: int, tokens: int) -> tuple[Array, Array]:
    """Hidden states and text whose rows differ in entropy."""
    random = np.random.default_rng(3)
    hidden = random.standard_normal((batch, 20, width)) * np.linspace(0.2, 3.0, batch * 20).reshape(
        batch, 20, 1
    )
    return hidden.astype(np.float32), random.standard_normal((batch, tokens, text_width)).astype(np.float32)


def keys_of(text: Array, width: int) -> Array:
    text_width = text.shape[-1]
    if width == text_width:
        return text
    basis = orthonormal_basis(max(width, text_width), min(width, text_width)).numpy()
    (keys,) = call("ComfyUINodeKeys")(text=text, basis=basis if text_width > width else basis.T.copy())
    return keys


def scalars(sigma: float, intensity: float, parameters: SwsParameters) -> dict[str, Array]:
    names = ("u", "tau", "amplitude", "kappa", "key_gate", "value_gain")
    values = call("ComfyUINodeSchedule", parameters)(sigma=numbers(sigma), intensity=numbers(intensity))
    found = dict(zip(names, values, strict=True))
    del found["u"]
    return found


def reference(
    hidden: Array, text: Array, previous: Array, sigma: float, intensity: float, parameters: SwsParameters
) -> Any:
    q, k, kept = (torch.from_numpy(x).double() for x in (hidden, text, previous[0]))
    now = comfyui_node_schedule(torch.tensor([sigma], dtype=torch.float64), parameters)
    fresh = fresh_transport(text.shape[1], now.u, parameters)
    strength = torch.tensor([intensity], dtype=torch.float64)
    return fresh, comfyui_node_patch(q, k, k, kept, fresh, now, strength, parameters)


@settings(max_examples=24, derandomize=True, deadline=None)
@given(
    # The smaller of the widths is 6, for which the scale of the logits is.
    widths=st.integers(6, 9).flatmap(lambda wide: st.sampled_from([(6, wide), (wide, 6)])),
    sigma=st.floats(0.4, 10.0),
    caps=st.sampled_from(CAPS),
    batch=st.integers(1, 3),
    tokens=st.integers(3, 8),
)
def test_guard(
    widths: tuple[int, int], sigma: float, caps: tuple[float, float], batch: int, tokens: int
) -> None:
    parameters = SwsParameters(kl_floor=caps[0], kl_slope=caps[1])
    hidden, text = case(*widths, batch, tokens)
    previous = np.random.default_rng(1).random((1, tokens, tokens), dtype=np.float32)
    fresh, expected = reference(hidden, text, previous, sigma, 0.9, parameters)
    transport, alpha_k, a_v = call("ComfyUINodeGuard", parameters)(
        hidden=hidden,
        keys=keys_of(text, widths[0]),
        previous=previous,
        fresh=fresh.numpy().astype(np.float32)[None],
        **scalars(sigma, 0.9, parameters),
    )
    assert expected.amplitude > 0
    np.testing.assert_allclose(transport[0], expected.transport.numpy(), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(a_v, expected.a_v.numpy(), rtol=2e-5)
    np.testing.assert_allclose(alpha_k, expected.alpha_k.numpy(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("budget", [5.0, 8.0, 10.0])
def test_weights_below_the_floor(budget: float) -> None:
    """Swapped tokens change weights from 1e-20 to 1; the floor of 1e-8 bounds their KL divergence."""
    parameters = SwsParameters(kl_floor=budget, kl_slope=0.0, key_cap=4.5)
    hidden, text = case(6, 6, 2, 7)
    hidden *= 15
    fresh = np.eye(7, dtype=np.float32)[None, [1, 0, 3, 2, 5, 4, 6]]
    q, k, transport = (torch.from_numpy(x).double() for x in (hidden, text, fresh[0]))
    now = comfyui_node_schedule(torch.tensor([3.0], dtype=torch.float64), parameters)
    none, one = torch.zeros_like(transport), torch.ones(1, dtype=torch.float64)
    expected = comfyui_node_patch(q, k, k, none, transport, now, one, parameters)
    _, alpha_k, _ = call("ComfyUINodeGuard", parameters)(
        hidden=hidden,
        keys=text,
        previous=np.zeros_like(fresh),
        fresh=fresh,
        **scalars(3.0, 1.0, parameters),
    )
    np.testing.assert_allclose(alpha_k, expected.alpha_k.numpy(), rtol=1e-4)
    # Without the floor, this share would be over the budget.
    plain = attention_weights(expected.q, k / now.tau.sqrt())
    weights = attention_weights(expected.q, expected.k)
    assert float((weights * (weights / plain).log()).sum(dim=-1).mean()) > 1.02 * budget


@cache
def free_share(caps: tuple[float, float]) -> float:
    parameters = SwsParameters(kl_floor=caps[0], kl_slope=caps[1])
    previous = np.random.default_rng(1).random((1, 7, 7), dtype=np.float32)
    _, found = reference(*case(6, 6, 1, 7), previous, 1.5, 0.9, parameters)
    return float(found.alpha_k / (0.3 * found.amplitude * 127 / 128))


def test_some_budgets_bind() -> None:
    free, tight, tighter, none = (free_share(caps) for caps in CAPS)
    assert free > 0.999
    assert 0.002 < tighter < tight < 0.999
    assert none == 0


@pytest.mark.parametrize("intensity", [0.0, 0.9])
@pytest.mark.parametrize("widths", WIDTHS)
def test_mixing_commutes_with_the_projections(widths: tuple[int, int], intensity: float) -> None:
    hidden, text = case(*widths, 2, 7)
    random = np.random.default_rng(5)
    to_q = random.standard_normal((widths[0], 8)).astype(np.float32)
    to_k, to_v = random.standard_normal((2, widths[1], 8)).astype(np.float32)
    previous = np.random.default_rng(1).random((1, 7, 7), dtype=np.float32)
    fresh, expected = reference(hidden, text, previous, 2.0, intensity, SwsParameters())
    y, transport = call("ComfyUINodeAttention")(
        q=hidden @ to_q,
        k=text @ to_k,
        v=text @ to_v,
        hidden=hidden,
        keys=keys_of(text, widths[0]),
        previous=previous,
        fresh=fresh.numpy().astype(np.float32)[None],
        **scalars(2.0, intensity, SwsParameters()),
    )
    q, k, v = (
        (x @ torch.from_numpy(weight).double()).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for x, weight in ((expected.q, to_q), (expected.k, to_k), (expected.v, to_v))
    )
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    np.testing.assert_allclose(y, out.numpy(), atol=2e-5)
    np.testing.assert_allclose(transport[0], expected.transport.numpy(), rtol=1e-5, atol=1e-8)


def test_the_guard_of_float16_is_float32() -> None:
    hidden, text = case(6, 6, 2, 7)
    hidden, text = hidden.astype(np.float16), text.astype(np.float16)
    previous = np.random.default_rng(1).random((1, 7, 7), dtype=np.float32)
    fresh, expected = reference(
        hidden.astype(np.float32), text.astype(np.float32), previous, 2.0, 0.9, SwsParameters()
    )
    functions = build_comfyui_node_functions(SwsParameters(), ir.DataType.FLOAT16)
    assert {value.dtype for value in functions["ComfyUINodeGuard"].inputs[1:]} == {FLOAT}
    guard = Call(
        functions,
        "ComfyUINodeGuard",
        {
            "hidden": ["batch", "queries", 6],
            "keys": ["batch", "tokens", 6],
            "previous": SQUARE,
            "fresh": SQUARE,
        }
        | ONE,
        FLOAT,
        {"scale": 6**-0.5},
    )
    _, alpha_k, a_v = guard(
        hidden=hidden,
        keys=text.astype(np.float32),
        previous=previous,
        fresh=fresh.numpy().astype(np.float32)[None],
        **scalars(2.0, 0.9, SwsParameters()),
    )
    np.testing.assert_allclose(a_v, expected.a_v.numpy(), rtol=2e-5)
    np.testing.assert_allclose(alpha_k, expected.alpha_k.numpy(), rtol=2e-5)
