"""An exported UNet called as ComfyUI calls its own, and the node that loads it."""

import importlib.util
import itertools
import json
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sws_export.adapters.comfyui import SwsDiffusionModel, embed_sizes, family_of, split_adm
from sws_export.runtime import Session, StepError
from sws_export.tensors import TensorSpec
from tests import export_runs
from tests.sws_export.conftest import POOLED, TOKENS

SIGMAS = torch.tensor([9.0, 5.0, 2.0, 0.5, 0.0])
Cond = tuple[uuid.UUID, torch.Tensor]


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
        latent = draw(batch, 4, 8, 6, seed=9) * sigmas[0]
        listed = sigmas.clone()
        for sigma, following in itertools.pairwise(sigmas):
            told, untold = self.predict(latent, sigma.expand(batch), sample_sigmas=listed, **options)
            latent = latent + (following - sigma) * (untold + 3.0 * (told - untold))
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
                **options,
            }
            timesteps = torch.full((len(x),), 500.0)
            out = self.diffusion_model(
                x, timesteps, context=context, control=None, transformer_options=passed
            )
            found |= dict(zip(group, out.chunk(len(group)), strict=True))
        return [found[0], found[1]]


@pytest.fixture(scope="session")
def session(sws_graph: Path) -> Session:
    return Session.load(sws_graph, device="cpu", threads=1)


@pytest.fixture
def model(session: Session) -> SwsDiffusionModel:
    return SwsDiffusionModel(session, intensity=1.0)


def by_hand(session: Session, sampler: Sampler) -> tuple[torch.Tensor, list[Any]]:
    """The same run with a stream for each condition: its result and the states at its end."""
    streams = [session.stream() for _ in sampler.conds]
    latent = draw(1, 4, 8, 6, seed=9) * SIGMAS[0]
    for sigma, following in itertools.pairwise(SIGMAS):
        x = latent / (sigma**2 + 1).sqrt()
        told, untold = (
            stream.step(x, 500.0, context, sigma=float(sigma), intensity=1.0)
            for stream, (_, context) in zip(streams, sampler.conds, strict=True)
        )
        latent = latent + (following - sigma) * (untold + 3.0 * (told - untold))
    return latent, [stream.state()["sws_state_d2"][0] for stream in streams]


@pytest.mark.parametrize("together", [True, False])
def test_a_run_has_the_samplers_noise_levels_and_its_own_state(
    model: SwsDiffusionModel, session: Session, together: bool
) -> None:
    sampler = Sampler(model, together)
    expected, states = by_hand(session, sampler)
    # The second run begins anew.
    for _ in range(2):
        torch.testing.assert_close(sampler.run(), expected, rtol=0, atol=1e-4)
        for key, stream in model._streams.items():
            found = stream.state()["sws_state_d2"]
            for row, number in zip(found, key[len(key) // 2 :], strict=True):
                np.testing.assert_allclose(row, states[number], rtol=0, atol=1e-6)


def test_conditions_run_apart_do_not_share_a_state(model: SwsDiffusionModel) -> None:
    sampler = Sampler(model, together=False)
    sampler.run()
    assert len(model._streams) == 2
    sampler.run()
    assert len(model._streams) == 2


def test_noise_that_rises_within_a_run_keeps_the_state(
    model: SwsDiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samplers with churn, and those that reject a step, go up again."""
    made: list[Any] = []
    stream = model.session.stream
    monkeypatch.setattr(model.session, "stream", lambda: made.append(stream()) or made[-1])
    Sampler(model).run(torch.tensor([5.0, 2.0, 2.2, 0.5]))
    assert len(made) == 1


def test_noise_that_rises_without_a_list_begins_anew(model: SwsDiffusionModel) -> None:
    sampler = Sampler(model)
    latent = draw(1, 4, 8, 6)
    first = sampler.predict(latent, torch.tensor([5.0]))
    sampler.predict(latent, torch.tensor([2.0]))
    again = sampler.predict(latent, torch.tensor([5.0]))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_each_sample_has_the_sigma_of_its_latent(session: Session) -> None:
    seen: list[Any] = []

    class Recorder:
        contract = session.contract

        def stream(self) -> Any:
            return SimpleNamespace(step=lambda x, *_, **given: seen.append(given["sigma"]) or x)

    model = SwsDiffusionModel(Recorder(), 1.0)  # type: ignore[arg-type]
    Sampler(model).predict(draw(2, 4, 8, 6), torch.tensor([5.0, 3.0]), sample_sigmas=SIGMAS)
    assert seen[0].tolist() == [5.0, 3.0, 5.0, 3.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control": {"output": []}}, "ControlNet is not in the exported graph"),
        ({"transformer_options": {}}, "transformer_options has no sigmas"),
        ({"ref_latents": draw(1)}, "has no input ref_latents"),
    ],
)
def test_what_is_refused(model: SwsDiffusionModel, change: dict[str, Any], message: str) -> None:
    given = {"context": draw(1, TOKENS, 16), "transformer_options": {"sigmas": torch.tensor([2.0])}}
    with pytest.raises(StepError, match=message):
        model(draw(1, 4, 8, 6), torch.tensor([500.0]), **(given | change))


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
    session = Session.load(sdxl_graph, threads=1)
    model = SwsDiffusionModel(session, 0.5)
    sizes = torch.tensor([[64.0, 48.0, 0.0, 0.0, 64.0, 48.0]])
    pooled, context, x = draw(1, POOLED), draw(1, TOKENS, 16), draw(1, 4, 8, 6)
    y = torch.cat([pooled, torch.from_numpy(embed_sizes(sizes[0])).reshape(1, -1)], dim=1)
    options = {"sigmas": torch.tensor([3.0])}
    found = model(x, torch.tensor([500.0]), context=context, y=y, transformer_options=options)
    expected = session.stream().step(
        x, 500.0, context, sigma=3.0, intensity=0.5, text_embeds=pooled, time_ids=sizes
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("width", "time_ids", "family"),
    [(768, None, "sd15"), (1024, None, "sd20"), (2048, 6, "sdxl"), (1280, 5, "sdxl_refiner")],
)
def test_families(width: int, time_ids: int | None, family: str) -> None:
    assert family_of(_session_of(width, time_ids)) == family


def test_a_family_that_comfyui_does_not_have(session: Session) -> None:
    with pytest.raises(StepError, match=r"the node supports text embeddings of width 768 .* found width 16"):
        family_of(session)


def _session_of(width: int, time_ids: int | None = None, channels: int = 4, **source: Any) -> Any:
    specs = [
        TensorSpec("sample", "float16", ("batch", channels, "height", "width")),
        TensorSpec("encoder_hidden_states", "float16", ("batch", "tokens", width)),
    ]
    if time_ids:
        specs.append(TensorSpec("time_ids", "float16", ("batch", time_ids)))
    manifest = {"precision": "fp16", "source": source}
    contract = SimpleNamespace(inputs=specs, path=Path("engine.plan"), manifest=manifest)
    return SimpleNamespace(contract=contract)


class FakeBaseModel:
    """What the node does with comfy.model_base's classes."""

    def __init__(self, config: Any, model_type: str) -> None:
        assert config.unet_config["disable_unet_model_creation"]
        self.config, self.model_type, self.inpaint = config, model_type, False

    def set_inpaint(self) -> None:
        self.inpaint = True


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The custom node, imported where ComfyUI's modules are stand-ins."""

    def config(name: str) -> Callable[[dict[str, Any]], Any]:
        return lambda settings: SimpleNamespace(name=name, unet_config=dict(settings))

    folders: dict[str, Any] = {}
    parts = {
        "comfy": {},
        "comfy.model_base": {
            "BaseModel": FakeBaseModel,
            "SDXL": type("SDXL", (FakeBaseModel,), {}),
            "SDXLRefiner": type("SDXLRefiner", (FakeBaseModel,), {}),
            "ModelType": SimpleNamespace(EPS="eps", V_PREDICTION="v"),
        },
        "comfy.model_management": {
            "get_torch_device": lambda: torch.device("cpu"),
            "unet_offload_device": lambda: torch.device("cpu"),
        },
        "comfy.model_patcher": {"ModelPatcher": lambda model, **_: SimpleNamespace(model=model)},
        "comfy.supported_models": {name: config(name) for name in ("SD15", "SD20", "SDXL", "SDXLRefiner")},
        "folder_paths": {
            "models_dir": str(tmp_path),
            "folder_names_and_paths": folders,
            "get_filename_list": lambda name: sorted(p.name for p in Path(folders[name][0][0]).iterdir()),
            "get_full_path_or_raise": lambda name, file: str(Path(folders[name][0][0]) / file),
        },
    }
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    spec = importlib.util.spec_from_file_location(
        "sws_comfyui_node", export_runs.ROOT / "integrations" / "comfyui" / "__init__.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_node_is_what_comfyui_lists(node: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "sws").mkdir()
    (tmp_path / "sws" / "unet.plan").touch()
    listed = node.NODE_CLASS_MAPPINGS["LoadSwsEngine"]
    assert node.NODE_DISPLAY_NAME_MAPPINGS["LoadSwsEngine"] == "Load SWS engine"
    assert (listed.CATEGORY, listed.RETURN_TYPES) == ("model_patches", ("MODEL",))
    assert callable(getattr(listed, listed.FUNCTION))
    inputs = json.loads(json.dumps(listed.INPUT_TYPES()))["required"]
    assert inputs["engine"] == [["unet.plan"]]
    assert inputs["intensity"] == ["FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01}]


@pytest.mark.parametrize(
    ("session", "expected"),
    [
        (_session_of(768), ("FakeBaseModel", "SD15", "eps", False)),
        (_session_of(768, channels=9), ("FakeBaseModel", "SD15", "eps", True)),
        (_session_of(1024, prediction_type="v_prediction"), ("FakeBaseModel", "SD20", "v", False)),
        (_session_of(2048, 6), ("SDXL", "SDXL", "eps", False)),
        (_session_of(1280, 5), ("SDXLRefiner", "SDXLRefiner", "eps", False)),
    ],
)
def test_the_node_makes_a_model_of_the_family(
    node: ModuleType, monkeypatch: pytest.MonkeyPatch, session: Any, expected: tuple[Any, ...]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(Session, "load", lambda path: opened.append(str(path)) or session)
    (patcher,) = node.LoadSwsEngine().load("unet.plan", 0.75)
    model = patcher.model
    assert opened[0].endswith("sws/unet.plan")
    assert (type(model).__name__, model.config.name, model.model_type, model.inpaint) == expected
    assert isinstance(model.diffusion_model, SwsDiffusionModel)
    assert (model.diffusion_model.intensity, model.diffusion_model.dtype) == (0.75, torch.float16)
    assert model.memory_required([2, 4, 8, 8], cond_shapes={}) == 0
