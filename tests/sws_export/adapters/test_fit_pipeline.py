"""Pipelines around UNets that predict something else than the noise."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from sws_export.adapters.diffusers import SWSUNet
from sws_export.adapters.fit_pipeline import fit_pipeline
from sws_export.errors import OptionError
from sws_export.runtime import StepError
from tests.sws_export.adapters.test_diffusers import SCHEDULE, build, call, draw, vae  # noqa: F401  (fixture)
from tests.sws_export.conftest import POOLED, TOKENS

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PLAYGROUND = {
    "prediction_type": "edm",
    "sampling": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
}
COSXL = {
    "prediction_type": "edm_v_prediction",
    "sampling": {"sigma_data": 1.0, "sigma_min": 0.002, "sigma_max": 120.0},
}


@pytest.fixture
def edm_unet(sdxl_graph: Path, tmp_path: Path) -> SWSUNet:
    """`sdxl_graph` with a manifest that describes an EDM model."""
    graph = Path(shutil.copy(sdxl_graph, tmp_path))
    document = json.loads(sdxl_graph.with_name(sdxl_graph.name + ".json").read_text())
    document["source"] |= PLAYGROUND
    graph.with_name(graph.name + ".json").write_text(json.dumps(document))
    return SWSUNet.load(graph, device="cpu", threads=1)


def test_an_edm_model_in_a_pipeline_with_another_scheduler(
    vae: Any,  # noqa: F811
    edm_unet: SWSUNet,
    sdxl_unet: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = UNet2DConditionModel.from_pretrained(sdxl_unet).eval()
    expected = call(build(StableDiffusionXLPipeline, vae, plain, EDMEulerScheduler()))
    pipe = build(StableDiffusionXLPipeline, vae, edm_unet)
    with pytest.warns(UserWarning, match="predicts edm: scheduler EulerDiscreteScheduler replaced by EDME"):
        edm_unet.attach(pipe)
    sigmas: list[float] = []
    original = edm_unet.session.step
    monkeypatch.setattr(
        edm_unet.session,
        "step",
        lambda *given, **named: sigmas.append(float(named["sigma"].max())) or original(*given, **named),
    )
    np.testing.assert_allclose(call(pipe), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(sigmas, pipe.scheduler.sigmas[:-1], rtol=1e-4)
    assert (round(sigmas[0]), round(sigmas[-1], 3)) == (80, 0.002)


def test_a_scheduler_that_is_set_after_attach_is_refused(vae: Any, edm_unet: SWSUNet) -> None:  # noqa: F811
    pipe = build(StableDiffusionXLPipeline, vae, edm_unet, EDMEulerScheduler())
    edm_unet.attach(pipe)
    pipe.scheduler = DDIMScheduler(**SCHEDULE)
    with pytest.raises(StepError, match=r"predicts edm, which needs .*DDIMScheduler has other.*attach"):
        call(pipe)


def test_the_timestep_of_an_edm_model_is_its_noise_level(edm_unet: SWSUNet) -> None:
    added = {"text_embeds": draw(1, POOLED), "time_ids": draw(1, 6)}
    edm_unet(draw(1, 4, 8, 8), np.log(2.5) / 4, draw(1, TOKENS, 16), added_cond_kwargs=added)
    assert edm_unet._last_sigma == pytest.approx(2.5)


def changed(scheduler: Any, source: dict[str, Any], **parts: Any) -> tuple[Any, list[str]]:
    pipe = SimpleNamespace(scheduler=scheduler, **parts)
    return pipe, fit_pipeline(pipe, source)


@pytest.mark.parametrize(
    ("scheduler", "source", "expected"),
    [
        (EulerDiscreteScheduler(), PLAYGROUND, "EDMEulerScheduler epsilon 0.5 80.0"),
        (EulerDiscreteScheduler(), COSXL, "EDMEulerScheduler v_prediction 1.0 120.0"),
        (EDMDPMSolverMultistepScheduler(), COSXL, "EDMDPMSolverMultistepScheduler v_prediction 1.0 120.0"),
        (DDIMScheduler(), {"prediction_type": "v_prediction"}, "DDIMScheduler v_prediction None None"),
    ],
)
def test_schedulers(scheduler: Any, source: dict[str, Any], expected: str) -> None:
    pipe, changes = changed(scheduler, source)
    config = pipe.scheduler.config
    found = [config.prediction_type, config.get("sigma_data"), config.get("sigma_max")]
    assert f"{type(pipe.scheduler).__name__} {' '.join(map(str, found))}" == expected
    assert len(changes) == 1
    assert fit_pipeline(pipe, source) == []  # type: ignore[arg-type]


def test_zero_terminal_snr() -> None:
    source = {"prediction_type": "v_prediction", "sampling": {"zero_terminal_snr": True}}
    pipe, _ = changed(LCMScheduler(), source)
    assert pipe.scheduler.config.rescale_betas_zero_snr is True
    assert pipe.scheduler.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("kind", ["epsilon", None])
def test_an_assumed_prediction_does_not_override_the_scheduler(kind: str | None) -> None:
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    pipe, changes = changed(scheduler, {"prediction_type": kind})
    assert pipe.scheduler is scheduler
    assert changes == []


def test_an_edm_scheduler_for_another_model() -> None:
    with pytest.raises(OptionError, match="EDMEulerScheduler is for EDM models; use another scheduler"):
        changed(EDMEulerScheduler(), {"prediction_type": "v_prediction"})


def test_normalized_latents_are_set_in_the_vae() -> None:
    sampling = PLAYGROUND["sampling"] | {"latents_mean": [1.0] * 4, "latents_std": [2.0] * 4}  # type: ignore[operator]
    source = {"prediction_type": "edm", "sampling": sampling}
    decoder = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    pipe, changes = changed(EDMEulerScheduler(), source, vae=decoder)
    assert (decoder.config.latents_mean, decoder.config.scaling_factor) == ([1.0] * 4, 0.5)
    assert len(changes) == 1
    assert fit_pipeline(pipe, source) == []  # type: ignore[arg-type]
