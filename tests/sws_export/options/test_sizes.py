"""Sizes as they are asked for: of an engine, of a graph, and beside those that a graph has already."""

import pytest

from sws_export import ExportOptions
from sws_export.errors import OptionError
from sws_export.options.sizes import check_static_dimensions, engine_sizes, graph_sizes
from sws_export.tensors import Range, Sizes, TensorSpec


def test_the_trained_size_is_the_default() -> None:
    sizes = engine_sizes(ExportOptions(), {"sample_size": 64}, 8, 8)
    assert sizes == Sizes(Range(1, 2, 2), Range(64, 64, 64), Range(64, 64, 64), Range(77, 77, 77))
    sizes = engine_sizes(ExportOptions(), {"sample_size": [32, 64]}, 8, 8)
    assert (sizes.height, sizes.width) == (Range(32, 32, 32), Range(64, 64, 64))


def test_sizes_are_given_in_pixels() -> None:
    options = ExportOptions(batch="1", height="256:512:1024", width="512", tokens="1:77:154")
    sizes = engine_sizes(options, None, 8, 8)
    assert sizes == Sizes(Range(1, 1, 1), Range(32, 64, 128), Range(64, 64, 64), Range(1, 77, 154))


def test_the_scale_given_wins() -> None:
    assert engine_sizes(ExportOptions(vae_scale=4, height="64", width="64"), None, 8, 8).height.minimum == 16


def test_what_cannot_be_known_must_be_given() -> None:
    with pytest.raises(OptionError, match="add --vae-scale 8"):
        engine_sizes(ExportOptions(), {"sample_size": 64}, 8, None)
    with pytest.raises(OptionError, match="add --width MIN:OPT:MAX"):
        engine_sizes(ExportOptions(height="512"), {"sample_size": None}, 8, 8)


def test_a_graph_takes_any_size_unless_one_is_given() -> None:
    assert graph_sizes(ExportOptions(), 8, None) == {}
    options = ExportOptions(batch="2", height="256", tokens="77")
    assert graph_sizes(options, 8, 8) == {"batch": 2, "height": 32, "tokens": 77}
    assert graph_sizes(ExportOptions(width="512:512:512"), 8, 8) == {"width": 64}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions(batch="1:2:2"), "--batch 1:2:2: an ONNX graph takes one size or any; give one number"),
        (ExportOptions(width="256:512:512"), "--width 256:512:512: an ONNX graph takes one size or any"),
        (ExportOptions(height="100"), "--height 100: 100 is not a multiple of 64"),
        (ExportOptions(tokens="x"), "--tokens x: expected one number"),
    ],
)
def test_sizes_that_no_graph_can_have(options: ExportOptions, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        graph_sizes(options, 8, 8)


def test_pixels_need_a_scale_in_a_graph_too() -> None:
    assert graph_sizes(ExportOptions(batch="2"), 8, None) == {"batch": 2}
    with pytest.raises(OptionError, match="add --vae-scale 8"):
        graph_sizes(ExportOptions(height="512"), 8, None)


def sample(*shape: int | str) -> tuple[TensorSpec, ...]:
    text = TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", 8))
    return TensorSpec("sample", "float32", shape), text


SIZES = Sizes(Range(1, 2, 4), Range(64, 64, 64), Range(32, 64, 64), Range(77, 77, 77)).ranges()


def test_sizes_that_the_graph_fixes_otherwise() -> None:
    check_static_dimensions(sample("batch", 4, 64, "width"), SIZES)
    with pytest.raises(OptionError, match=r"a fixed batch of 2; found 1:2:4 in the profile"):
        check_static_dimensions(sample(2, 4, "height", "width"), SIZES)
    with pytest.raises(OptionError, match=r"a fixed width of 64; found 32:64:64"):
        check_static_dimensions(sample("batch", 4, 64, 64), SIZES)
    asked = SIZES | {"tokens": Range(1, 77, 77)}
    fixed_text = (
        sample("batch", 4, 64, "width")[0],
        TensorSpec("encoder_hidden_states", "float32", (1, 77, 8)),
    )
    with pytest.raises(OptionError, match=r"a fixed tokens of 77; found 1:77:77"):
        check_static_dimensions(fixed_text, asked)
