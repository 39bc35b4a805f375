"""The demo: the trained example through `sws-export sample`, and its pipeline with either UNet."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sws_export.cli import main

from examples.shapes import prompts, scenes
from examples.shapes import sample as plain
from examples.shapes.check import adherence
from examples.shapes.pipeline import ShapesPipeline
from sws_export import ExportOptions, SwsOptions, export
from sws_export.adapters.diffusers import SWSUNet
from tests import export_runs
from tests.conftest import ShapesOnnx
from tests.export_runs import error_line

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.fixture(scope="session")
def shapes_sws(tmp_path_factory: pytest.TempPathFactory, shapes_onnx: ShapesOnnx) -> Path:
    """The trained example with SWS."""
    return export_runs.shared(
        tmp_path_factory,
        "shapes_sws.onnx",
        lambda path: export(
            shapes_onnx("fp32"), path, ExportOptions(sws=SwsOptions(guard="literal"), validate=False)
        ),
    )


def test_it_draws_and_measures(
    shapes_sws: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "images.png"
    command = ["sample", str(shapes_sws), str(plain.HERE), "--trust-code", "--out", str(out), "--json"]
    command += ["--steps", "2", "--guidance", "3", "--prompt", "red circle center"]
    command += ["--seed", "2", "--seed", "3"]
    # The folder's code runs from any place.
    monkeypatch.chdir(tmp_path)
    assert main(command) == 0
    effects = json.loads(capsys.readouterr().out)["effects"]
    assert [effect["intensity"] for effect in effects] == [0.0, 0.5, 1.0]
    difference = [effect["difference"] for effect in effects]
    assert 0 == difference[0] < difference[1] < difference[2]
    assert all(effect["sharpness"] > 0 and effect["step_change"] > 0 for effect in effects)
    # Two seeds, each with three images and the change, of 96 by 96 pixels.
    with Image.open(out) as image:
        assert image.width > 8 * 96
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 100


def test_its_checker_measures_adherence(
    shapes_sws: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "results"
    file.write_text("red circle center\n")
    command = ["evaluate", str(shapes_sws), str(plain.HERE), "--prompts", str(file), "--seeds", "1"]
    assert main([*command, "--steps", "4", "--out", str(out), "--trust-code"]) == 0
    assert "Prompt adherence" in capsys.readouterr().err
    metrics = json.loads((out / "evaluation.json").read_text())["metrics"]
    assert metrics["check"]["values"][0]["value"] == 1.0
    # One pair has no interval.
    assert metrics["check"]["values"][0]["low"] is None


def test_adherence_is_the_share_of_the_objects() -> None:
    scene = prompts.parse("red circle left and blue cross top")
    image = scenes.render(scene)
    assert adherence("red circle left and blue cross top", image) == 1.0
    assert adherence("red circle left", image) == 0.5
    assert adherence("red circle left and blue square top", image) == pytest.approx(1 / 3)
    assert adherence("", image) == 0.0
    assert adherence("", scenes.render(())) == 1.0


def test_the_metrics_are_printed(
    shapes_sws: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", str(shapes_sws), str(plain.HERE), "--trust-code", "--out", str(tmp_path / "x.png")]
    command += ["--steps", "2", "--prompt", "red circle center", "--intensity", "0", "--intensity", "1"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"^0 +0\.0000 +0\.\d{4} +\d\.\d{4}", err, re.MULTILINE)
    assert re.search(r"^1 +0\.\d{4} +0\.\d{4} +\d\.\d{4}", err, re.MULTILINE)


@pytest.fixture
def pipe() -> ShapesPipeline:
    pipe = ShapesPipeline.from_pretrained(plain.HERE, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_intensity_zero_is_the_trained_model(shapes_sws: Path, pipe: ShapesPipeline) -> None:
    """The same pipeline with the torch UNet gives the same images, and another with SWS."""

    def draw(**arguments: object) -> object:
        generator = torch.Generator().manual_seed(4)
        return pipe(
            "red circle center", num_inference_steps=5, generator=generator, output_type="np", **arguments
        ).images

    config = dict(pipe.unet.config)
    expected = draw()
    SWSUNet.load(shapes_sws, config=config).attach(pipe)
    np.testing.assert_allclose(draw(cross_attention_kwargs={"intensity": 0.0}), expected, rtol=0, atol=1e-4)
    shuffled = draw(cross_attention_kwargs={"intensity": 1.0})
    assert np.abs(np.asarray(shuffled) - np.asarray(expected)).max() > 2e-3


def test_the_pipeline_is_the_plain_sampler(pipe: ShapesPipeline) -> None:
    expected = plain.sample(plain.load_unet(), ["blue cross top"], steps=3, seed=4)
    found = pipe(
        "blue cross top",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(4000),
        output_type="np",
    ).images
    np.testing.assert_allclose(found.transpose(0, 3, 1, 2) * 2 - 1, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "trust", "message"),
    [
        (
            "red circle left",
            False,
            "is a ShapesPipeline, which is defined in its pipeline.py; add --trust-code",
        ),
        (
            "purple circle left",
            True,
            "the pipeline rejects the options: prompt 'purple circle left': unknown word 'purple'",
        ),
    ],
)
def test_errors_are_one_line(
    shapes_sws: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prompt: str,
    trust: bool,
    message: str,
) -> None:
    command = ["sample", str(shapes_sws), str(plain.HERE), "--out", str(tmp_path / "x.png")]
    command += ["--prompt", prompt, *(["--trust-code"] if trust else [])]
    assert main(command) == 1
    assert message in error_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
