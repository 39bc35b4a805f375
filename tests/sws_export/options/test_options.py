"""Options that contradict each other, the model, or the graph."""

import dataclasses
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from graph_passes.guard import GuardOptions
from graph_passes.target import TARGETS
from sws_export import QuantizationOptions, SizeOptions, SourceOptions, SwsOptions, SwsParameters
from sws_export.errors import OptionError
from sws_export.options import EngineOptions, artefact_kind


@pytest.mark.parametrize(
    ("name", "kind"), [("a.onnx", "onnx"), ("a.plan", "engine"), ("a.b.engine", "engine")]
)
def test_the_suffix_decides(name: str, kind: str) -> None:
    assert artefact_kind(Path(name)) == kind


@pytest.mark.parametrize("name", ["engine", "engine.trt", "plan", ".onnx"])
def test_other_suffixes(name: str) -> None:
    with pytest.raises(OptionError, match=r"expected a name ending in \.onnx, \.plan or \.engine"):
        artefact_kind(Path(name))


@pytest.mark.parametrize("name", ["D:a.onnx", "a\\b.onnx", "a\nb.plan"])
def test_names_that_a_manifest_cannot_have(name: str) -> None:
    with pytest.raises(OptionError, match="expected a file name that manifests can have"):
        artefact_kind(Path("out") / name)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sites", ("mid*",)),
        ("guard", "literal"),
        ("guard_rows", "1/8"),
        ("guard_branches", "off"),
        ("debug_outputs", True),
    ],
)
def test_what_has_no_meaning_without_sws(option: str, value: Any) -> None:
    name = "--" + option.replace("_", "-")
    with pytest.raises(
        OptionError, match=f"{name} has no meaning with --plain, which exports .*; leave it out"
    ):
        SwsOptions(plain=True, **{option: value})
    with pytest.raises(OptionError, match="--sws has no meaning with --plain"):
        SwsOptions(plain=True, parameters=SwsParameters(beta=0.1))


@pytest.mark.parametrize(
    ("group", "option", "value", "message"),
    [
        (SourceOptions, "precision", "fp99", "--precision: expected one of fp32, fp16, bf16, found 'fp99'"),
        (SourceOptions, "prediction_type", "v", "--prediction-type: expected one of epsilon, .*, found 'v'"),
        (
            SwsOptions,
            "parameters",
            SwsParameters(beta=7.0),
            "--sws beta: 7.0 is out of range; allowed is 0 to",
        ),
        (SwsOptions, "guard", "exact", "--guard exact is unknown; choose fused or literal"),
        (SwsOptions, "guard_branches", "maybe", "--guard-branches: expected on or off, found 'maybe'"),
        (QuantizationOptions, "weights", "int4", "--weights: expected one of int8, fp8, found 'int4'"),
        (QuantizationOptions, "activations", "int4", "--precision: expected one of int8, fp8, found 'int4'"),
        (QuantizationOptions, "trust_code", True, "--trust-code has no meaning without --calibration"),
        (SizeOptions, "batch", "x", "--batch x: expected one number or MIN:OPT:MAX"),
        (SizeOptions, "height", "9:1:2", "--height 9:1:2: expected MIN <= OPT <= MAX"),
        (SizeOptions, "tokens", "", "--tokens : expected one number or MIN:OPT:MAX"),
        (SizeOptions, "profiles", ("width=0",), "--profile width=0: --width 0: sizes start at 1, found 0"),
        (SizeOptions, "profiles", ("depth=8",), "--profile depth=8: expected each of batch, height, width"),
    ],
)
def test_a_group_refuses_what_it_does_not_know(group: Any, option: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        group(**{option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"plain": True},
            "--plain has no meaning with --preset comfyui-node: it exports the UNet without SWS",
        ),
        ({"guard": "fused"}, "--guard has no meaning with --preset comfyui-node: its guard has one form"),
        ({"guard_rows": "1/8"}, "--guard-rows has no meaning with --preset comfyui-node"),
        ({"guard_branches": "off"}, "--guard-branches has no meaning with --preset comfyui-node"),
        (
            {"parameters": SwsParameters(scales=(1, 2, 3))},
            "--sws scales has no meaning with --preset comfyui-node",
        ),
        ({"parameters": SwsParameters(schedule="noise")}, "--sws schedule has no meaning .*; leave it out"),
    ],
)
def test_what_has_no_meaning_with_the_node(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SwsOptions(preset="comfyui-node", **options)


def test_the_source_of_u() -> None:
    keys = [SwsOptions(preset="node", u=u).cache_key() for u in (None, "calls", "sigma")]
    assert [key["u"] for key in keys] == ["calls", "calls", "sigma"]
    with pytest.raises(OptionError, match="--u calls has no meaning with --preset sws"):
        SwsOptions(u="calls")
    with pytest.raises(OptionError, match="--u steps is unknown; choose sigma or calls"):
        SwsOptions(preset="node", u="steps")
    with pytest.raises(OptionError, match=r"--sws sigma_max has no meaning .* counter of its calls"):
        SwsOptions(preset="node", parameters=SwsParameters(sigma_max=80.0))


def test_the_nodes_guard_has_one_form() -> None:
    assert SwsOptions(preset="comfyui-node").guard_options() == GuardOptions("literal", Fraction(1))


@pytest.mark.parametrize(
    ("text", "entropy_rows", "kl_strides"),
    [("1", 1, (1, 1)), ("kl:1", 1, (1, 1)), ("2/16", Fraction(1, 8), (1, 1)), ("kl:1/8", 1, (4, 2))],
)
def test_query_rows_of_the_guard(
    text: str, entropy_rows: Fraction | int, kl_strides: tuple[int, int]
) -> None:
    guard = SwsOptions(guard_rows=text).guard_options()
    assert (guard.entropy_rows, guard.kl_strides) == (entropy_rows, kl_strides)
    assert GuardOptions.parse(guard.form, guard.rows_text) == guard


@pytest.mark.parametrize("text", ["0", "2", "1/0", "1/3", "kl", "kl:", "kl:1/3", "kl: 1/8x", "nan", ""])
def test_other_shares_of_the_rows_are_refused(text: str) -> None:
    message = f"--guard-rows {text}: expected one of 1, 1/2, 1/4, 1/8, 1/16, or kl: and one of them"
    with pytest.raises(OptionError, match=re.escape(message)):
        SwsOptions(guard_rows=text)


def test_plugins_have_one_set_of_rows() -> None:
    target = TARGETS["tensorrt"]
    message = "the KeyGuard plugin computes .* from the same rows; use --guard-rows 1/8 or 1"
    with pytest.raises(OptionError, match=f"--guard-rows kl:1/8: {message}"):
        SwsOptions(guard_rows="kl:1/8").target(target)
    assert SwsOptions(guard_rows="1/8").target(target) == target
    without = dataclasses.replace(target, plugin_operators=frozenset())
    assert SwsOptions(guard_rows="kl:1/8").target(without) == without


def test_a_preset_that_does_not_exist() -> None:
    with pytest.raises(OptionError, match="--preset nodes is unknown; choose sws or comfyui-node"):
        SwsOptions(preset="nodes")


@pytest.mark.parametrize("scale", [0, -8])
def test_a_scale_that_is_none(scale: int) -> None:
    with pytest.raises(OptionError, match=f"--vae-scale {scale}: expected 1 or more"):
        SizeOptions(vae_scale=scale)


@pytest.mark.parametrize("level", [-1, 6])
def test_an_optimization_level_out_of_range(level: int) -> None:
    with pytest.raises(OptionError, match=f"--builder-optimization-level must be 0 to 5, found {level}"):
        EngineOptions(optimization_level=level)


@pytest.mark.parametrize("capability", ["89", "8.9.1", "sm89", ""])
def test_a_malformed_compute_capability(capability: str) -> None:
    with pytest.raises(OptionError, match=r"expected MAJOR\.MINOR separated by commas, such as 8\.9,12\.0"):
        EngineOptions(compute_capabilities=("8.9", capability))
