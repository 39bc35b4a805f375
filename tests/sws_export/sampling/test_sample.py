"""A pipeline directory sampled with and without SWS."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
)
from PIL import Image
from sws_export.cli import main

from sws_export.errors import CheckpointError, OptionError
from sws_export.sampling.effects import Sampled, measure
from sws_export.sampling.predicted_image import recorded_steps
from sws_export.sampling.sample import SampleOptions, comparison_sheet, sample_images, sample_pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


OPTIONS = SampleOptions(prompts=("a cat", ""), seeds=(1, 2), steps=3, height=16, width=16)


def test_images_and_effect(sws_graph: Path, pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    effects = sample_pipeline(sws_graph, pipeline, out, OPTIONS)
    assert [effect.intensity for effect in effects] == [0.0, 0.5, 1.0]
    assert effects[0].difference == 0 < effects[1].difference < effects[2].difference
    assert all(effect.sharpness > 0 and effect.step_change > 0 for effect in effects)
    with Image.open(out) as sheet:
        assert sheet.height > 2 * 16


def test_a_scheduler_whose_predicted_image_is_unknown(
    sws_graph: Path, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The images are drawn, and a warning states that the step-to-step change is not measured."""
    copy = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    (copy / "model_index.json").write_text(json.dumps(index))
    config = copy / "scheduler" / "scheduler_config.json"
    own = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "_class_name": index["scheduler"][1],
    }
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    sheet = tmp_path / "sheet.png"
    arguments = [str(sws_graph), str(copy), "--out", str(sheet), "--prompt", "a cat", "--intensity", "1"]
    assert main(["sample", *arguments, "--steps", "2", "--height", "16", "--width", "16", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["effects"][0]["step_change"] is None
    assert "found 'flow_prediction'; the step-to-step change is not measured" in printed.err
    assert sheet.exists()


def test_another_artefact_beside_it(sws_graph: Path, pipeline: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(
        OPTIONS, prompts=("a cat",), seeds=(1,), intensities=(0.0,), beside=(sws_graph,)
    )
    effects = sample_pipeline(sws_graph, pipeline, tmp_path / "sheet.png", options)
    assert [(effect.artefact, effect.difference) for effect in effects] == 2 * [(sws_graph.name, 0.0)]


def test_every_image_begins_from_an_empty_state(node_graph: Path, pipeline: Path) -> None:
    """Of the node's, too, whose state is persistent: one image twice is the same image."""
    runs = sample_images(node_graph, pipeline, dataclasses.replace(OPTIONS, intensities=(1.0, 0.0, 1.0)))
    np.testing.assert_array_equal(runs[0].images, runs[2].images)
    assert (runs[0].images != runs[1].images).any()
    # Its intensity 0 is not the plain UNet.
    assert [run.label for run in runs] == ["SWS 1", "SWS 0", "SWS 1"]


def test_plain_images_are_the_pipelines_own(sws_graph: Path, pipeline: Path) -> None:
    plain = sample_images(sws_graph, pipeline, dataclasses.replace(OPTIONS, intensities=(0.0,)))[0]
    assert plain.label == "plain"
    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    images, changes = [], []
    for prompt, seed in itertools.product(OPTIONS.prompts, OPTIONS.seeds):
        with recorded_steps(pipe.scheduler) as record:
            done = pipe(
                prompt,
                num_inference_steps=3,
                guidance_scale=5.0,
                height=16,
                width=16,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            )
        images.append(done.images[0])
        changes.append(np.concatenate(record.changes))
    assert plain.changes is not None
    np.testing.assert_allclose(
        plain.images.transpose(0, 2, 3, 1) / 2 + 0.5, np.stack(images), rtol=0, atol=1e-4
    )
    np.testing.assert_allclose(plain.changes, np.stack(changes, axis=1), rtol=1e-3)


def test_the_change_is_enlarged(tmp_path: Path) -> None:
    grey, brighter = np.zeros((1, 3, 8, 8), np.float32), np.full((1, 3, 8, 8), 0.01, np.float32)
    runs = [Sampled(0.0, grey, np.zeros((1, 1))), Sampled(1.0, brighter, np.zeros((1, 1)))]  # type: ignore[arg-type]
    sheet = comparison_sheet(runs, [measure(run, runs[0]) for run in runs], ["x"], [3], steps=2)
    # 0.01 in [-1, 1], 80 times: 0.8, which is 230 of 255; each pixel of the small image 12 by 12.
    counts = {colour: count for count, colour in sheet.getcolors(1 << 20) or []}
    assert counts[(230, 230, 230)] == 64 * 12 * 12


def test_what_is_no_pipeline(sws_graph: Path, random_unet: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a diffusers pipeline: model_index\.json is missing"):
        sample_pipeline(sws_graph, random_unet, tmp_path / "x.png", OPTIONS)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", r"model_index\.json is not valid JSON"),
        ('{"_class_name": ["x"]}', r"model_index\.json: _class_name: expected a string, found \[\"x\"\]"),
        ('{"_class_name": "logging"}', "logging of diffusers is not a pipeline"),
        ("{}", "does not name the class of the pipeline"),
        ('{"_class_name": "NoSuchPipeline"}', "has no pipeline NoSuchPipeline"),
    ],
)
def test_pipelines_of_no_known_class(sws_graph: Path, tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        sample_pipeline(sws_graph, tmp_path, tmp_path / "x.png", OPTIONS)


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (
            ["os", "system"],
            r"scheduler is a system of os, which diffusers .* and transformers .* do not have",
        ),
        (["diffusers", "NoSuchScheduler"], r"scheduler is a NoSuchScheduler of diffusers, which diffusers"),
        (["diffusers"], r'scheduler: expected \[library, class\], found \["diffusers"\]'),
        ([3, "x"], r"scheduler: expected \[library, class\], found \[3"),
    ],
)
def test_components_of_no_known_class(
    sws_graph: Path, pipeline: Path, tmp_path: Path, component: list[Any], message: str
) -> None:
    copy = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": component}))
    with pytest.raises(CheckpointError, match=rf"model_index\.json: {message}"):
        sample_pipeline(sws_graph, copy, tmp_path / "x.png", OPTIONS)


def test_components_in_pickles_are_refused(sws_graph: Path, pipeline: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    pickle = weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"model\.bin is a pickle, and loading a pickle executes"):
        sample_pipeline(sws_graph, copy, tmp_path / "x.png", OPTIONS)
    pickle.rename(weights)
    (copy / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL", "latent_channels": "many"}')
    with pytest.raises(CheckpointError, match="diffusers cannot load the pipeline"):
        sample_pipeline(sws_graph, copy, tmp_path / "x.png", OPTIONS)


def test_code_of_a_pipeline_runs_where_it_is_trusted_alone(sws_graph: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "OwnPipeline"}')
    (tmp_path / "pipeline.py").write_text("raise RuntimeError('it ran')")
    with pytest.raises(
        OptionError, match=r"is a OwnPipeline, which is defined in its pipeline\.py; add --trust"
    ):
        sample_pipeline(sws_graph, tmp_path, tmp_path / "x.png", OPTIONS)
    with pytest.raises(RuntimeError, match="it ran"):
        sample_pipeline(
            sws_graph, tmp_path, tmp_path / "x.png", dataclasses.replace(OPTIONS, trust_code=True)
        )


def test_what_the_pipeline_refuses(sws_graph: Path, pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match="the pipeline rejects the options: `height` and `width` have to be divisible by 8"
    ):
        sample_pipeline(sws_graph, pipeline, tmp_path / "x.png", dataclasses.replace(OPTIONS, height=20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ()}, "at least one of prompts"),
        ({"intensities": (0.0, 1.5)}, "intensity 1.5 is out of range"),
        ({"steps": 0}, "steps 0 is out of range"),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SampleOptions(**({"prompts": ("a",)} | change))
