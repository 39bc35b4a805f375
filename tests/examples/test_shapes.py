import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.shapes import check, entropy, prompts, sample, scenes, train
from graph_passes.weight_formats import WEIGHT_FORMATS
from sws_export import ExportOptions, QuantizationOptions, SourceOptions, SwsOptions, export

FOLDER = Path(sample.HERE)
WEIGHTS = FOLDER / "unet" / "diffusion_pytorch_model.safetensors"
SCENE = (scenes.SceneObject("red", "circle", "left"), scenes.SceneObject("blue", "cross", "top-right"))
# Four numbers of prompts.embed("red circle left"): the committed weights know these vectors and no others.
EMBEDDED = [1.4217367, 0.7877048, 1.0823854, -0.7941191]


@pytest.fixture(scope="module")
def unet() -> Any:
    return sample.load_unet()


def test_rendering_is_deterministic_and_jitter_changes_it() -> None:
    still = scenes.render(SCENE)
    assert still.shape == (3, 32, 32)
    assert still.dtype == np.float32
    np.testing.assert_array_equal(still, scenes.render(SCENE))
    moved = scenes.render(SCENE, np.random.default_rng(5))
    np.testing.assert_array_equal(moved, scenes.render(SCENE, np.random.default_rng(5)))
    assert np.abs(moved - still).max() > 0.1


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_edges_are_anti_aliased_and_the_area_is_right(shape: str) -> None:
    radius = scenes.RADIUS
    arm = 0.32 * radius
    height = 1.9 * radius
    area = {
        "circle": math.pi * radius**2,
        "square": (1.7 * radius) ** 2,
        "triangle": height * height / 2,
        "cross": 2 * (2 * radius) * (2 * arm) - (2 * arm) ** 2,
    }[shape]
    cover = scenes.coverage(shape, 16.0, 16.0, radius)
    assert cover.sum() == pytest.approx(area, rel=0.05)
    assert ((cover > 0.0) & (cover < 1.0)).sum() >= 8


def test_objects_are_drawn_as_the_prompt_says() -> None:
    for colour, rgb in scenes.COLOURS.items():
        for shape in scenes.SHAPES:
            for position, (x, y) in scenes.POSITIONS.items():
                scene = prompts.parse(f"{colour} {shape} {position}")
                image = scenes.render(scene)
                np.testing.assert_allclose(image[:, int(y), int(x)], rgb, atol=1e-6)
                assert check.recognise(image) == frozenset(scene)


def test_recogniser_reads_jittered_noisy_scenes_and_rejects_wrong_ones() -> None:
    rng = np.random.default_rng(3)
    drawn = [scenes.random_scene(rng) for _ in range(60)]
    noise = 0.1 * rng.standard_normal((60, 3, 32, 32)).astype(np.float32)
    images = np.stack([scenes.render(scene, rng) for scene in drawn]) + noise
    assert check.accuracy(drawn, images) == check.Accuracy(1.0, 1.0, 1.0, 1.0)
    green_square = scenes.render(prompts.parse("green square left"))[None]
    assert check.accuracy([SCENE[:1]], green_square) == check.Accuracy(1.0, 0.0, 0.0, 0.0)
    assert check.accuracy([SCENE], green_square) == check.Accuracy(0.5, 0.0, 0.0, 0.0)


def test_prompts_and_scenes_convert_into_each_other() -> None:
    assert prompts.describe(SCENE) == "red circle left and blue cross top-right"
    assert prompts.parse("Red circle LEFT and blue cross top-right") == SCENE
    rng = np.random.default_rng(0)
    for scene in (scenes.random_scene(rng) for _ in range(50)):
        assert prompts.parse(prompts.describe(scene)) == scene


def test_embedding_is_fixed_and_separates_prompts() -> None:
    texts = ["", "red circle left", "red circle right", "red circle left and blue cross top"]
    words = prompts.embed_all(texts)
    assert words.shape == (4, prompts.TOKENS, prompts.WIDTH)
    assert words.dtype == np.float32
    np.testing.assert_array_equal(words[1], prompts.embed("red circle left"))
    np.testing.assert_allclose(words[1, 1, :4], EMBEDDED, rtol=0, atol=1e-6)
    for first in range(4):
        for second in range(first):
            assert np.abs(words[first] - words[second]).max() > 0.5


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("pink circle left", r"unknown word 'pink'; known words: and, red"),
        ("circle red left", r"found 'circle' where a colour is expected \(red, green"),
        ("red circle", r"expected 'COLOUR SHAPE POSITION', found 'red circle'"),
        ("red circle left and", r"expected 'COLOUR SHAPE POSITION', found 'nothing'"),
        ("red circle left and blue cross left", r"two objects at 'left'"),
        ("red circle left and red circle top and red circle right", r"3 objects; ask for at most 2"),
        ("<pad>", r"unknown word '<pad>'"),
    ],
)
def test_prompt_outside_the_grammar_is_refused(prompt: str, complaint: str) -> None:
    with pytest.raises(prompts.PromptError, match=complaint):
        prompts.embed(prompt)


def test_committed_folder_is_a_small_pipeline_directory(unet: Any) -> None:
    assert WEIGHTS.stat().st_size + (FOLDER / "unet" / "config.json").stat().st_size <= 12e6
    assert 2e6 <= sum(parameter.numel() for parameter in unet.parameters()) <= 5e6
    schedule = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text())
    assert {name: schedule[name] for name in train.NOISE} == train.NOISE
    built = train.build_unet()
    assert {name: value.shape for name, value in built.state_dict().items()} == {
        name: value.shape for name, value in unet.state_dict().items()
    }


@torch.no_grad()
def test_attention_sits_on_two_grids_with_heads_of_32(unet: Any) -> None:
    tokens: dict[str, int] = {}
    sites = {name: module for name, module in unet.named_modules() if name.endswith("attn1")}
    hooks = [
        site.to_q.register_forward_hook(lambda _, __, out, name=name: tokens.update({name: out.shape[1]}))
        for name, site in sites.items()
    ]
    unet(torch.zeros(1, 3, 32, 32), 500, torch.zeros(1, prompts.TOKENS, prompts.WIDTH))
    for hook in hooks:
        hook.remove()
    assert sorted(tokens.values()) == [64, 64, 64, 64, 256, 256, 256]
    assert {site.inner_dim // site.heads for site in sites.values()} == {32}
    assert {name.replace("attn1", "attn2") for name in sites} <= dict(unet.named_modules()).keys()


def test_entropy_is_one_where_attention_is_flat_and_recorder_is_transparent(unet: Any) -> None:
    flat = entropy.with_random_weights(unet)
    words = torch.from_numpy(prompts.embed_all(["red circle left"]))
    image = torch.from_numpy(scenes.render(SCENE)[None])
    with torch.no_grad():
        plain = flat(image, 500, words).sample
        recorders = entropy.record_self_attention(flat)
        recorded = flat(image, 500, words).sample
        for name, module in flat.named_modules():
            if name in recorders:
                recorders[name].take()
                module.to_q.weight.zero_()
        flat(image, 500, words)
    torch.testing.assert_close(recorded, plain, rtol=1e-4, atol=1e-5)
    for recorder in recorders.values():
        torch.testing.assert_close(recorder.take(), torch.ones(heads_of(recorder, flat)))


def heads_of(recorder: entropy.EntropyRecorder, unet: Any) -> int:
    sites = (module for module in unet.modules() if getattr(module, "processor", None) is recorder)
    return int(next(sites).heads)


def test_trained_attention_is_peaked_where_random_attention_is_flat(unet: Any) -> None:
    before = unet.attn_processors
    trained = entropy.self_attention_entropy(unet)
    assert unet.attn_processors == before
    random = entropy.self_attention_entropy(entropy.with_random_weights(unet))
    assert len(trained) == 7
    assert max(trained.values()) < 0.65
    assert min(random.values()) > 0.95


# diffusers 0.42 turns a tensor into an array in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_samples_obey_their_prompts(unet: Any) -> None:
    wanted = check.random_scenes(5, seed=11)
    texts = [prompts.describe(scene) for scene in wanted]
    images = sample.sample(unet, texts, steps=12)
    share = check.accuracy(wanted, images)
    assert min(share.position, share.colour) >= 0.9
    assert share.shape >= 0.8
    one = sample.sample(unet, texts[:1], steps=12)
    np.testing.assert_allclose(one[0], images[0], atol=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("field", ["weights", "activations", "calibrated"])
@pytest.mark.parametrize("kind", WEIGHT_FORMATS)
def test_samples_of_8_bit_graphs_obey_their_prompts(kind: str, field: str, tmp_path: Path) -> None:
    """Activations are calibrated over the trajectory of the validation, and over the example's pipeline."""
    quantization: dict[str, Any] = {field: kind}
    if field == "calibrated":
        (tmp_path / "prompts.txt").write_text("red circle left\nblue cross top and green square right\n")
        quantization = {"activations": kind, "calibration": sample.HERE, "trust_code": True}
        quantization["prompts"] = tmp_path / "prompts.txt"
    options = ExportOptions(
        source=SourceOptions(precision="fp16"),
        sws=SwsOptions(sites=("mid*attn1",), guard="literal"),
        quantization=QuantizationOptions(**quantization),
        validate=False,
    )
    export(sample.HERE / "unet", tmp_path / "unet.onnx", options)
    wanted = check.random_scenes(8, seed=11)
    texts = [prompts.describe(scene) for scene in wanted]
    images = sample.sample(check.load_artefact(tmp_path / "unet.onnx"), texts, steps=12)
    share = check.accuracy(wanted, images)
    assert min(share.position, share.colour) >= 0.9
    assert share.shape >= 0.8


def test_grid_shows_each_image_in_its_cell() -> None:
    images = np.stack([scenes.render(SCENE[:1]), scenes.render(SCENE[1:]), scenes.render(())])
    image = sample.to_grid(images, columns=2, scale=2)
    assert image.size == (2 * 67, 2 * 67)
    x, y = scenes.POSITIONS["top-right"]
    assert image.getpixel((int(2 * (34 + x)), int(2 * (1 + y)))) == (25, 51, 242)


@pytest.mark.slow
def test_interrupted_training_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path) -> None:
        train.train(3, 2, 1e-3, folder, every=1, sharpen_from=1)

    def interrupted(state: dict[str, Any], file: Path) -> None:
        if state["step"] == 2:
            raise KeyboardInterrupt
        save(state, file)

    run(tmp_path / "whole")
    save = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "halves")
    run(tmp_path / "halves")
    files = [tmp_path / name / "unet" / WEIGHTS.name for name in ("whole", "halves")]
    assert files[0].read_bytes() == files[1].read_bytes()
