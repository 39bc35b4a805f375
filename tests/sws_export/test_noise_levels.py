"""Noise levels of timesteps, against what diffusers' schedulers say themselves."""

from typing import Any

import diffusers
import numpy as np
import pytest

from sws_export.noise_levels import noise_levels, stable_diffusion_levels

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def scheduler(name: str, steps: int = 8, **options: Any) -> Any:
    made = getattr(diffusers, name)(**(STABLE_DIFFUSION | options))
    made.set_timesteps(steps)
    return made


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_type": "continuous"}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
    ],
)
def test_timesteps_of_schedulers_with_sigmas(name: str, options: dict[str, Any]) -> None:
    made = scheduler(name, **options)
    found = [float(noise_levels(made, float(step))) for step in made.timesteps]
    np.testing.assert_allclose(found, made.sigmas.numpy()[: len(found)], rtol=2e-3)


def test_timesteps_of_schedulers_without_training_steps() -> None:
    made = diffusers.EDMEulerScheduler()
    made.set_timesteps(5)
    found = noise_levels(made, made.timesteps.numpy())
    np.testing.assert_allclose(found, made.sigmas.numpy()[:5], rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "LCMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"]
)
def test_timesteps_of_schedulers_with_alphas(name: str) -> None:
    made = scheduler(name)
    for step in made.timesteps:
        kept = float(made.alphas_cumprod[int(step)])
        assert float(noise_levels(made, int(step))) == pytest.approx(((1 - kept) / kept) ** 0.5, rel=1e-5)


def test_zero_terminal_snr_is_finite() -> None:
    made = scheduler("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert int(made.timesteps[0]) == 999
    assert float(made.alphas_cumprod[999]) == 0.0
    assert float(noise_levels(made, 999)) == pytest.approx(4096.0, rel=1e-3)


def test_fractional_timesteps_lie_between() -> None:
    made = scheduler("DDIMScheduler")
    whole = noise_levels(made, np.array([500.0, 501.0]))
    assert float(noise_levels(made, 500.5)) == pytest.approx(float(np.sqrt(whole[0] * whole[1])))


def test_without_a_scheduler_it_is_stable_diffusions() -> None:
    steps = np.array([0, 17.25, 999])
    np.testing.assert_allclose(
        noise_levels(None, steps), noise_levels(scheduler("DDIMScheduler"), steps), rtol=1e-4
    )
    assert stable_diffusion_levels()[-1] == pytest.approx(14.6146, abs=1e-3)
