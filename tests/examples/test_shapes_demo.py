"""The demo: one command, one sheet of pictures, figures that say what SWS did."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from examples.shapes import prompts
from examples.shapes import sample as plain
from sws_export import ExportOptions, export
from sws_export.runtime import Session
from sws_export.runtime.sampling import sample
from tests import road
from tests.conftest import ShapesOnnx


@pytest.fixture(scope="session")
def shapes_sws(tmp_path_factory: pytest.TempPathFactory, shapes_onnx: ShapesOnnx) -> Path:
    """The trained example with SWS."""
    return road.shared(
        tmp_path_factory,
        "shapes_sws.onnx",
        lambda path: export(shapes_onnx("fp32"), path, ExportOptions(validate=False)),
    )


def run_demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.shapes.demo", *map(str, arguments)],
        cwd=road.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_draws_and_measures(shapes_sws: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures.png"
    done = run_demo(shapes_sws, "--out", out, "--steps", 4, "--prompt", "red circle center")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(out)]
    table = [[float(number) for number in line.split()] for line in done.stderr.splitlines()[-3:]]
    intensity, difference, sharpness, change = np.array(table).T
    assert list(intensity) == [0.0, 0.5, 1.0]
    assert 0 == difference[0] < difference[1] < difference[2]
    assert (sharpness > 0).all()
    assert (change > 0).all()
    # Two seeds, each with three pictures and the change, of 96 by 96 pixels.
    with Image.open(out) as image:
        assert image.width > 8 * 96
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 100


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_intensity_zero_is_the_trained_model(shapes_sws: Path) -> None:
    """The same sampler with the torch UNet gives the same pictures."""
    wanted = ["red circle center", "blue cross top and white square bottom"]
    expected = plain.sample(plain.load_unet(), wanted, steps=5, guidance=3.0, seed=4)
    noise = [torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(4000 + i)) for i in range(2)]
    found = sample(
        Session.load(shapes_sws),
        EulerDiscreteScheduler.from_pretrained(plain.HERE, subfolder="scheduler"),
        torch.stack(noise).numpy(),
        prompts.embed_all(wanted),
        prompts.embed(""),
        intensity=0.0,
        steps=5,
        guidance=3.0,
    )
    np.testing.assert_allclose(found.pictures.clip(-1, 1), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.onnx"], "demo: missing.onnx: no such file"),
        (
            ["{graph}", "--prompt", "purple circle left"],
            "demo: prompt 'purple circle left': unknown word 'purple'",
        ),
    ],
)
def test_errors_are_one_line(shapes_sws: Path, arguments: list[str], message: str) -> None:
    done = run_demo(*[argument.format(graph=shapes_sws) for argument in arguments])
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr
