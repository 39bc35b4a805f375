"""The sampling run on which implementations are compared."""

import itertools

import numpy as np
import pytest

from sws_export.tensors import TensorSpec
from sws_export.validation.trajectory import Trajectory, TrajectoryStep, timestep_of

INPUTS = (
    TensorSpec("sample", "float16", ("batch", 9, "height", "width")),
    TensorSpec("timestep", "float32", ("batch",)),
    TensorSpec("encoder_hidden_states", "float16", ("batch", "tokens", 16)),
    TensorSpec("class_labels", "int64", ("batch",)),
    TensorSpec("time_ids", "float16", ("batch", 6)),
)
SIZES = {"batch": 2, "height": 8, "width": 6, "tokens": 5}


def test_samples_of_the_batch_differ_in_every_input() -> None:
    run = Trajectory(INPUTS, SIZES, 5)
    steps = list(run.steps())
    assert len(steps) == 5
    inputs = run.inputs(steps[0])
    assert inputs.keys() == {spec.name for spec in INPUTS}
    assert inputs["sample"].shape == (2, 9, 8, 6)
    for values in (steps[0].sigma, run.intensity, inputs["sample"], inputs["encoder_hidden_states"]):
        assert not np.array_equal(values[0], values[1])
    assert inputs["class_labels"].dtype == np.int64
    assert all(np.array_equal(row, [64, 48, 0, 0, 64, 48]) for row in inputs["time_ids"])


def test_noise_levels_decrease_and_steps_are_contiguous() -> None:
    steps = list(Trajectory(INPUTS, SIZES, 5).steps())
    for step, following in itertools.pairwise(steps):
        assert (step.next_sigma < step.sigma).all()
        np.testing.assert_array_equal(step.next_sigma, following.sigma)


def test_the_same_seed_gives_the_same_inputs() -> None:
    first, second, other = (Trajectory(INPUTS, SIZES, 2, seed=seed) for seed in (0, 0, 1))
    step = next(first.steps())
    np.testing.assert_array_equal(first.inputs(step)["sample"], second.inputs(step)["sample"])
    assert not np.array_equal(first.inputs(step)["sample"], other.inputs(step)["sample"])


def test_the_latent_has_the_variance_that_a_unet_is_trained_on() -> None:
    run = Trajectory((INPUTS[0], *INPUTS[1:]), SIZES | {"height": 64, "width": 64}, 5)
    assert run.inputs(next(run.steps()))["sample"].std() == pytest.approx(1.0, abs=0.05)


def test_a_step_updates_only_the_predicted_channels() -> None:
    run = Trajectory(INPUTS, SIZES, 5)
    step = TrajectoryStep(np.array([2.0, 1.0]), np.array([1.0, 0.5]))
    before = run.inputs(step)["sample"]
    run.advance(step, np.ones((2, 4, 8, 6)))
    moved = run.inputs(step)["sample"] - before
    np.testing.assert_array_equal(moved[:, 4:], 0.0)
    np.testing.assert_allclose(moved[0, :4], -1.0 / np.sqrt(5.0))
    np.testing.assert_allclose(moved[1, :4], -0.5 / np.sqrt(2.0))


def test_timesteps_are_those_of_stable_diffusion() -> None:
    found = timestep_of(np.array([1e-9, 0.0292, 1.0, 14.6146, 1e9]))
    assert found[0] == 0.0
    assert found[1] == pytest.approx(0.0, abs=0.05)
    assert 200 < found[2] < 500
    assert found[3] == pytest.approx(999.0, abs=0.05)
    assert found[4] == 999.0
