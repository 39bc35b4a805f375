"""Parameters of the method as text."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sws_export.errors import OptionError
from sws_export.parameters import SwsParameters, check_parameters, parse_parameters, recorded_parameters
from sws_export.presets import PRESETS, Preset, preset_named


def test_defaults_are_the_published_method() -> None:
    assert parse_parameters([]) == SwsParameters()
    check_parameters(SwsParameters())


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("sigma_min=0.1", "sigma_min", 0.1),
        ("sigma_max=80", "sigma_max", 80.0),
        ("tau=0.5", "tau", 0.5),
        ("sinkhorn_iters=3", "sinkhorn_iters", 3),
        ("rebalance_iters=1", "rebalance_iters", 1),
        ("beta=0", "beta", 0.0),
        ("bisection_steps=9", "bisection_steps", 9),
        ("key_cap=0", "key_cap", 0.0),
        ("value_cap=1", "value_cap", 1.0),
        ("u_stop=1", "u_stop", 1.0),
        ("kl_floor=1e-3", "kl_floor", 0.001),
        ("kl_slope=0", "kl_slope", 0.0),
        ("theta=0", "theta", 0.0),
        ("scales=1,2,3", "scales", (1, 2, 3)),
        ("scales=4,4,4", "scales", (4, 4, 4)),
        ("schedule=noise", "schedule", "noise"),
        (" beta = 0.5 ", "beta", 0.5),
    ],
)
def test_each_name_of_the_method_can_be_set(text: str, name: str, value: object) -> None:
    assert parse_parameters([text]) == dataclasses.replace(SwsParameters(), **{name: value})


def test_every_parameter_is_among_those_tested_above() -> None:
    marks = test_each_name_of_the_method_can_be_set.pytestmark  # type: ignore[attr-defined]
    tested = {name for _, name, _ in marks[0].args[1]}
    assert tested == {field.name for field in dataclasses.fields(SwsParameters)}


def test_the_last_value_is_used() -> None:
    assert parse_parameters(["beta=0.1", "beta=0.2"]).beta == 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gamma=1", "--sws: unknown parameter 'gamma'; known are sigma_min, sigma_max, tau"),
        ("=1", "--sws: unknown parameter ''"),
        ("beta", r"--sws beta: a value is missing; write --sws beta=0\.8"),
        ("beta=", "--sws beta: a value is missing"),
        ("beta=much", "--sws beta: expected a number, found 'much'"),
        ("sinkhorn_iters=2.5", "--sws sinkhorn_iters: expected an integer, found '2.5'"),
        ("sinkhorn_iters=0", "--sws sinkhorn_iters: 0 is out of range; allowed is 1 to 16"),
        ("rebalance_iters=17", "--sws rebalance_iters: 17 is out of range"),
        ("beta=1", r"--sws beta: 1\.0 is out of range; allowed is 0 to 0\.999"),
        ("beta=nan", "--sws beta: nan is out of range"),
        ("tau=inf", "--sws tau: inf is out of range"),
        ("tau=0", "--sws tau: 0.0 is out of range"),
        ("key_cap=-0.1", "--sws key_cap: -0.1 is out of range"),
        ("sigma_min=25", r"--sws sigma_min: 25 must be below sigma_max \(25\)"),
        ("schedule=linear", "--sws schedule: 'linear' is unknown; use progress or noise"),
        (
            "scales=2,4",
            "--sws scales: expected three integers from 1 to 8, none below the one before, found 2,4$",
        ),
        ("scales=4,2,8", "--sws scales: .* found 4,2,8"),
        ("scales=0,4,8", "--sws scales: .* found 0,4,8"),
        ("scales=2,4,9", "--sws scales: .* found 2,4,9"),
        ("scales=a,b,c", "--sws scales: expected three integers as in 2,4,8, found 'a,b,c'"),
    ],
)
def test_errors_name_the_allowed_values(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_parameters(parse_parameters([text]))


@given(st.sampled_from([field.name for field in dataclasses.fields(SwsParameters)]), st.text())
def test_any_text_is_a_parameter_or_an_option_error(name: str, text: str) -> None:
    try:
        parameters = parse_parameters([f"{name}={text}"])
        check_parameters(parameters)
    except OptionError:
        return
    value = getattr(parameters, name)
    assert isinstance(value, str | tuple) or math.isfinite(value)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_recorded_parameters_are_read_again(preset: Preset) -> None:
    parameters = SwsParameters(beta=0.3, kl_floor=0.5)
    described = json.loads(json.dumps(preset.used_parameters(parameters)))
    assert recorded_parameters(described) == parameters
    assert ("scales" in described) == ("schedule" in described) == (preset.name == "sws")


def test_the_node_is_bypassed_where_all_is_noise() -> None:
    assert preset_named("sws").bypass_sigma(SwsParameters()) is None
    assert preset_named("node", "sigma").bypass_sigma(SwsParameters(sigma_max=80.0)) == 80.0
