import pytest
from hypothesis import given
from hypothesis import strategies as st

from sws_export.errors import OptionError
from sws_export.options import SizeOptions
from sws_export.tensors import (
    Range,
    SizeRanges,
    TensorSpec,
    concrete_shape,
    parse_range,
    shapes_for,
)


def sizes(**changes):
    texts = {"batch": "1:2:4", "height": "256:512:1024", "width": "512", "tokens": "77"} | changes
    (found,) = SizeOptions(**texts).engine_profiles(None, 8, 8)
    return found


def test_three_numbers_are_a_range():
    assert parse_range("256:512:1024", "--height") == Range(256, 512, 1024)


def test_one_number_is_a_fixed_size():
    assert parse_range(" 512 ", "--height") == Range(512, 512, 512)


@given(st.lists(st.integers(1, 10**6), min_size=3, max_size=3).map(sorted))
def test_a_range_reads_what_it_prints(numbers):
    expected = Range(*numbers)
    if expected.minimum == expected.maximum or expected.minimum < expected.maximum:
        assert parse_range(str(expected), "--batch") == expected


@pytest.mark.parametrize("text", ["", "a", "1:2", "1:2:3:4", "-1", "1.5", "1:2:", "1e3", "9" * 30])
def test_malformed_text_names_the_option(text):
    with pytest.raises(OptionError, match=r"^--width .*expected one number or MIN:OPT:MAX"):
        parse_range(text, "--width")


@pytest.mark.parametrize("text", ["4:2:8", "1:8:4", "8:8:4"])
def test_descending_sizes_are_refused(text):
    with pytest.raises(OptionError, match=r"--batch .*MIN <= OPT <= MAX"):
        parse_range(text, "--batch")


def test_zero_is_refused():
    with pytest.raises(OptionError, match=r"--batch 0:1:2.*start at 1"):
        parse_range("0:1:2", "--batch")


def test_pixels_become_latent_units():
    assert sizes() == SizeRanges(
        batch=Range(1, 2, 4), height=Range(32, 64, 128), width=Range(64, 64, 64), tokens=Range(77, 77, 77)
    )


@pytest.mark.parametrize(
    ("text", "nearest"), [("500", "496 or 504"), ("512:522:576", "520 or 528"), ("4", "are 8 pixels")]
)
def test_a_size_that_is_no_latent_is_refused_with_the_nearest(text, nearest):
    with pytest.raises(OptionError, match=rf"--height {text}.*multiple of 8.*{nearest}"):
        sizes(height=text)


def test_a_size_the_unet_cannot_halve_becomes_the_next():
    assert sizes(height="504:520:576").height == Range(64, 72, 72)


def test_shapes_follow_the_symbols():
    inputs = [
        TensorSpec("encoder_hidden_states", "float16", ("batch", "tokens", 768)),
        TensorSpec("sws_state_d4", "float32", ("batch", 145, "height/4", "width/4")),
    ]
    assert shapes_for(inputs, sizes(tokens="77:77:154")) == {
        "encoder_hidden_states": ((1, 77, 768), (2, 77, 768), (4, 154, 768)),
        "sws_state_d4": ((1, 145, 8, 16), (2, 145, 16, 16), (4, 145, 32, 16)),
    }


def test_a_division_with_a_remainder_is_refused():
    spec = TensorSpec("sws_state_d8", "float32", ("batch", 145, "height/8", "width/8"))
    with pytest.raises(
        OptionError, match=r"sws_state_d8 needs a latent width that is a multiple of 8, found 12"
    ):
        concrete_shape(spec, {"batch": 1, "height": 16, "width": 12, "tokens": 77})
