"""The predicted image, compared with what schedulers compute themselves."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from sws_export.errors import OptionError
from sws_export.sampling.predicted_image import predicted_image, recorded_steps

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def own_prediction(scheduler: Any, output: Any, timestep: Any, sample: Any) -> Any:
    """x0 as the scheduler computes it."""
    if isinstance(scheduler, DPMSolverMultistepScheduler | UniPCMultistepScheduler):
        scheduler._init_step_index(timestep)
        return scheduler.convert_model_output(output, sample=sample)
    return scheduler.step(output, timestep, sample).pred_original_sample


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "kind",
    [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler],
)
def test_it_is_what_the_scheduler_predicts(kind: Any, prediction: str) -> None:
    extra = {"clip_sample": False} if kind is DDIMScheduler else {}
    if kind is EulerDiscreteScheduler and prediction == "sample":
        pytest.skip("the scheduler does not have it")
    scheduler = kind(**STABLE, prediction_type=prediction, **extra)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    sample, output = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    timestep = scheduler.timesteps[4]
    expected = own_prediction(scheduler, output, timestep, sample)
    # Schedulers interpolate sigma in slightly different ways.
    torch.testing.assert_close(
        predicted_image(scheduler, output, timestep, sample), expected, rtol=2e-3, atol=2e-3
    )


def test_edm() -> None:
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(10)
    sample, output = torch.ones(1, 1, 2, 2) * 3, torch.ones(1, 1, 2, 2)
    timestep = scheduler.timesteps[4]
    scheduler._init_step_index(timestep)
    expected = scheduler.step(output, timestep, sample).pred_original_sample
    torch.testing.assert_close(predicted_image(scheduler, output, timestep, sample), expected)


def test_unknown_predictions_are_named() -> None:
    scheduler = DDIMScheduler(prediction_type="flow")
    with pytest.raises(
        OptionError,
        match="DDIMScheduler: expected a prediction type of epsilon, v_prediction, sample, found 'flow'",
    ):
        predicted_image(scheduler, torch.ones(1), torch.tensor(5), torch.ones(1))


def test_steps_are_recorded() -> None:
    """A model that always predicts the same noise predicts the same image along its trajectory."""
    scheduler = EulerDiscreteScheduler(**STABLE)
    scheduler.set_timesteps(4)
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = noise * scheduler.init_noise_sigma
    with recorded_steps(scheduler) as record:
        for number, timestep in enumerate(scheduler.timesteps):
            output = noise + (0.5 if number == 2 else 0.0)
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(record.noise, noise)
    # At step 3 the noise is larger by 0.5, and the image smaller by 0.5 sigma. At step 4 the noise is as
    # before, but the latents are those after step 3.
    sigmas = scheduler.sigmas
    assert [float(moved[0]) for moved in record.changes] == pytest.approx(
        [0.0, 0.5 * float(sigmas[2]), 0.5 * float(sigmas[3])], rel=1e-2, abs=0.02
    )
    assert "step" not in vars(scheduler)
