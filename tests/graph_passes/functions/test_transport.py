"""Both forms of the transport of a grid."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from graph_passes.functions.transport import build_transport
from graph_passes.parameters import SwsParameters
from tests.graph_passes.functions.calls import FLOAT, Call
from tests.graph_passes.functions.test_banded_transport import random_band


@cache
def transport(convolutions: bool, separate: bool = False) -> Call:
    function = build_transport(SwsParameters(), convolutions=convolutions, separate=separate)
    shapes: dict[str, Sequence[int | str]] = {
        "state": ["batch", 145, "height", "width"],
        "blend": ["batch", 3],
    }
    return Call({"Transport": function}, "Transport", shapes, FLOAT, {})


@pytest.mark.parametrize(("height", "width"), [(9, 20), (1, 5), (18, 4)])
def test_copies_equal_convolutions(height: int, width: int) -> None:
    """Without a state for the second sample."""
    state = random_band(height, width)
    state[1] = 0
    inputs = {"state": state, "blend": np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], np.float32)}
    (expected,), (found,) = (transport(form)(**inputs) for form in (True, False))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert np.abs(expected).max() > 0.1


def test_a_product_of_its_own_for_each_grid_changes_nothing() -> None:
    inputs = {"state": random_band(9, 20), "blend": np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], np.float32)}
    np.testing.assert_array_equal(transport(True, True)(**inputs), transport(True)(**inputs))


def test_copies_have_no_large_convolution_of_the_band() -> None:
    kinds = [node.op_type for node in transport(False).model.graph.all_nodes()]
    assert "ConvTranspose" not in kinds
    assert kinds.count("Conv") < [node.op_type for node in transport(True).model.graph].count("Conv")
