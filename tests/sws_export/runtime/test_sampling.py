"""Sampling with a session, its figures, and the sheet of pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image

from sws_export.errors import OutputError
from sws_export.runtime import Session
from sws_export.runtime.picture_grid import draw_grid, save_picture, to_image
from sws_export.runtime.sampling import Floats, Sampled, measure, sample, seeded_noise, sharpness

# Of diffusers' schedulers, with numpy 2 and torch.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

STEPS, GUIDANCE = 3, 2.0
TEXTS = np.random.default_rng(1).standard_normal((3, 5, 16)).astype(np.float32)


def run(session: Session, noise: Floats, intensity: float) -> Sampled:
    return sample(
        session,
        EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        noise,
        TEXTS[: len(noise)],
        TEXTS[2],
        intensity=intensity,
        steps=STEPS,
        guidance=GUIDANCE,
    )


@torch.no_grad()
def sampled_by_torch(folder: Path, noise: Floats) -> Floats:
    """Plain guidance with the UNet itself, one prompt at a time."""
    unet = UNet2DConditionModel.from_pretrained(folder).eval()
    pictures = []
    for start, text in zip(torch.from_numpy(noise), torch.from_numpy(TEXTS), strict=False):
        scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear")
        scheduler.set_timesteps(STEPS)
        latent = start[None] * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latent, timestep)
            told, untold = (
                unet(scaled, timestep, words[None]).sample for words in (text, torch.from_numpy(TEXTS[2]))
            )
            latent = scheduler.step(untold + GUIDANCE * (told - untold), timestep, latent).prev_sample
        pictures.append(latent[0].numpy())
    return np.stack(pictures)


def test_intensity_zero_is_plain_sampling(sws_graph: Path, random_unet: Path) -> None:
    noise = seeded_noise([1, 2], (4, 8, 8))
    session = Session.load(sws_graph)
    found = run(session, noise, 0.0)
    expected = sampled_by_torch(random_unet, noise)
    np.testing.assert_allclose(found.pictures, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert found.changes.shape == (STEPS - 1, 2)
    # A session that has a history begins anew.
    assert np.array_equal(run(session, noise, 0.0).pictures, found.pictures)
    shuffled = run(session, noise, 1.0)
    assert not np.array_equal(shuffled.pictures, found.pictures)
    assert np.array_equal(run(session, noise, 1.0).pictures, shuffled.pictures)


def test_noise_depends_on_the_seed_alone() -> None:
    one, other = seeded_noise([5, 6, 7], (1, 2, 2)), seeded_noise([7], (1, 2, 2))
    assert np.array_equal(one[2], other[0])
    assert not np.array_equal(one[0], one[1])


def test_what_is_measured() -> None:
    plain = Sampled(0.0, np.zeros((2, 1, 4, 4), np.float32), np.zeros((1, 2), np.float32))
    moved = np.zeros((2, 1, 4, 4), np.float32)
    moved[0] = 0.5
    effect = measure(Sampled(0.7, moved, np.full((1, 2), 0.25, np.float32)), plain)
    assert (effect.intensity, effect.difference, effect.sharpness, effect.step_change) == (
        0.7,
        0.25,
        0.0,
        0.25,
    )


def test_sharpness_of_a_ramp_is_its_slope() -> None:
    ramp = np.tile(np.arange(6, dtype=np.float32) * 0.3, (1, 1, 5, 1))
    assert sharpness(ramp) == pytest.approx(0.3)
    assert sharpness(ramp + np.swapaxes(np.tile(np.arange(5) * 0.4, (1, 1, 6, 1)), 2, 3)) == pytest.approx(
        0.5
    )


def test_a_picture_keeps_its_pixels() -> None:
    picture = np.array([[[-1.0, 1.0]], [[0.0, 0.0]], [[1.0, 3.0]]])
    image = to_image(picture, 2)
    assert image.size == (4, 2)
    assert [image.getpixel(place) for place in ((0, 0), (1, 1), (2, 0))] == [
        (0, 128, 255),
        (0, 128, 255),
        (255, 128, 255),
    ]


def test_a_sheet_shows_every_picture_once() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    pictures = [Image.new("RGB", (10, 20), colour) for colour in colours]
    rows = [("a long label that needs more than one line", pictures), ("b", pictures)]
    sheet = draw_grid(rows, ["x", "y"], ["one", "two"], "title")
    counts = {colour: count for count, colour in sheet.getcolors(1 << 20) or []}
    assert [counts[colour] for colour in colours] == [2 * 10 * 20] * 4


def test_a_sheet_is_written_whole_or_not(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 3), (1, 2, 3))
    save_picture(image, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as written:
        assert written.getpixel((0, 0)) == (1, 2, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]
    with pytest.raises(OutputError):
        save_picture(image, tmp_path / "missing" / "x.png")
