"""An exported UNet in real pipelines of tiny random parts."""

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from sws_export import SourceOptions, export
from sws_export.adapters.diffusers import SWSUNet
from sws_export.errors import EngineError, OptionError
from sws_export.runtime import StepError
from tests.sws_export.conftest import LITERAL, POOLED, TOKENS

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    # Parts of diffusers that its own pipelines still call.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SIDE = 16
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="session")
def vae() -> AutoencoderKL:
    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
    ).eval()


@pytest.fixture
def unet(sws_graph: Path, random_unet: Path) -> SWSUNet:
    config = UNet2DConditionModel.load_config(random_unet)
    return SWSUNet.load(sws_graph, config=config, device="cpu", threads=1)


@pytest.fixture
def torch_unet(random_unet: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(random_unet).eval()


def build(kind: Any, vae: Any, unet: Any, scheduler: Any = None) -> Any:
    parts = {"vae": vae, "text_encoder": None, "tokenizer": None, "unet": unet}
    parts["scheduler"] = scheduler or EulerDiscreteScheduler(**SCHEDULE)
    if "XL" in kind.__name__:
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
        pipe = kind(**parts, add_watermarker=False)
    else:
        pipe = kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(pipe: Any, seed: int = 0, intensity: float | None = 0.0, **arguments: Any) -> Any:
    """Latents or images of one call, as an array."""
    given = {
        "prompt_embeds": draw(1, TOKENS, 16, seed=11),
        "negative_prompt_embeds": draw(1, TOKENS, 16, seed=12),
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
    }
    if "XL" in type(pipe).__name__:
        given["pooled_prompt_embeds"] = draw(1, POOLED, seed=13)
        given["negative_pooled_prompt_embeds"] = draw(1, POOLED, seed=14)
    if "Img2Img" in type(pipe).__name__ or "Inpaint" in type(pipe).__name__:
        given |= {"image": picture(), "strength": 0.6}
    if "Inpaint" in type(pipe).__name__:
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[4:12, 4:12] = 255
        given["mask_image"] = Image.fromarray(mask)
    if "Img2Img" not in type(pipe).__name__:
        given |= {"height": SIDE, "width": SIDE}
    if intensity is not None and isinstance(pipe.unet, SWSUNet):
        given["cross_attention_kwargs"] = {"intensity": intensity}
    return np.asarray(pipe(**(given | arguments)).images)


def picture(seed: int = 5) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), np.uint8))


@pytest.fixture
def seen(unet: SWSUNet, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each step was given, and whether it began with an empty state."""
    steps: list[dict[str, Any]] = []
    original = unet.session.step

    def step(*arguments: Any, **named: Any) -> Any:
        states = unet.session.state().values()
        steps.append(named | {"fresh": not any(values.any() for values in states)})
        return original(*arguments, **named)

    monkeypatch.setattr(unet.session, "step", step)
    return steps


def fresh(seen: list[dict[str, Any]]) -> list[bool]:
    return [step["fresh"] for step in seen]


SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "ddim": ("DDIMScheduler", {}),
    "v, zero snr": (
        "DDIMScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", {}),
}


@pytest.fixture(params=SCHEDULERS, ids=SCHEDULERS)
def scheduler(request: pytest.FixtureRequest) -> Any:
    name, options = SCHEDULERS[request.param]
    return getattr(diffusers, name)(**(SCHEDULE | options))


def test_intensity_zero_is_the_torch_pipeline(
    vae: Any, unet: SWSUNet, torch_unet: Any, scheduler: Any, seen: list[dict[str, Any]]
) -> None:
    expected = call(build(StableDiffusionPipeline, vae, torch_unet, scheduler))
    pipe = build(StableDiffusionPipeline, vae, torch_unet, scheduler)
    unet.attach(pipe)
    assert pipe.unet is unet
    np.testing.assert_allclose(call(pipe), expected, rtol=0, atol=1e-4)
    assert fresh(seen) == [True] + [False] * (len(seen) - 1)
    sigmas = [float(step["sigma"].max()) for step in seen]
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[0] > 4
    assert sigmas[-1] < 1


@pytest.mark.parametrize(
    "kind",
    [
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
    ],
)
def test_other_pipelines(kind: Any, vae: Any, unet: SWSUNet, torch_unet: Any) -> None:
    expected = call(build(kind, vae, torch_unet))
    pipe = build(kind, vae, unet)
    unet.attach(pipe)
    np.testing.assert_allclose(call(pipe), expected, rtol=0, atol=1e-4)
    assert np.abs(call(pipe, intensity=1.0) - expected).max() > 1e-5


@pytest.mark.parametrize(
    "kind",
    [StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline],
)
def test_sdxl(kind: Any, vae: Any, sdxl_graph: Path, sdxl_unet: Path) -> None:
    plain = UNet2DConditionModel.from_pretrained(sdxl_unet).eval()
    expected = call(build(kind, vae, plain))
    unet = SWSUNet.load(sdxl_graph, threads=1)
    pipe = build(kind, vae, unet)
    unet.attach(pipe)
    np.testing.assert_allclose(call(pipe), expected, rtol=0, atol=1e-4)
    assert np.abs(call(pipe, intensity=1.0) - expected).max() > 1e-5


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionXLPipeline])
def test_a_pipeline_made_without_a_unet_has_its_size(
    kind: Any, vae: Any, sws_graph: Path, sdxl_graph: Path, random_unet: Path
) -> None:
    xl = kind is StableDiffusionXLPipeline
    config = None if xl else UNet2DConditionModel.load_config(random_unet)
    pipe = build(kind, vae, None)
    unet = SWSUNet.load(sdxl_graph if xl else sws_graph, config=config, threads=1).attach(pipe)
    side = unet.config.sample_size * pipe.vae_scale_factor
    assert side == 32
    assert call(pipe, height=None, width=None, num_inference_steps=1).shape == (1, side, side, 3)


def test_two_calls_in_a_row(vae: Any, unet: SWSUNet, seen: list[dict[str, Any]]) -> None:
    pipe = build(StableDiffusionPipeline, vae, unet)
    unet.attach(pipe)
    first = call(pipe, intensity=1.0)
    assert np.array_equal(call(pipe, intensity=1.0), first)
    assert fresh(seen) == [True, False, False, False] * 2


def test_one_step_after_one_step(vae: Any, unet: SWSUNet, seen: list[dict[str, Any]]) -> None:
    pipe = build(StableDiffusionPipeline, vae, unet)
    unet.attach(pipe)
    for _ in range(3):
        call(pipe, num_inference_steps=1)
    assert fresh(seen) == [True, True, True]


def test_a_callback_that_interrupts(vae: Any, unet: SWSUNet, seen: list[dict[str, Any]]) -> None:
    """A call cut short at a high noise level, then img2img that begins below it."""
    pipe = build(StableDiffusionPipeline, vae, unet)
    unet.attach(pipe)

    def interrupt(pipe: Any, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = number == 1
        return tensors

    call(pipe, callback_on_step_end=interrupt, num_inference_steps=8)
    assert fresh(seen) == [True, False]
    other = build(StableDiffusionImg2ImgPipeline, vae, unet, pipe.scheduler)
    call(other, num_inference_steps=8, strength=0.3)
    assert float(seen[2]["sigma"].max()) < float(seen[1]["sigma"].max())
    assert fresh(seen[2:]) == [True, False]


def test_another_batch(vae: Any, unet: SWSUNet, seen: list[dict[str, Any]]) -> None:
    pipe = build(StableDiffusionPipeline, vae, unet)
    unet.attach(pipe)
    call(pipe)
    found = call(pipe, num_images_per_prompt=2, intensity=1.0)
    assert len(found) == 2
    assert np.array_equal(found[:1], call(pipe, num_images_per_prompt=2, intensity=1.0)[:1])


def test_a_scheduler_exchanged_later(vae: Any, unet: SWSUNet, seen: list[dict[str, Any]]) -> None:
    pipe = build(StableDiffusionPipeline, vae, unet)
    unet.attach(pipe)
    pipe.scheduler = DDIMScheduler(**SCHEDULE, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    call(pipe)
    assert float(seen[0]["sigma"].max()) > 1000


def test_intensity_of_a_call_and_of_the_unet(vae: Any, unet: SWSUNet, seen: list[dict[str, Any]]) -> None:
    pipe = build(StableDiffusionPipeline, vae, unet)
    unet.attach(pipe)
    unet.intensity = 0.25
    call(pipe, intensity=None, num_inference_steps=1)
    call(pipe, intensity=0.75, num_inference_steps=1)
    assert [step["intensity"] for step in seen] == [0.25, 0.75]


@pytest.fixture
def step_inputs() -> dict[str, Any]:
    return {"sample": draw(1, 4, 8, 8), "timestep": 500, "encoder_hidden_states": draw(1, TOKENS, 16)}


def test_without_a_scheduler_a_single_warning(unet: SWSUNet, step_inputs: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="SWSUNet has no scheduler"):
        unet(**step_inputs)
    unet(**step_inputs)


def test_rising_noise_without_a_scheduler(
    unet: SWSUNet, step_inputs: dict[str, Any], seen: list[dict[str, Any]]
) -> None:
    with pytest.warns(UserWarning, match="scheduler"):
        unet(**step_inputs)
    for timestep in (400, 400, 600, 20):
        unet(**(step_inputs | {"timestep": timestep}))
    assert fresh(seen) == [True, False, False, True, False]


def test_output_is_diffusers_own(unet: SWSUNet, step_inputs: dict[str, Any], vae: Any) -> None:
    unet.attach(build(StableDiffusionPipeline, vae, unet))
    named = unet(**step_inputs).sample
    unet.reset()
    (plain,) = unet(**step_inputs, return_dict=False)
    assert torch.equal(named, plain)
    assert (unet.dtype, unet.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"down_block_additional_residuals": [draw(1)]}, "has no ControlNet inputs; export it with --contr"),
        (
            {"down_intrablock_additional_residuals": [draw(1)]},
            r"residuals \(T2I-Adapter\): the exported graph",
        ),
        (
            {"cross_attention_kwargs": {"scale": 1.0}},
            "scale cannot be applied to an exported graph.*fuse a LoRA",
        ),
        ({"added_cond_kwargs": {"image_embeds": draw(1)}}, "has no input image_embeds"),
        ({"attention_mask": draw(1)}, "attention_mask: the exported graph has no such input"),
    ],
)
def test_what_the_graph_cannot_do(
    unet: SWSUNet, step_inputs: dict[str, Any], arguments: dict[str, Any], message: str, vae: Any
) -> None:
    unet.attach(build(StableDiffusionPipeline, vae, unet))
    with pytest.raises(StepError, match=message):
        unet(**step_inputs, **arguments)


def test_controlnet(random_unet: Path, torch_unet: Any, tmp_path: Path) -> None:
    """Residuals of a ControlNet reach the graph; without them they are zero."""
    graph = tmp_path / "control.onnx"
    export(random_unet, graph, dataclasses.replace(LITERAL, source=SourceOptions(controlnet=True)))
    unet = SWSUNet.load(graph, scheduler=EulerDiscreteScheduler(**SCHEDULE), intensity=0.0)
    latent, text = draw(2, 4, 8, 8), draw(2, TOKENS, 16)
    given = {"down_block_additional_residuals": [], "mid_block_additional_residual": draw(2, 64, 4, 4)}
    for seed, (width, side) in enumerate([(32, 8), (32, 8), (32, 4), (64, 4)]):
        given["down_block_additional_residuals"].append(draw(2, width, side, side, seed=seed))
    with torch.no_grad():
        expected = [torch_unet(latent, 500, text, **residuals).sample for residuals in (given, {})]
    found = [unet(latent, 500, text, **residuals).sample for residuals in (given, {})]
    assert (expected[0] - expected[1]).abs().max() > 0.01
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    given["mid_block_additional_residual"] = draw(2, 64, 8, 4)
    with pytest.raises(StepError, match=r"residual: dimension 2 is 8, expected 4 \(height/2, as in"):
        unet(latent, 500, text, **given)


def test_misspelt_arguments_are_the_callers_bug(unet: SWSUNet, step_inputs: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="no argument 'timesteps'"):
        unet(**step_inputs, timesteps=3)


def test_a_graph_without_configuration(sws_graph: Path) -> None:
    with pytest.raises(EngineError, match=r"exported from a plain \.onnx graph.*give config="):
        SWSUNet.load(sws_graph)
    assert SWSUNet.load(sws_graph, config={"sample_size": 16}).config.sample_size == 16


def test_a_timestep_of_one_element_is_that_of_the_batch(
    unet: SWSUNet, torch_unet: Any, step_inputs: dict[str, Any], vae: Any
) -> None:
    unet.attach(build(StableDiffusionPipeline, vae, unet))
    inputs = {"sample": draw(2, 4, 8, 8), "timestep": torch.tensor([500])}
    inputs["encoder_hidden_states"] = draw(2, TOKENS, 16)
    with torch.no_grad():
        expected = torch_unet(**inputs).sample
    found = unet(**inputs, cross_attention_kwargs={"intensity": 0.0}).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_habits_of_torch_modules(unet: SWSUNet, sdxl_graph: Path, sdxl_unet: Path) -> None:
    for same in (
        unet.eval(),
        unet.train(False),
        unet.requires_grad_(False),
        unet.to("cpu", torch.float32),
        unet.to(device=torch.device("cpu")),
    ):
        assert same is unet
    for refused, message in (
        (unet.train, "cannot be trained"),
        (unet.requires_grad_, "has no gradients"),
        (lambda: unet.to(torch.float16), r"torch\.float32 and cannot be converted to torch\.float16"),
        (lambda: unet.to("cuda:0"), r"moved to cuda:0; load it with SWSUNet\.load\(path, device='cuda'\)"),
        (unet.num_parameters, "its manifest has no such number"),
    ):
        with pytest.raises(OptionError, match=message):
            refused()
    for name in ("named_parameters", "state_dict", "set_attn_processor", "save_pretrained"):
        assert not hasattr(unet, name)
    with pytest.raises(AttributeError, match="'named_parameters': the UNet is an exported graph, whose weig"):
        unet.named_parameters()
    counted = SWSUNet.load(sdxl_graph, threads=1).num_parameters()
    assert counted == UNet2DConditionModel.from_pretrained(sdxl_unet).num_parameters()


def test_a_pipeline_saved_with_it_is_the_pipeline_without_a_unet(
    pipeline: Path, unet: SWSUNet, tmp_path: Path
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, unet=None)
    unet.attach(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    expected = call(pipe, intensity=1.0)
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "unet").exists()
    again = StableDiffusionPipeline.from_pretrained(tmp_path, unet=None)
    again.set_progress_bar_config(disable=True)
    unet.attach(again)
    assert np.array_equal(call(again, intensity=1.0), expected)
