"""The guard's kernel bodies, every launch and block, on the CPU, against the literal bisection in float64."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.plugins.cases import FORMATS, Harness, read_tensor
from tests.plugins.key_guard.reference import GuardCase, amplitude_of, bisection_step, logits_of, value_mix

# The kernels by name: (warps with different rows, shared-memory stages); without stages the scalar kernels.
PATHS = {
    "scalar": (4, 0),
    "tensor core, one stage": (4, 1),
    "tensor core, two stages": (4, 2),
    "tensor core, shared rows": (2, 2),
}
TENSOR_CORE = PATHS["tensor core, two stages"]

MIDDLE, CANDIDATE, SEARCH, DONE = range(4)  # SearchMode in plugins/key_guard/search.h

# Error bound of a measured mean KL, see plugins/key_guard/README.md.
KL_BOUND = 2e-6


@dataclasses.dataclass
class Result:
    alpha_k: torch.Tensor
    a_v: torch.Tensor
    states: torch.Tensor  # rows (round, sample, mode, below, above)

    def final_step(self, sample: int) -> int:
        return int(self.states[self.states[:, 1] == sample][-1][3])

    def modes(self, sample: int) -> list[int]:
        """What each round after the survey measured."""
        modes: list[int] = self.states[self.states[:, 1] == sample][:, 2].tolist()
        return modes

    def rounds_measured(self, sample: int) -> int:
        return sum(mode != DONE for mode in self.modes(sample))


def make_case(
    *,
    batch: int = 2,
    tokens: int = 100,
    heads: int = 2,
    head_size: int = 40,
    dtype: torch.dtype = torch.float16,
    sharpness: float = 1.0,
    kappa: float = 0.05,
    seed: int = 0,
    **overrides: object,
) -> GuardCase:
    """Random keys, keys moved towards their neighbours' mean, and queries scaled by `sharpness`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, heads * head_size)
    k = torch.randn(shape, generator=generator)
    kp = (k.roll(1, 1) + k.roll(-1, 1) + k.roll(3, 1)) / 3
    # Rows of different sharpness, so that entropies differ and hu is not degenerate.
    q = torch.randn(shape, generator=generator) * torch.linspace(0.2, 1.5, tokens).view(1, -1, 1) * sharpness
    ones = torch.ones(batch)
    case = GuardCase(
        q=q.to(dtype),
        k=k.to(dtype),
        kp=kp.to(dtype),
        heads=heads,
        amplitude=torch.linspace(0.4, 0.9, batch),
        kappa=kappa * ones,
        tau_q=torch.linspace(1.0, 1.5, batch),
        key_gate=ones,
        value_gain=0.5 * ones,
    )
    return dataclasses.replace(case, **overrides)  # type: ignore[arg-type]


def run_guard(
    harness: Harness,
    case: GuardCase,
    *,
    path: tuple[int, int],
    blocks: int = 3,
    disturbance: float = 0.0,
    reversed_threads: bool = False,
) -> Result:
    batch, query_tokens, channels = case.q.shape
    folder = harness.run(
        {
            "operator": "key_guard",
            "format": str(case.q.dtype).removeprefix("torch."),
            "batch": batch,
            "query_tokens": query_tokens,
            "tokens": case.k.shape[1],
            "heads": case.heads,
            "head_size": channels // case.heads,
            "scale": repr(case.scale),
            "key_cap": case.key_cap,
            "bisection_steps": case.bisection_steps,
            "row_warps": path[0],
            "stages": path[1],
            "blocks": blocks,
            "disturbance": disturbance,
            "reversed": int(reversed_threads),
        },
        {
            name: getattr(case, name)
            for name in ("q", "k", "kp", "tau_q", "amplitude", "kappa", "key_gate", "value_gain")
        },
    )
    return Result(
        read_tensor(folder / "alpha_k.bin", torch.float32),
        read_tensor(folder / "a_v.bin", torch.float32),
        read_tensor(folder / "states.bin", torch.int32).view(-1, 5),
    )


def check_against_literal(case: GuardCase, result: Result) -> None:
    """The same step as the bisection, unless the budget lies within the error bound of a measured KL."""
    for sample in range(case.q.shape[0]):
        logits = logits_of(case, sample)
        cap = case.key_cap * amplitude_of(case, sample, logits)
        step, budget = result.final_step(sample), float(case.kappa[sample])
        points = 2**case.bisection_steps
        if step != bisection_step(case, sample):
            assert logits.kl(cap * step / points) <= budget + KL_BOUND
            assert step == points - 1 or logits.kl(cap * (step + 1) / points) >= budget - KL_BOUND
        # a inherits the float rounding of the entropies, nothing else may move alpha.
        a_error = 2e-5 * amplitude_of(case, sample, logits)
        assert float(result.alpha_k[sample]) == pytest.approx(
            cap * step / points, abs=case.key_cap * a_error, rel=0
        )
        assert float(result.a_v[sample]) == pytest.approx(value_mix(case, sample), abs=a_error, rel=0)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(
    path=st.sampled_from(sorted(PATHS)),
    kappa=st.floats(-5, -1).map(lambda exponent: 10**exponent),
    sharpness=st.floats(0.5, 3.0),
)
def test_lands_on_the_step_of_the_literal_bisection(
    harness: Harness, path: str, kappa: float, sharpness: float
) -> None:
    case = make_case(kappa=kappa, sharpness=sharpness)

    result = run_guard(harness, case, path=PATHS[path])

    check_against_literal(case, result)


# T smaller than any tile, one row tile, ragged, many key tiles; head sizes of SD1.5, SDXL and awkward ones.
@pytest.mark.parametrize(
    ("tokens", "heads", "head_size", "name", "path"),
    [
        (2, 1, 8, "float16", "tensor core, two stages"),
        (64, 2, 160, "float16", "tensor core, one stage"),
        (129, 1, 64, "bfloat16", "tensor core, two stages"),
        (97, 1, 8, "float16", "tensor core, shared rows"),
        (130, 2, 80, "bfloat16", "tensor core, shared rows"),
        (200, 3, 80, "bfloat16", "tensor core, two stages"),
        (33, 2, 41, "float16", "scalar"),
        (70, 1, 5, "bfloat16", "scalar"),
        (129, 2, 40, "float32", "scalar"),
    ],
)
def test_shapes_and_formats(
    harness: Harness, tokens: int, heads: int, head_size: int, name: str, path: str
) -> None:
    case = make_case(
        tokens=tokens, heads=heads, head_size=head_size, dtype=FORMATS[name], kappa=5e-4, sharpness=2
    )

    result = run_guard(harness, case, path=PATHS[path])

    check_against_literal(case, result)


@pytest.mark.parametrize("path", PATHS)
def test_a_sample_of_the_query_rows(harness: Harness, path: str) -> None:
    case = make_case(tokens=150, kappa=1e-3, sharpness=2)
    case.q = case.q[:, ::8]

    result = run_guard(harness, case, path=PATHS[path])

    check_against_literal(case, result)


@settings(max_examples=10, derandomize=True, deadline=None)
@given(path=st.sampled_from(sorted(PATHS)), tokens=st.integers(2, 149))
@example(path="tensor core, two stages", tokens=77)
def test_more_queries_than_keys(harness: Harness, path: str, tokens: int) -> None:
    """Cross-attention: the keys are of a text, and shorter than the image."""
    case = make_case(tokens=150, kappa=1e-3, sharpness=2)
    case.k, case.kp = case.k[:, :tokens], case.kp[:, :tokens]

    result = run_guard(harness, case, path=PATHS[path])

    check_against_literal(case, result)


def test_a_wide_budget_needs_the_survey_alone(harness: Harness) -> None:
    case = make_case(kappa=1.0)

    result = run_guard(harness, case, path=TENSOR_CORE)

    assert [result.rounds_measured(sample) for sample in range(2)] == [0, 0]
    assert [result.final_step(sample) for sample in range(2)] == [127, 127]


@pytest.mark.parametrize("path", PATHS)
def test_a_binding_budget_needs_the_middle_and_the_candidate_round(harness: Harness, path: str) -> None:
    case = make_case(kappa=1e-3, sharpness=2)

    result = run_guard(harness, case, path=PATHS[path])

    for sample in range(2):
        assert result.modes(sample)[:3] == [MIDDLE, CANDIDATE, DONE]
    assert all(0 < result.final_step(sample) < 127 for sample in range(2))
    check_against_literal(case, result)


@pytest.mark.parametrize("path", ["scalar", "tensor core, two stages"])
@pytest.mark.parametrize("disturbance", [-0.05, 0.05])
def test_a_wrong_polynomial_costs_rounds_but_not_the_answer(
    harness: Harness, path: str, disturbance: float
) -> None:
    case = make_case(kappa=1e-3, sharpness=2)

    result = run_guard(harness, case, path=PATHS[path], disturbance=disturbance)

    assert max(result.rounds_measured(sample) for sample in range(2)) > 2
    check_against_literal(case, result)


def one_hot_case(dtype: torch.dtype, size: float) -> GuardCase:
    """Each query attends to one key, by a logit of `size`; kp holds the keys in another order."""
    tokens, head_size = 48, 48
    k = torch.eye(tokens)[:, :head_size].unsqueeze(0)
    case = make_case(batch=1, tokens=tokens, heads=1, head_size=head_size)
    q = k * size / case.scale
    q[:, ::3] *= 2 / size  # some flat rows, so that hu is not 0
    return dataclasses.replace(case, q=q.to(dtype), k=k.to(dtype), kp=k.roll(7, 1).to(dtype))


@settings(max_examples=12, derandomize=True, deadline=None)
@given(path=st.sampled_from(sorted(PATHS)), size=st.floats(20.0, 300.0), kappa=st.floats(0.01, 0.09))
def test_one_hot_attention(harness: Harness, path: str, size: float, kappa: float) -> None:
    case = dataclasses.replace(one_hot_case(torch.float16, size), kappa=torch.tensor([kappa]))

    result = run_guard(harness, case, path=PATHS[path])

    check_against_literal(case, result)


@pytest.mark.parametrize("path", ["scalar", "tensor core, two stages"])
@pytest.mark.parametrize("size", [700.0, 3000.0])
def test_logits_beyond_the_survey_are_searched(harness: Harness, path: str, size: float) -> None:
    """Peaks so far apart that the survey's sums underflow: the search takes over."""
    case = one_hot_case(torch.float16, size)
    case = dataclasses.replace(case, amplitude=torch.tensor([1.0]), kappa=torch.tensor([5.0]))

    result = run_guard(harness, case, path=PATHS[path])

    assert result.modes(0)[0] == SEARCH
    check_against_literal(case, result)


@pytest.mark.parametrize("path", ["scalar", "tensor core, one stage"])
def test_alphas_up_to_one(harness: Harness, path: str) -> None:
    case = make_case(
        key_cap=1.0, kappa=0.02, sharpness=2, amplitude=torch.tensor([1.0, 0.8]), bisection_steps=10
    )

    result = run_guard(harness, case, path=PATHS[path])

    check_against_literal(case, result)


@pytest.mark.parametrize("steps", [1, 4, 12])
def test_other_numbers_of_bisection_steps(harness: Harness, steps: int) -> None:
    case = make_case(batch=1, tokens=40, kappa=4e-4, sharpness=2, bisection_steps=steps)

    check_against_literal(case, run_guard(harness, case, path=TENSOR_CORE))


def test_alpha_has_the_bits_of_the_float32_bisection(harness: Harness) -> None:
    case = make_case(batch=1, kappa=1e-3, sharpness=2)

    result = run_guard(harness, case, path=TENSOR_CORE)

    # a_v = value_gain * a with a gain of 1/2 gives back a exactly, hence the very cap.
    low, high = torch.tensor(0.0), torch.tensor(0.3) * (2 * result.a_v[0])
    for bit in reversed(range(7)):
        middle = (low + high) / 2
        if result.final_step(0) >> bit & 1:
            low = middle
        else:
            high = middle
    assert result.alpha_k[0] == low


def test_gates_and_zero_amplitude(harness: Harness) -> None:
    case = make_case(batch=3, kappa=0.01)
    case.amplitude = torch.tensor([0.5, 0.0, 0.5])
    case.key_gate = torch.tensor([0.0, 1.0, 1.0])

    result = run_guard(harness, case, path=TENSOR_CORE)

    assert result.alpha_k[:2].tolist() == [0, 0]
    assert result.a_v[1] == 0
    assert result.alpha_k[2] > 0
    assert result.a_v[0] == pytest.approx(value_mix(case, 0), rel=2e-5)


@pytest.mark.parametrize("path", PATHS)
def test_members_of_a_batch_do_not_meet(harness: Harness, path: str) -> None:
    case = make_case(batch=3, kappa=1e-3, sharpness=2)
    together = run_guard(harness, case, path=PATHS[path])

    def alone(sample: int) -> GuardCase:
        part: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor[sample : sample + 1]  # noqa: E731
        changed = {
            field.name: part(value)
            for field in dataclasses.fields(case)
            if isinstance(value := getattr(case, field.name), torch.Tensor)
        }
        return dataclasses.replace(case, **changed)

    for sample in range(3):
        result = run_guard(harness, alone(sample), path=PATHS[path])
        assert result.alpha_k[0] == together.alpha_k[sample]
        assert result.a_v[0] == together.a_v[sample]


@pytest.mark.parametrize("path", PATHS)
def test_the_order_of_threads_and_the_grid_do_not_matter(harness: Harness, path: str) -> None:
    case = make_case(kappa=1e-3, sharpness=2)

    once = run_guard(harness, case, path=PATHS[path])
    again = run_guard(harness, case, path=PATHS[path], blocks=1, reversed_threads=True)

    assert torch.equal(once.alpha_k, again.alpha_k)
    assert torch.equal(once.a_v, again.a_v)


@pytest.mark.parametrize("path", ["scalar", "tensor core, two stages"])
def test_non_finite_keys_mix_nothing(harness: Harness, path: str) -> None:
    case = make_case(batch=2)
    case.k[1, 5, 3] = torch.inf

    result = run_guard(harness, case, path=PATHS[path])

    assert result.alpha_k[1] == 0
    assert result.a_v[1] == 0
    assert result.alpha_k[0] > 0


@pytest.mark.parametrize(
    "path",
    [
        "tensor core, two stages",
        "tensor core, shared rows",
        pytest.param("tensor core, one stage", marks=pytest.mark.slow),
        pytest.param("scalar", marks=pytest.mark.slow),
    ],
)
def test_sanitizers_find_nothing(sanitized_harness: Harness, path: str) -> None:
    case = make_case(tokens=70, kappa=1e-3, sharpness=2)

    result = run_guard(sanitized_harness, case, path=PATHS[path], disturbance=0.05)

    assert torch.isfinite(result.alpha_k).all()
