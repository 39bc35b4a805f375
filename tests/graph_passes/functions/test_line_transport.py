"""Transport along a row of tokens against the dense product and against tiles."""

from functools import cache

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.functions import build_functions
from graph_passes.parameters import SwsParameters
from tests.graph_passes.functions.calls import FLOAT, Call
from tests.graph_passes.functions.test_banded_transport import CHANNELS, dense, random_band


@cache
def transport(name: str = "LineTransport", dtype: ir.DataType = FLOAT) -> Call:
    shapes = {"transport": ["batch", 145, "height", "width"], "x": ["batch", "tokens", CHANNELS]}
    functions = build_functions(SwsParameters(), dtype, cross_attention=True)
    return Call(functions, name, shapes, dtype, {})


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 17, 18, 77, 154])
def test_equals_the_dense_product_and_tiles(tokens: int) -> None:
    band = random_band(1, tokens)
    x = np.random.default_rng(1).standard_normal((2, tokens, CHANNELS), dtype=np.float32)
    (moved,) = transport()(transport=band, x=x)
    np.testing.assert_allclose(moved, dense(band) @ x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moved, transport("BandedTransport")(transport=band, x=x)[0], atol=1e-5)


def test_float16_tokens() -> None:
    band = random_band(1, 30) / 10
    x = np.random.default_rng(1).standard_normal((2, 30, CHANNELS)).astype(np.float16)
    (moved,) = transport(dtype=ir.DataType.FLOAT16)(transport=band, x=x)
    assert moved.dtype == np.float16
    np.testing.assert_allclose(moved, dense(band) @ x.astype(np.float32), atol=1e-2)
