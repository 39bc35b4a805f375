"""What the graphs of the trained example compute, against the reference, the plain UNet and themselves."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from graph_passes.parameters import SwsParameters
from tests.acceptance.conftest import TIGHT, Run, inputs_of_steps
from tests.export_runs import Session, difference, open_session

ReferenceRun = Callable[[SwsParameters], Run]
STATES = {"sws_state_d2", "sws_state_d4"}


def compare(session: Session, run: Run, out_limit: float, state_limit: float) -> None:
    for (out, state), (expected_out, expected_state) in zip(
        session.run(run.steps), run.expected, strict=True
    ):
        assert difference(out, expected_out) <= out_limit
        assert state.keys() == expected_state.keys() == STATES
        for name, expected in expected_state.items():
            assert difference(state[name], expected) <= state_limit, name


def test_float32_equals_the_reference_over_five_steps(graph: Path, reference_run: ReferenceRun) -> None:
    compare(open_session(graph, optimized=True), reference_run(SwsParameters()), 2e-4, 1e-5)


def test_a_tight_cap_equals_the_reference(tight_graph: Path, reference_run: ReferenceRun) -> None:
    compare(open_session(tight_graph), reference_run(TIGHT), 5e-4, 1e-5)


def test_the_tight_cap_binds_at_every_site(reference_run: ReferenceRun) -> None:
    run, found = reference_run(TIGHT), []
    for inputs, records in zip(run.steps, run.records, strict=True):
        for record in records.values():
            mixing = inputs["sigma"] > 2.0
            free = TIGHT.key_cap * record.amplitude.numpy() * (1 - 2.0**-TIGHT.bisection_steps)
            found += list(record.alpha_k.numpy()[mixing] / free[mixing])
    assert len(found) >= 35
    assert max(found) < 0.99
    # Not the trivial cap that allows nothing at all.
    assert np.median(found) > 0.02


def test_the_example_has_peaked_attention(reference_run: ReferenceRun) -> None:
    """Random weights attend evenly to all tokens: an entropy of log T. Trained ones do not."""
    shares = [
        record.entropy_min.min().item() / np.log(tokens)
        for records in reference_run(SwsParameters()).records
        for name, record in records.items()
        for tokens in [48 if name.startswith(("down_blocks.1", "up_blocks.1")) else 12]
    ]
    assert min(shares) < 0.3


def test_float16_equals_the_reference(half_graph: Path, reference_run: ReferenceRun) -> None:
    compare(open_session(half_graph), reference_run(SwsParameters()), 5e-3, 1e-5)


def test_intensity_0_is_the_plain_unet(graph: Path, plain: Session) -> None:
    steps = [inputs | {"intensity": np.zeros(2)} for inputs in inputs_of_steps()]
    for inputs, (out, _) in zip(steps, open_session(graph).run(steps), strict=True):
        expected, _ = plain.step(inputs, {})
        assert difference(out, expected) <= 1e-5


def test_intensity_1_is_not(graph: Path, plain: Session) -> None:
    steps = [inputs | {"intensity": np.ones(2)} for inputs in inputs_of_steps()]
    apart = [
        difference(out, plain.step(inputs, {})[0])
        for inputs, (out, _) in zip(steps, open_session(graph).run(steps), strict=True)
    ]
    assert max(apart) > 1e-3


def test_a_batch_of_two_is_two_single_runs(graph: Path) -> None:
    steps, session = inputs_of_steps(), open_session(graph)
    together = list(session.run(steps))
    for member in range(2):
        alone = [{name: values[member : member + 1] for name, values in inputs.items()} for inputs in steps]
        for (out, state), (out_alone, state_alone) in zip(together, session.run(alone), strict=True):
            assert difference(out[member], out_alone[0]) <= 1e-5
            for name in STATES:
                assert difference(state[name][member], state_alone[name][0]) <= 1e-5


def test_the_state_carries_over(graph: Path) -> None:
    steps, session = inputs_of_steps(), open_session(graph)
    (_, state), (fed_back, _) = list(session.run(steps))[:2]
    forgotten, _ = session.step(steps[1], session.zero_state(steps[1]))
    assert difference(forgotten, fed_back) > 1e-6
    for values in state.values():
        np.testing.assert_allclose(values.sum(axis=1), 1.0, atol=0.2)


@pytest.mark.parametrize(("batch", "height", "width", "tokens"), [(1, 4, 4, 1), (3, 8, 20, 3)])
def test_sizes_are_dynamic(graph: Path, batch: int, height: int, width: int, tokens: int) -> None:
    steps = inputs_of_steps(batch, height, width, tokens)
    for out, state in open_session(graph).run(steps[:2]):
        assert out.shape == (batch, 3, height, width)
        assert np.isfinite(out).all()
        assert state["sws_state_d4"].shape == (batch, 145, height // 4, width // 4)


@pytest.mark.parametrize("intensity", [0.0, 1.0])
@pytest.mark.parametrize("sigma", [1e-4, 1e4])
@pytest.mark.parametrize("precision", ["graph", "half_graph"])
def test_extremes_stay_finite(
    request: pytest.FixtureRequest, precision: str, sigma: float, intensity: float
) -> None:
    extreme = {"sigma": np.full(2, sigma), "intensity": np.full(2, intensity)}
    steps = [inputs | extreme for inputs in inputs_of_steps()[:3]]
    for out, state in open_session(request.getfixturevalue(precision)).run(steps):
        assert np.isfinite(out).all()
        assert all(np.isfinite(values).all() for values in state.values())
