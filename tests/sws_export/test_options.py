"""Options that contradict each other, the model, or the graph."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from sws_export import ExportOptions, SwsParameters
from sws_export.contract import TensorSpec
from sws_export.errors import OptionError
from sws_export.options import artefact_kind, check_static_dimensions, engine_sizes, guard_options
from sws_export.profile import Range, Sizes
from sws_export.rewrite import GuardOptions


@pytest.mark.parametrize(
    ("name", "kind"), [("a.onnx", "onnx"), ("a.plan", "engine"), ("a.b.engine", "engine")]
)
def test_the_suffix_decides(name: str, kind: str) -> None:
    assert artefact_kind(Path(name)) == kind


@pytest.mark.parametrize("name", ["engine", "engine.trt", "plan", ".onnx"])
def test_other_suffixes(name: str) -> None:
    with pytest.raises(OptionError, match=r"expected a name ending in \.onnx, \.plan or \.engine"):
        artefact_kind(Path(name))


@pytest.mark.parametrize("options", [{"sites": ("mid*",)}, {"parameters": SwsParameters(beta=0.1)}])
def test_plain_has_no_parameters(options: dict[str, Any]) -> None:
    with pytest.raises(
        OptionError, match="--plain exports the UNet without SWS; leave out --sws, --sites and"
    ):
        ExportOptions(plain=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plain": True}, "--plain has no meaning with --preset node: it exports the UNet without SWS"),
        ({"guard": "fused"}, "--guard has no meaning with --preset node: its guard has one form"),
        ({"guard_rows": "1/8"}, "--guard-rows has no meaning with --preset node"),
        ({"parameters": SwsParameters(scales=(1, 2, 3))}, "--sws scales has no meaning with --preset node"),
        ({"parameters": SwsParameters(schedule="noise")}, "--sws schedule has no meaning .*; leave it out"),
    ],
)
def test_what_has_no_meaning_with_the_node(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ExportOptions(preset="node", **options)


def test_the_nodes_guard_has_one_form() -> None:
    assert guard_options(ExportOptions(preset="node")) == GuardOptions("literal", Fraction(1))


def test_a_preset_that_does_not_exist() -> None:
    with pytest.raises(OptionError, match="--preset nodes is unknown; choose sws or node"):
        ExportOptions(preset="nodes")


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


@pytest.mark.parametrize("scale", [0, -8])
def test_a_scale_that_is_none(scale: int) -> None:
    with pytest.raises(OptionError, match=f"--vae-scale {scale}: expected 1 or more"):
        ExportOptions(vae_scale=scale)


def sample(*shape: int | str) -> tuple[TensorSpec, ...]:
    return (TensorSpec("sample", "float32", shape),)


SIZES = Sizes(Range(1, 2, 4), Range(64, 64, 64), Range(32, 64, 64), Range(77, 77, 77))


def test_sizes_that_the_graph_fixes_otherwise() -> None:
    check_static_dimensions(sample("batch", 4, 64, "width"), SIZES)
    with pytest.raises(OptionError, match=r"a fixed batch of 2; found 1:2:4 in the profile"):
        check_static_dimensions(sample(2, 4, "height", "width"), SIZES)
    with pytest.raises(OptionError, match=r"a fixed width of 64; found 32:64:64"):
        check_static_dimensions(sample("batch", 4, 64, 64), SIZES)
