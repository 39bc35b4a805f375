"""An exported UNet called as ComfyUI calls its own."""

import itertools
import logging
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sws_export import ExportOptions, SizeOptions, SourceOptions, SwsOptions, export
from sws_export.adapters.comfyui import (
    Engine,
    SwsDiffusionModel,
    embed_sizes,
    family_of,
    sampling_of,
    split_adm,
    unet_config,
)
from sws_export.adapters.comfyui.sizes import batch_calls, needed_sides
from sws_export.runtime import Session, StepError
from sws_export.tensors import TensorSpec
from tests import export_runs
from tests.sws_export.conftest import POOLED, TOKENS

SIGMAS = torch.tensor([9.0, 5.0, 2.0, 0.5, 0.0])
Cond = tuple[uuid.UUID, torch.Tensor]
FULL = {"sws_intensity": 1.0}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Sampler:
    """As much of comfy.samplers and comfy.model_base as reaches `diffusion_model`.

    As `_calc_cond_batch`: conditions that fit into memory together are one call, last one first, and
    `sigmas` has one entry a latent, not one for each condition.
    """

    def __init__(self, diffusion_model: Any, together: bool = True) -> None:
        self.diffusion_model = diffusion_model
        self.together = together
        self.conds: list[Cond] = [(uuid.uuid4(), draw(1, TOKENS, 16, seed=seed)) for seed in (3, 4)]

    def run(self, sigmas: torch.Tensor = SIGMAS, batch: int = 1, **options: Any) -> torch.Tensor:
        self.diffusion_model.start_run()
        latent = draw(batch, 4, 8, 6, seed=9) * sigmas[0]
        for sigma, following in itertools.pairwise(sigmas):
            conditional, unconditional = self.predict(latent, sigma.expand(batch), **options)
            latent = latent + (following - sigma) * (unconditional + 3.0 * (conditional - unconditional))
        return latent

    def predict(self, latent: torch.Tensor, sigma: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        numbers = [1, 0]
        groups = [numbers] if self.together else [[number] for number in numbers]
        found: dict[int, torch.Tensor] = {}
        for group in groups:
            x = torch.cat([latent / (sigma**2 + 1).sqrt()[:, None, None, None]] * len(group))
            context = torch.cat([self.conds[number][1].expand(len(latent), -1, -1) for number in group])
            passed = {
                "sigmas": sigma,
                "cond_or_uncond": group,
                "uuids": [self.conds[number][0] for number in group],
                **FULL,
                **options,
            }
            timesteps = torch.full((len(x),), 500.0)
            out = self.diffusion_model(
                x, timesteps, context=context, control=None, transformer_options=passed
            )
            found |= dict(zip(group, out.chunk(len(group)), strict=True))
        return [found[0], found[1]]


@pytest.fixture(scope="session")
def engine(sws_graph: Path) -> Engine:
    return Engine.open(sws_graph, device="cpu", threads=1)


@pytest.fixture(scope="session")
def session(engine: Engine) -> Session:
    return engine.session()


@pytest.fixture
def model(engine: Engine) -> SwsDiffusionModel:
    return SwsDiffusionModel(engine)


def by_hand(session: Session, sampler: Sampler) -> tuple[torch.Tensor, list[Any]]:
    """The same run with a stream for each condition: its result and the states at its end."""
    streams = [session.stream() for _ in sampler.conds]
    latent = draw(1, 4, 8, 6, seed=9) * SIGMAS[0]
    for sigma, following in itertools.pairwise(SIGMAS):
        x = latent / (sigma**2 + 1).sqrt()
        conditional, unconditional = (
            stream.step(x, 500.0, context, sigma=float(sigma), intensity=1.0)
            for stream, (_, context) in zip(streams, sampler.conds, strict=True)
        )
        latent = latent + (following - sigma) * (unconditional + 3.0 * (conditional - unconditional))
    return latent, [stream.state()["sws_state_d2"][0] for stream in streams]


@pytest.mark.parametrize("together", [True, False])
def test_a_run_has_the_samplers_noise_levels_and_its_own_state(
    model: SwsDiffusionModel, session: Session, together: bool
) -> None:
    sampler = Sampler(model, together)
    expected, states = by_hand(session, sampler)
    first = sampler.run()
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-4)
    for number, (identity, _) in enumerate(sampler.conds):
        found = model.states.state((identity, number, 0))["sws_state_d2"]
        np.testing.assert_allclose(found, states[number], rtol=0, atol=1e-6)
    assert len(model.states) == (1 if together else 2)
    # The second run has no history, although its conditions are the same objects.
    assert torch.equal(sampler.run(), first)
    model.end_run()
    assert len(model.states) == 0


def test_a_changed_partner_drops_no_state(model: SwsDiffusionModel) -> None:
    """ComfyUI calls conditions together as memory allows, which may change within a run."""
    sampler = Sampler(model)
    latent = draw(1, 4, 8, 6)
    expected = []
    for changes in (False, True):
        model.start_run()
        for number, sigma in enumerate((5.0, 2.0, 1.0, 0.5)):
            sampler.together = not (changes and number % 2)
            found = sampler.predict(latent, torch.tensor([sigma]))
        expected.append(found)
        assert len(model.states) == (2 if changes else 1)
    for one, other in zip(*expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_intensity_is_an_option_of_the_call(model: SwsDiffusionModel, session: Session) -> None:
    options = {"sigmas": torch.tensor([2.0])}
    x, context = draw(1, 4, 8, 6), draw(1, TOKENS, 16)
    for given, intensity in (({}, 0.5), ({"sws_intensity": 0.0}, 0.0), (FULL, 1.0)):
        model.start_run()
        found = model(x, torch.tensor([500.0]), context=context, transformer_options=options | given)
        expected = session.stream().step(x, 500.0, context, sigma=2.0, intensity=intensity)
        assert torch.equal(found, expected)


def test_each_sample_has_the_sigma_of_its_latent(model: SwsDiffusionModel, session: Session) -> None:
    """A batch of two latents: the state of each follows its own noise level."""
    sampler = Sampler(model)
    latent = draw(2, 4, 8, 6)
    sampler.predict(latent, torch.tensor([5.0, 3.0]))
    for number, sigma in enumerate((5.0, 3.0)):
        stream = session.stream()
        x = latent[number : number + 1] / (sigma**2 + 1) ** 0.5
        stream.step(x, 500.0, sampler.conds[0][1], sigma=sigma, intensity=1.0)
        found = model.states.state((sampler.conds[0][0], 0, number))["sws_state_d2"]
        np.testing.assert_allclose(found, stream.state()["sws_state_d2"][0], rtol=0, atol=1e-6)


def test_unloaded_it_loads_again_at_the_next_call(model: SwsDiffusionModel) -> None:
    sampler = Sampler(model)
    expected = sampler.run()
    model.unload()
    assert not model.engine.is_loaded
    assert torch.equal(sampler.run(), expected)
    assert model.engine.is_loaded


def test_patches_without_effect_are_named_once(
    model: SwsDiffusionModel, caplog: pytest.LogCaptureFixture
) -> None:
    patches = {
        "patches": {"output_block_patch": [print], "attn1_patch": []},
        "patches_replace": {"attn1": {1: print}},
    }
    with caplog.at_level(logging.WARNING):
        Sampler(model).run(**patches)
    assert [record.getMessage() for record in caplog.records] == [
        f"sws.onnx: {name}: an engine cannot apply it, and it has no effect; use the torch model for it"
        for name in ("patches output_block_patch", "patches_replace attn1")
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control": {"output": [draw(1)]}}, "no ControlNet inputs; export it with --controlnet"),
        ({"control": {"input": [draw(1)]}}, "a T2I adapter adds its residuals to the input blocks"),
        ({"transformer_options": {}}, "transformer_options has no sigmas"),
        ({"ref_latents": draw(1)}, "has no input ref_latents"),
    ],
)
def test_what_is_refused(model: SwsDiffusionModel, change: dict[str, Any], message: str) -> None:
    given = {"context": draw(1, TOKENS, 16), "transformer_options": {"sigmas": torch.tensor([2.0])}}
    with pytest.raises(StepError, match=message):
        model(draw(1, 4, 8, 6), torch.tensor([500.0]), **(given | change))


def test_a_batch_is_split_and_padded_and_an_image_padded_and_cropped(
    traced: Path,
    tmp_path_factory: pytest.TempPathFactory,
    model: SwsDiffusionModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = SizeOptions(batch="2", height="64", width="64", tokens=str(TOKENS), vae_scale=8)
    options = ExportOptions(sws=SwsOptions(guard="literal"), sizes=sizes, validate=False)
    path = export_runs.shared(tmp_path_factory, "static_sws.onnx", lambda out: export(traced, out, options))
    static = SwsDiffusionModel(Engine.open(path, device="cpu", threads=1))
    samplers = [Sampler(unet) for unet in (model, static)]
    samplers[1].conds = samplers[0].conds
    # Conditions of three latents: calls of two, and of one that is padded.
    found = [sampler.predict(draw(3, 4, 8, 8), torch.tensor([3.0])) for sampler in samplers]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    with caplog.at_level(logging.WARNING):
        narrow = samplers[1].predict(draw(1, 4, 7, 8), torch.tensor([3.0]))
    assert narrow[0].shape == (1, 4, 7, 8)
    assert "a latent of 7 x 8: padded to 8 x 8 and cropped" in caplog.text
    with pytest.raises(StepError, match="static"):
        samplers[1].predict(draw(1, 4, 8, 10), torch.tensor([3.0]))


@pytest.mark.parametrize(
    ("batch", "side", "calls"),
    [
        (1, 64, [(1, 2)]),
        (4, 64, [(4, 4)]),
        (7, 64, [(4, 4), (3, 3)]),
        (3, 128, [(1, 1), (1, 1), (1, 1)]),
    ],
)
def test_calls_of_a_batch(batch: int, side: int, calls: list[tuple[int, int]]) -> None:
    """Two profiles: batches of 2 to 4 up to 64 x 64, and one image of 96 x 96 to 128 x 128."""
    contract = _contract_of(768)
    contract.profiles = (
        {"sample": ((2, 4, 32, 32), (2, 4, 64, 64), (4, 4, 64, 64))},
        {"sample": ((1, 4, 96, 96), (1, 4, 128, 128), (1, 4, 128, 128))},
    )
    contract.size_multiple = 8
    assert batch_calls(contract, batch, side, side) == calls
    assert needed_sides(contract, 20, 62) == (32, 64)
    assert needed_sides(contract, 70, 60) == (96, 96)
    assert needed_sides(contract, 129, 60) == (136, 64)


def test_a_controlnet(random_unet: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    options = ExportOptions(
        source=SourceOptions(controlnet=True), sws=SwsOptions(guard="literal"), validate=False
    )
    path = export_runs.shared(
        tmp_path_factory, "sws_controlnet.onnx", lambda out: export(random_unet, out, options)
    )
    model = SwsDiffusionModel(Engine.open(path, device="cpu", threads=1))
    specs = {spec.name: spec for spec in model.engine.contract.inputs if "residual" in spec.name}
    sides = {"height": 8, "width": 6}

    def side(dimension: int | str) -> int:
        name, _, divisor = str(dimension).partition("/")
        return sides[name] // int(divisor or 1)

    tensors = {name: draw(1, spec.shape[1], *map(side, spec.shape[2:])) for name, spec in specs.items()}
    *down, middle = tensors.values()
    x, context = draw(1, 4, 8, 6), draw(1, TOKENS, 16)
    options = {"sigmas": torch.tensor([2.0]), **FULL}
    # A ControlNet without a residual for a block has None there.
    control = {"input": [], "output": [None, *down[1:]], "middle": [middle]}
    found = model(x, torch.tensor([500.0]), context=context, control=control, transformer_options=options)
    given = {name: tensor for name, tensor in tensors.items() if tensor is not down[0]}
    expected = model.engine.session().stream().step(x, 500.0, context, sigma=2.0, intensity=1.0, **given)
    assert torch.equal(found, expected)
    assert len(control["output"]) == len(down)
    with pytest.raises(StepError, match=f"the ControlNet has {len(down) + 1} residuals .* takes {len(down)}"):
        model(
            x,
            torch.tensor([500.0]),
            context=context,
            control={"output": [*down, down[0]]},
            transformer_options=options,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sizes_come_back_out_of_their_embedding(dtype: torch.dtype) -> None:
    sizes = torch.tensor([[1024, 1344, 0, 8, 832, 1], [512, 4096, 3, 777, 2047, 6]], dtype=torch.float32)
    embedded = torch.from_numpy(embed_sizes(sizes.flatten())).reshape(2, -1)
    pooled = draw(2, POOLED)
    found = split_adm(torch.cat([pooled, embedded], dim=1).to(dtype))
    assert np.array_equal(found["time_ids"], sizes)
    assert torch.equal(found["text_embeds"], pooled.to(dtype))


def test_aesthetic_scores_are_halves() -> None:
    scores = torch.tensor([6.0, 2.5])
    found = split_adm(
        torch.cat([draw(1, POOLED), torch.from_numpy(embed_sizes(scores)).reshape(1, -1)], dim=1)
    )
    assert found["time_ids"].tolist() == [[6.0, 2.5]]


def test_embedding_is_diffusers_own() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    sizes = torch.tensor([0.0, 1.0, 777.0, 4096.0])
    expected = get_timestep_embedding(sizes, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(torch.from_numpy(embed_sizes(sizes)), expected, rtol=0, atol=1e-3)


def test_a_vector_of_another_width() -> None:
    with pytest.raises(StepError, match=r"y: expected \[B, 1280 \+ 256 N\], found \[1, 1300\]"):
        split_adm(draw(1, 1300))


def test_sdxl(sdxl_graph: Path) -> None:
    model = SwsDiffusionModel(Engine.open(sdxl_graph, threads=1))
    sizes = torch.tensor([[64.0, 48.0, 0.0, 0.0, 64.0, 48.0]])
    pooled, context, x = draw(1, POOLED), draw(1, TOKENS, 16), draw(1, 4, 8, 6)
    y = torch.cat([pooled, torch.from_numpy(embed_sizes(sizes[0])).reshape(1, -1)], dim=1)
    options = {"sigmas": torch.tensor([3.0])}
    found = model(x, torch.tensor([500.0]), context=context, y=y, transformer_options=options)
    expected = (
        model.engine.session()
        .stream()
        .step(x, 500.0, context, sigma=3.0, intensity=0.5, text_embeds=pooled, time_ids=sizes)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("count", "family"), [(6, "sdxl"), (5, "sdxl_refiner")])
def test_a_graph_of_comfyuis_own_export_takes_y(count: int, family: str) -> None:
    contract = _contract_of(2048)
    contract.inputs += [TensorSpec("y", "float16", ("batch", POOLED + count * 256))]
    contract.inputs += [TensorSpec(name, "float32", ("batch",)) for name in ("timestep", "sigma")]
    contract.size_multiple, contract.profiles, contract.resets_per_image = 1, (), False
    assert family_of(contract) == family
    given: dict[str, Any] = {}

    def step(**inputs: Any) -> Any:
        given.update(inputs)
        return inputs["sample"]

    stream = SimpleNamespace(step=step)
    session = SimpleNamespace(stream=lambda: stream)
    model = SwsDiffusionModel(SimpleNamespace(contract=contract, session=lambda: session))  # type: ignore[arg-type]
    y, options = draw(1, POOLED + count * 256), {"sigmas": torch.tensor([3.0])}
    model(draw(1, 4, 8, 6), torch.tensor([500.0]), context=draw(1, 5, 2048), y=y, transformer_options=options)
    assert given["y"] is y
    assert not {"text_embeds", "time_ids"} & given.keys()


@pytest.mark.parametrize(
    ("width", "time_ids", "family"),
    [(768, None, "sd15"), (1024, None, "sd20"), (2048, 6, "sdxl"), (1280, 5, "sdxl_refiner")],
)
def test_families(width: int, time_ids: int | None, family: str) -> None:
    assert family_of(_contract_of(width, time_ids)) == family


def test_a_family_that_comfyui_does_not_have(session: Session) -> None:
    with pytest.raises(StepError, match=r"the node supports text embeddings of width 768 .* found width 16"):
        family_of(session.contract)


@pytest.mark.parametrize(
    ("source", "model_type", "settings"),
    [
        ({}, "EPS", {}),
        ({"prediction_type": "epsilon", "sampling": {"zero_terminal_snr": True}}, "EPS", {"zsnr": True}),
        (
            {"prediction_type": "v_prediction", "sampling": {"zero_terminal_snr": True}},
            "V_PREDICTION",
            {"zsnr": True},
        ),
        (
            {
                "prediction_type": "edm",
                "sampling": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
            },
            "EDM",
            {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
        ),
        (
            {"prediction_type": "edm_v_prediction", "sampling": {"sigma_data": 1.0, "sigma_max": 120.0}},
            "V_PREDICTION_EDM",
            {"sigma_data": 1.0, "sigma_max": 120.0},
        ),
    ],
)
def test_sampling(source: dict[str, Any], model_type: str, settings: dict[str, Any]) -> None:
    found = sampling_of(_contract_of(2048, 6, **source))
    assert (found.model_type, found.settings, found.predicts_sample) == (model_type, settings, False)
    assert found.latents_mean is None


def test_latents_with_mean_and_deviation() -> None:
    sampling = {"latents_mean": [-1.6, 1.9], "latents_std": [8.5, 5.9]}
    found = sampling_of(_contract_of(2048, 6, prediction_type="edm", sampling=sampling))
    assert (found.latents_mean, found.latents_std) == ((-1.6, 1.9), (8.5, 5.9))


def test_a_prediction_type_that_comfyui_does_not_have() -> None:
    assert sampling_of(_contract_of(768, prediction_type="sample")).predicts_sample
    with pytest.raises(StepError, match="prediction type 'flow' is unknown; the node supports epsilon, "):
        sampling_of(_contract_of(768, prediction_type="flow"))


def test_the_configuration_that_nodes_of_comfyui_read() -> None:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "projection_class_embeddings_input_dim": 2816,
    }
    # As ComfyUI's model_detection has it for SDXL.
    expected = {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "context_dim": 2048,
        "use_linear_in_transformer": True,
        "use_spatial_transformer": True,
        "adm_in_channels": 2816,
    }
    assert unet_config(_contract_of(2048, 6, config=config)) == expected
    assert unet_config(_contract_of(2048, 6)) == {}


def test_memory_and_summary_of_an_engine(engine: Engine, sws_graph: Path) -> None:
    assert engine.device_bytes() >= sws_graph.stat().st_size
    assert engine.summary() == "ONNX graph, fp32, sws, any size"
    profile = {"sample": ((1, 4, 64, 64), (2, 4, 64, 64), (4, 4, 128, 64))}
    contract = _contract_of(
        768,
        vae_scale=8,
        engine={
            "backend": "tensorrt-rtx",
            "gpu_memory": {"weights": 100, "profiles": [{"activations": 7, "scratch": 1, "states": 3}]},
        },
    )
    contract.profiles, contract.states, contract.backend = (profile,), (), "tensorrt-rtx"
    found = Engine(contract)
    assert found.device_bytes() == 110
    assert found.summary() == (
        "tensorrt-rtx, fp16, sws, batch 1 to 4, best 2, height 512 to 1024, best 512, width 512"
    )


def _contract_of(width: int, time_ids: int | None = None, engine: Any = None, **source: Any) -> Any:
    specs = [
        TensorSpec("sample", "float16", ("batch", 4, "height", "width")),
        TensorSpec("encoder_hidden_states", "float16", ("batch", "tokens", width)),
    ]
    if time_ids:
        specs.append(TensorSpec("time_ids", "float16", ("batch", time_ids)))
    manifest = {"precision": "fp16", "source": source, "preset": "sws", "engine": engine}
    return SimpleNamespace(inputs=specs, path=Path("engine.plan"), manifest=manifest, static_sizes={})
