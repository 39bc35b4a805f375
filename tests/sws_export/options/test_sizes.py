"""SizeRanges as they are asked for: of an engine, of a graph, and beside those that a graph has already."""

import re

import pytest

from sws_export.errors import OptionError
from sws_export.options.sizes import SizeOptions, check_static_dimensions
from sws_export.tensors import Range, SizeRanges, TensorSpec


def test_the_trained_size_is_the_default() -> None:
    (sizes,) = SizeOptions().engine_profiles({"sample_size": 64}, 8, 8)
    assert sizes == SizeRanges(Range(1, 2, 2), Range(64, 64, 64), Range(64, 64, 64), Range(77, 77, 77))
    (sizes,) = SizeOptions().engine_profiles({"sample_size": [32, 64]}, 8, 8)
    assert (sizes.height, sizes.width) == (Range(32, 32, 32), Range(64, 64, 64))


def test_sizes_are_given_in_pixels() -> None:
    options = SizeOptions(batch="1", height="256:512:1024", width="512", tokens="1:77:154")
    (sizes,) = options.engine_profiles(None, 8, 8)
    assert sizes == SizeRanges(Range(1, 1, 1), Range(32, 64, 128), Range(64, 64, 64), Range(1, 77, 154))


def test_the_scale_given_wins() -> None:
    (sizes,) = SizeOptions(vae_scale=4, height="64", width="64").engine_profiles(None, 8, 8)
    assert sizes.height.minimum == 16


def test_what_cannot_be_known_must_be_given() -> None:
    with pytest.raises(OptionError, match="add --vae-scale 8"):
        SizeOptions(height="512").engine_profiles({"sample_size": 64}, 8, None)
    with pytest.raises(OptionError, match="add --width MIN:OPT:MAX"):
        SizeOptions(height="512").engine_profiles({"sample_size": None}, 8, 8)


def test_the_trained_size_needs_no_scale() -> None:
    (sizes,) = SizeOptions().engine_profiles({"sample_size": 64}, 8, None)
    assert sizes.height == Range(64, 64, 64)
    (sizes,) = SizeOptions().engine_profiles({"sample_size": 60}, 8, None)
    assert sizes.height == Range(64, 64, 64)


@pytest.mark.parametrize(
    ("multiple", "height", "width", "latent"),
    [
        (8, "1080", "1920", (136, 240)),
        (8, "832", "1216", (104, 152)),
        (8, "512", "904", (64, 120)),
        (4, "512", "904", (64, 116)),
    ],
)
def test_sizes_of_images_that_people_ask_for(
    multiple: int, height: str, width: str, latent: tuple[int, int]
) -> None:
    sizes = SizeOptions(height=height, width=width).static_sizes(multiple, 8)
    assert (sizes["height"], sizes["width"]) == latent


def test_what_is_said_of_sizes_that_the_unet_does_not_take() -> None:
    options = SizeOptions(height="512:1024:1080", width="832")
    (sizes,) = options.engine_profiles(None, 8, 8)
    assert sizes.height == Range(64, 128, 136)
    remark = (
        "--height 512:1024:1080: the UNet takes multiples of 64 pixels: made for 1088 pixels for 1080; "
        "sws_export.runtime pads smaller images and crops the result"
    )
    assert options.remarks(8, 8) == [remark]
    several = SizeOptions(width="832", profiles=("batch=1", "height=512:1024:1080"))
    assert several.remarks(8, 8) == [f"--profile height=512:1024:1080: {remark}"]


def test_profiles_override_the_other_sizes() -> None:
    options = SizeOptions(
        batch="1:2:4",
        tokens="77",
        profiles=("batch=2,height=512,width=512", "height=768 , width=512:768:1024"),
    )
    assert [str(sizes) for sizes in options.engine_profiles({"sample_size": 64}, 8, 8)] == [
        "batch 2, height 64, width 64, tokens 77",
        "batch 1:2:4, height 96, width 64:96:128, tokens 77",
    ]


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        (("depth=2",), "--profile depth=2: expected each of batch, height, width, tokens at most once"),
        (("batch=1,batch=2",), "at most once, as NAME=SIZES; found 'batch=2'"),
        (("batch=2:1:4",), "--profile batch=2:1:4: --batch 2:1:4: expected MIN <= OPT <= MAX"),
        (("height=502",), "--profile height=502: --height 502: 502 pixels is not a multiple of 8"),
        (("batch=2", "batch=2,height=512"), "--profile batch=2,height=512: an earlier profile has the same"),
    ],
)
def test_profiles_that_are_refused(profiles: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        SizeOptions(profiles=profiles).engine_profiles({"sample_size": 64}, 8, 8)


def test_a_graph_takes_any_size_unless_one_is_given() -> None:
    assert SizeOptions().static_sizes(8, None) == {}
    options = SizeOptions(batch="2", height="256", tokens="77")
    assert options.static_sizes(8, 8) == {"batch": 2, "height": 32, "tokens": 77}
    assert SizeOptions(width="512:512:512").static_sizes(8, 8) == {"width": 64}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            SizeOptions(batch="1:2:2"),
            "--batch 1:2:2: an ONNX graph has one static size or is dynamic; give one number",
        ),
        (
            SizeOptions(width="256:512:512"),
            "--width 256:512:512: an ONNX graph has one static size or is dynamic",
        ),
        (
            SizeOptions(height="502"),
            "--height 502: 502 pixels is not a multiple of 8, .*; the nearest sizes are 496 or 504 pixels",
        ),
        (SizeOptions(profiles=("batch=2",)), "--profile batch=2: an ONNX graph has no optimization profiles"),
    ],
)
def test_sizes_that_no_graph_can_have(options: SizeOptions, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        options.static_sizes(8, 8)


def test_pixels_need_a_scale_in_a_graph_too() -> None:
    assert SizeOptions(batch="2").static_sizes(8, None) == {"batch": 2}
    with pytest.raises(OptionError, match="add --vae-scale 8"):
        SizeOptions(height="512").static_sizes(8, None)


def sample(*shape: int | str) -> tuple[TensorSpec, ...]:
    text = TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", 8))
    return TensorSpec("sample", "float32", shape), text


SIZES = SizeRanges(Range(1, 2, 4), Range(64, 64, 64), Range(32, 64, 64), Range(77, 77, 77)).ranges()


def test_sizes_that_the_graph_fixes_otherwise() -> None:
    check_static_dimensions(sample("batch", 4, 64, "width"), SIZES)
    with pytest.raises(OptionError, match=r"a static batch of 2, found 1:2:4 in the profile"):
        check_static_dimensions(sample(2, 4, "height", "width"), SIZES)
    with pytest.raises(OptionError, match=r"a static width of 64, found 32:64:64"):
        check_static_dimensions(sample("batch", 4, 64, 64), SIZES)
    with pytest.raises(
        OptionError, match=r"width of 64 \(512 pixels\), found 32:64:64 \(256:512:512 pixels\)"
    ):
        check_static_dimensions(sample("batch", 4, 64, 64), SIZES, 8)
    asked = SIZES | {"tokens": Range(1, 77, 77)}
    fixed_text = (
        sample("batch", 4, 64, "width")[0],
        TensorSpec("encoder_hidden_states", "float32", (1, 77, 8)),
    )
    with pytest.raises(OptionError, match=r"a static tokens of 77, found 1:77:77"):
        check_static_dimensions(fixed_text, asked)
