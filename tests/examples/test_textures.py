"""The textures example: its scenes, prompts, checker and training, and what its committed weights draw."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from sws_export.cli import main

from examples.textures import check, prompts, sample, scenes, train
from examples.textures.pipeline import TexturesPipeline, to_images, to_latents
from examples.textures.scenes import Scene, SceneObject
from sws_export import ExportOptions, SwsOptions, export

FOLDER = Path(sample.HERE)
SCENE = Scene(
    (
        SceneObject("red", "striped", "circle", "top-left"),
        SceneObject("blue", "plain", "cross", "bottom-left"),
    ),
    "wood",
)
# Four numbers of the embedding of SCENE: the committed weights know these vectors and no others.
EMBEDDED = [1.895702, -0.06488813, 0.7995497, 0.6490917]


@pytest.fixture(scope="module")
def pipeline() -> TexturesPipeline:
    return sample.load()


def draw(wanted: list[Scene], seed: int = 0) -> np.ndarray:
    return np.asarray(scenes.render(wanted, np.random.default_rng(seed)))


def test_rendering_is_deterministic_and_the_generator_changes_it() -> None:
    first = draw([SCENE, SCENE])
    assert first.shape == (2, 3, 64, 64)
    assert first.dtype == np.float32
    assert -1 <= first.min() < -0.5
    assert 0.5 < first.max() <= 1
    np.testing.assert_array_equal(first, draw([SCENE, SCENE]))
    assert np.abs(first[0] - first[1]).max() > 0.3


def test_checker_reads_every_word() -> None:
    """All pairs of a texture and a shape, all colours, positions and backgrounds."""
    kinds = itertools.product(scenes.TEXTURES, scenes.SHAPES)
    words = zip(kinds, itertools.cycle(scenes.COLOURS), itertools.cycle(scenes.POSITIONS), strict=False)
    objects = [SceneObject(colour, *kind, position) for kind, colour, position in words]
    grounds = [scenes.BACKGROUNDS[(number // 4 + number) % 4] for number in range(len(objects))]
    wanted = [Scene((thing,), ground) for thing, ground in zip(objects, grounds, strict=True)] * 2
    assert min(check.accuracy(wanted, draw(wanted, 1))) >= 0.9


def test_checker_rejects_what_was_not_asked_for() -> None:
    green = Scene((SceneObject("green", "striped", "circle", "top-left"),), "cloth")
    share = check.accuracy([Scene(SCENE.objects[:1], "cloth")], draw([green]))
    assert (share.position, share.colour, share.texture, share.shape) == (1, 0, 1, 1)
    assert share.exact == 0
    missing = check.accuracy([SCENE], draw([Scene(SCENE.objects[:1], "wood")]))
    assert (missing.position, missing.background, missing.exact) == (0.5, 1, 0)
    assert missing.words == pytest.approx(5 / 9)
    more = check.accuracy([Scene(SCENE.objects[:1], None)], draw([SCENE]))
    assert (more.position, more.exact) == (1, 0)
    noise = np.random.default_rng(0).uniform(-1, 1, (3, 64, 64)).astype(np.float32)
    assert check.recognise(noise) == Scene((), "unknown")


def test_adherence_is_high_for_the_own_prompt_only() -> None:
    wanted = check.random_scenes(8, 3)
    texts = [prompts.describe(scene) for scene in wanted]
    images = draw(wanted)
    own = [check.adherence(prompt, image) for prompt, image in zip(texts, images, strict=True)]
    other = [check.adherence(prompt, image) for prompt, image in zip(texts[1:], images[:-1], strict=True)]
    assert np.mean(own) > 0.8
    assert np.mean(other) < 0.3


def test_prompts_and_scenes_convert_into_each_other() -> None:
    texts = "red striped circle top-left and blue plain cross bottom-left on wood"
    assert prompts.describe(SCENE) == texts
    assert prompts.parse(texts.upper()) == SCENE
    for scene in check.random_scenes(50, 0):
        assert prompts.parse(prompts.describe(scene)) == scene
    words = prompts.embed_all([texts, ""])
    assert words.shape == (2, prompts.TOKENS, prompts.WIDTH)
    assert words.dtype == np.float32
    np.testing.assert_allclose(words[0, 1, :4], EMBEDDED, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("pink plain circle top-left", r"unknown word 'pink'; known words: and, on, red"),
        ("plain red circle top-left", r"found 'plain' where a colour is expected \(red, yellow"),
        ("red circle top-left", r"expected 'COLOUR TEXTURE SHAPE POSITION', found 'red circle top-left'"),
        ("red plain circle top-left on", r"found 'nothing' where a background is expected"),
        ("red plain circle top-left on red", r"found 'red' where a background is expected \(wood"),
        ("red plain circle top-left and blue plain cross top-left", r"two objects at 'top-left'"),
        (" and ".join(["red plain circle top-left"] * 3), r"3 objects; ask for at most 2"),
    ],
)
def test_prompt_outside_the_grammar_is_refused(prompt: str, complaint: str) -> None:
    with pytest.raises(prompts.PromptError, match=complaint):
        prompts.parse(prompt)


def test_latents_are_images() -> None:
    images = scenes.render([SCENE], np.random.default_rng(0))
    latents = to_latents(images)
    assert latents.shape == (1, 12, 32, 32)
    assert 0.5 < latents.std() < 2
    torch.testing.assert_close(to_images(latents), images)


def test_only_objects_weigh_more_in_the_loss() -> None:
    empty = scenes.render([Scene((), ground) for ground in scenes.BACKGROUNDS], np.random.default_rng(0))
    assert not train.are_coloured(to_latents(empty)).any()
    coloured = to_images(train.are_coloured(to_latents(scenes.render([SCENE], np.random.default_rng(0)))))
    x, y = (int(place) for place in scenes.POSITIONS["top-left"])
    assert (coloured[0, :, y - 4 : y + 4, x - 4 : x + 4] > 0).all()
    assert not coloured[0, :, :, 32:].any()


def test_close_ups_show_the_object_of_their_prompt() -> None:
    latents, words = train.make_batches(0, 24, torch.device("cpu"), close=True)
    assert latents.shape == (24, 12, 16, 16)
    assert words.shape == (24, prompts.TOKENS, prompts.WIDTH)
    # An object lies in the middle of its quadrant, whichever that is.
    assert (train.are_coloured(latents)[:, :, 6:10, 6:10].mean(dim=(1, 2, 3)) > 0.5).all()


def test_training_goes_on_from_earlier_weights(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    train.train(1, 2, 1e-3, tmp_path / "first", cpu, 600)
    train.train(1, 2, 1e-4, tmp_path / "second", cpu, 600, start=tmp_path / "first", first_batch=1)
    random, first, second = (
        unet.state_dict()["conv_out.weight"].float()
        for unet in (
            train.build_unet().half(),
            *(
                UNet2DConditionModel.from_pretrained(tmp_path / name / "unet", torch_dtype=torch.float16)
                for name in ("first", "second")
            ),
        )
    )
    assert 0 < (second - first).abs().max() < (first - random).abs().max()
    assert sample.load(tmp_path / "second").unet.config.sample_size == 32


def test_committed_folder_is_a_small_pipeline_directory(pipeline: TexturesPipeline) -> None:
    weights = FOLDER / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 20e6
    schedule = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text())
    assert {name: schedule[name] for name in train.NOISE} == train.NOISE
    assert {name: value.shape for name, value in train.build_unet().state_dict().items()} == {
        name: value.shape for name, value in pipeline.unet.state_dict().items()
    }


@torch.no_grad()
def test_self_attention_sits_on_two_grids_of_256_tokens_or_more(pipeline: TexturesPipeline) -> None:
    tokens: dict[str, int] = {}
    sites = {name: part for name, part in pipeline.unet.named_modules() if name.endswith("attn1")}
    hooks = [
        site.to_q.register_forward_hook(lambda _, __, out, name=name: tokens.update({name: out.shape[1]}))
        for name, site in sites.items()
    ]
    pipeline.unet(torch.zeros(1, 12, 32, 32), 500, torch.zeros(1, prompts.TOKENS, prompts.WIDTH))
    for hook in hooks:
        hook.remove()
    assert set(tokens.values()) == {1024, 256, 64}
    assert {site.inner_dim // site.heads for site in sites.values()} == {32}


@pytest.mark.slow
# diffusers 0.42 turns a tensor into an array in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_samples_obey_their_prompts(pipeline: TexturesPipeline) -> None:
    """A few of those that the README of the example has rates of."""
    wanted = check.random_scenes(4, seed=0)
    images = sample.sample(pipeline, [prompts.describe(scene) for scene in wanted], steps=12)
    share = check.accuracy(wanted, images)
    assert share.exact >= 0.8
    assert share.words >= 0.95


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_sample_draws_with_its_artefact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = tmp_path / "unet.onnx"
    sws = SwsOptions(sites=("up_blocks.2.*.attn1",))
    export(FOLDER / "unet", unet, ExportOptions(sws=sws, validate=False))
    command = ["sample", str(unet), str(FOLDER), "--trust-code", "--json", "--steps", "4"]
    command += ["--prompt", prompts.describe(SCENE), "--out", str(tmp_path / "images.png")]
    assert main(command) == 0
    effects = json.loads(capsys.readouterr().out)["effects"]
    assert [effect["difference"] > 0 for effect in effects] == [False, True, True]
