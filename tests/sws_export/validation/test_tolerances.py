"""Tolerances of 8-bit graphs: as documented, and failing above."""

import re
from pathlib import Path

import numpy as np
import pytest

from graph_passes.weight_formats import WEIGHT_FORMATS, WeightFormat
from sws_export.parameters import SwsParameters
from sws_export.validation.compare import compare_outputs
from sws_export.validation.sws_spec import SwsSpec
from sws_export.validation.tolerances import output_tolerances

DOCUMENTED = Path(__file__).parents[3] / "docs" / "engines.md"
OPTIONS = {"--weights": False, "--precision": True}


def spec(kind: WeightFormat, activations: bool) -> SwsSpec:
    return SwsSpec(SwsParameters(), (), weights=kind, activations=kind if activations else None)


def documented() -> dict[str, float]:
    """The tolerances in the table of the documentation by option."""
    rows = re.findall(r"^\| `(--\w+ \w+)` \|.*?\| (\d+) % \|", DOCUMENTED.read_text(), re.MULTILINE)
    return {option: int(percent) / 100 for option, percent in rows}


def test_every_kind_is_documented() -> None:
    assert documented().keys() == {f"{option} {kind}" for option in OPTIONS for kind in WEIGHT_FORMATS}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", WEIGHT_FORMATS)
def test_a_prediction_fails_above_the_documented_tolerance(kind: WeightFormat, option: str) -> None:
    expected = {"out_sample": np.array([-2.0, 0.5]), "sws_state_d2_out": np.ones(3)}
    tolerances = output_tolerances([expected], spec(kind, OPTIONS[option]), "fp16")
    allowed = documented()[f"{option} {kind}"]
    for share, passed in ((0.99, True), (1.01, False)):
        actual = expected | {"out_sample": expected["out_sample"] + [0, share * allowed * 2.0]}
        prediction, state = compare_outputs(actual, expected, tolerances)
        assert (prediction.passed, state.passed) == (passed, True)
    # States have no 8-bit operand.
    actual = expected | {"sws_state_d2_out": expected["sws_state_d2_out"] + 1e-4}
    assert [output.passed for output in compare_outputs(actual, expected, tolerances)] == [True, False]
