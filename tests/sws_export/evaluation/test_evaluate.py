"""A pipeline with text encoder and VAE, evaluated by the command."""

import dataclasses
import functools
import gc
import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from sws_export.cli import main

from sws_export.errors import CheckpointError, OptionError, SwsExportError
from sws_export.evaluation.adherence import check_clip, clip_scorer
from sws_export.evaluation.evaluate import evaluate
from sws_export.evaluation.options import EvaluationOptions, Pair
from sws_export.evaluation.pairs import FRAME_ANGLE, PairImages, PairStore, basis_of, walk
from sws_export.runtime.contract import read_contract
from sws_export.sampling.draw import Drawing
from tests.export_runs import error_line, shared
from tests.sws_export.conftest import text_parts

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STEPS = 2


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of random weights."""

    def make(path: Path) -> None:
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

        torch.manual_seed(3)
        tokenizer, encoder = text_parts(path.with_name("clip_words"))
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPConfig(
            text_config=encoder.config.to_dict(),
            vision_config=small | {"image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
        CLIPModel(config).save_pretrained(path)
        images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        CLIPProcessor(images, tokenizer).save_pretrained(path)

    return shared(tmp_path_factory, "clip", make)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\na dog\n")
    return file


@pytest.fixture
def command(sws_graph: Path, pipeline: Path, prompts: Path, tmp_path: Path) -> list[str]:
    return [
        *("evaluate", str(sws_graph), str(pipeline), "--prompts", str(prompts), "--seeds", "1"),
        *("--steps", str(STEPS), "--height", "16", "--width", "16", "--out", str(tmp_path / "results")),
    ]


def drawn(log: str) -> list[str]:
    """Prompts of the pairs that a run has drawn, from its log."""
    return re.findall(r"pair \d of \d, [\d.]+ s: (.+), seed 0", log)


def test_it_measures(
    command: list[str], clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--frames", "2", "--clip", str(clip), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    results = tmp_path / "results"
    assert printed["files"] == [str(results / "evaluation.json"), str(results / "evaluation.html")]
    assert json.loads((results / "evaluation.json").read_text()).items() <= printed.items()
    assert (printed["pairs"], printed["intensities"]) == (2, [0, 0.25, 0.5, 0.75, 1])
    metrics = printed["metrics"]
    assert metrics.keys() == {
        *("laplacian_variance", "gradient_energy", "structure", "difference", "step_change", "flicker"),
        "clip_score",
    }
    for metric in metrics.values():
        assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in metric["values"])
        assert all(figure["pairs"] == 2 for figure in metric["values"])
        if metric["comparison"] != "none":
            assert metric["changes"][0]["value"] == 0
            assert metric["changes"][-1]["value"] != 0
    # SWS moves the images the more the stronger it is, and leaves the layout.
    moved = [figure["value"] for figure in metrics["difference"]["values"]]
    assert 0 == moved[0] < moved[1] < moved[2] < moved[4]
    assert metrics["structure"]["values"][0]["value"] == pytest.approx(1.0)
    assert metrics["flicker"]["values"][0]["value"] > 0
    assert [len(printed["step_changes"]), len(printed["step_changes"][0])] == [5, STEPS - 1]
    page = (results / "evaluation.html").read_text()
    assert set(re.findall(r'(?:src|href)="([^"]{0,22})', page)) == {"data:image/png;base64,"}
    assert page.count("<img") == 2 * 6
    assert not re.search(r"\b(nan|unknown)\b", page)


def test_an_interrupted_run_continues(
    command: list[str],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        draw = StableDiffusionPipeline.__call__

        @functools.wraps(draw)
        def interrupted(pipe: Any, prompt: str, **named: Any) -> Any:
            if prompt == "a dog":
                raise KeyboardInterrupt
            return draw(pipe, prompt, **named)

        patch.setattr(StableDiffusionPipeline, "__call__", interrupted)
        assert main(command) == 1
    line = error_line(capsys.readouterr().err)
    assert line == "interrupted; 1 of 2 pairs are finished: the same command continues"
    assert not (tmp_path / "results" / "evaluation.json").exists()
    assert main(command) == 0
    log = capsys.readouterr().err
    assert drawn(log) == ["a dog"]
    assert "1 of 2 pairs are read back" in log
    first = (tmp_path / "results" / "evaluation.json").read_bytes()
    # Nothing is left to draw, and a damaged file is drawn again.
    assert main(command) == 0
    assert drawn(capsys.readouterr().err) == []
    damaged = sorted((tmp_path / "results" / "pairs").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert main(command) == 0
    assert len(drawn(capsys.readouterr().err)) == 1
    assert (tmp_path / "results" / "evaluation.json").read_bytes() == first
    prompts.write_text("a cat\na cow\n")
    assert main(command) == 0
    assert drawn(capsys.readouterr().err) == ["a cow"]


def test_images_of_other_runs_are_not_mixed_in(
    sws_graph: Path, text_graph: Path, pipeline: Path, tmp_path: Path
) -> None:
    options = EvaluationOptions(prompts=("a cat",), drawing=Drawing(steps=STEPS))
    contract, (pair,) = read_contract(sws_graph), options.pairs
    images = PairImages(np.zeros((5, 1, 4, 4, 3), np.uint8), np.zeros((5, STEPS - 1), np.float32))
    store = PairStore(tmp_path / "pairs", basis_of(contract, pipeline, options))
    store.save(pair, images)
    assert store.load(pair) is not None
    assert store.load(Pair("a cat", 1)) is store.load(Pair("a cow", 0)) is None
    copy = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    index = copy / "scheduler" / "scheduler_config.json"
    again = basis_of(contract, pipeline, options)
    assert PairStore(tmp_path / "pairs", again).load(pair) is not None
    index.write_text(index.read_text().replace("scaled_linear", "linear"))
    for basis in (
        basis_of(read_contract(text_graph), pipeline, options),
        basis_of(contract, copy, options),
        basis_of(contract, pipeline, dataclasses.replace(options, frames=2)),
        basis_of(contract, pipeline, dataclasses.replace(options, drawing=Drawing(steps=STEPS + 1))),
    ):
        assert PairStore(tmp_path / "pairs", basis).load(pair) is None


def test_the_pipeline_is_released_before_clip_is_loaded(
    command: list[str], clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is that of `sample`, or of CLIP."""
    from transformers import CLIPModel

    pipelines: list[Any] = []
    create, load = StableDiffusionPipeline.__init__, CLIPModel.from_pretrained

    @functools.wraps(create)
    def created(pipe: Any, *arguments: Any, **named: Any) -> None:
        pipelines.append(weakref.ref(pipe))
        create(pipe, *arguments, **named)

    def loading(*arguments: Any, **named: Any) -> Any:
        gc.collect()
        assert [reference() for reference in pipelines] == [None]
        return load(*arguments, **named)

    monkeypatch.setattr(StableDiffusionPipeline, "__init__", created)
    monkeypatch.setattr(CLIPModel, "from_pretrained", loading)
    assert main([*command, "--clip", str(clip), "--quiet"]) == 0


@pytest.mark.parametrize("seed", [0, 7])
def test_frames_rotate_the_noise(seed: int) -> None:
    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(seed))
    for frame in (0, 1, 8):
        moved = walk(noise, seed, frame)
        cosine = float((noise * moved).sum() / noise.norm() / moved.norm())
        # The other noise is perpendicular up to 1 / sqrt(16384).
        assert cosine == pytest.approx(np.cos(FRAME_ANGLE * frame), abs=0.02)
        assert float(moved.std()) == pytest.approx(1.0, abs=0.02)


def test_the_clip_score_is_the_cosine(clip: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    score = clip_scorer(clip)
    random = np.random.default_rng(0)
    images = [random.random((16, 16, 3)).astype(np.float32) for _ in range(3)]
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    for image in images:
        pixels = (image * 255).round().astype(np.uint8)
        inputs = processor(text=["a cat"], images=[pixels], return_tensors="pt")
        expected = float((model(**inputs).logits_per_image / model.logit_scale.exp()).detach())
        assert score("a cat", image) == pytest.approx(100 * max(expected, 0.0), abs=1e-3)
    assert score("a cat " * 50, images[0]) >= 0.0


def test_what_is_no_clip_model(pipeline: Path, random_unet: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--clip .*config\.json is missing; give the directory of a"):
        check_clip(pipeline)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="expected a model of type clip, found bert"):
        check_clip(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        clip_scorer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ()}, "nothing to evaluate: give at least one prompt"),
        ({"prompts": ("a", "b", "a")}, "--prompts: 'a' is there more than once"),
        ({"seeds": 0}, "--seeds 0 is out of range; at least 1 is needed"),
        ({"frames": 0}, "--frames 0 is out of range; at least 1 is needed"),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        EvaluationOptions(**({"prompts": ("a",)} | change))


def test_what_cannot_be_evaluated(
    traced: Path, sws_graph: Path, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EvaluationOptions(prompts=("a",), frames=2)
    with pytest.raises(OptionError, match="was exported without SWS: there is nothing to evaluate"):
        evaluate(traced, pipeline, tmp_path / "results", options)
    with pytest.raises(SwsExportError, match=r"cannot write .*results"):
        evaluate(sws_graph, pipeline, tmp_path / "missing" / "results", options)

    with pytest.raises(CheckpointError, match=r"is not a diffusers pipeline: model_index\.json is missing"):
        evaluate(sws_graph, traced.parent, tmp_path / "results", options)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", lambda *_: None)
    with pytest.raises(OptionError, match="StableDiffusionPipeline has no argument latents"):
        evaluate(sws_graph, pipeline, tmp_path / "results", options)
    assert not (tmp_path / "results").exists()
