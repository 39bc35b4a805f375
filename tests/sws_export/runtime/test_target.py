"""A graph that runs on another target than the one it was exported for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sws_export import ExportOptions, export
from sws_export.runtime import Session
from sws_export.runtime.contract import read_contract


def test_a_session_names_the_target(
    traced: Path, sws_graph: Path, inputs: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """And computes the same, but for a key guard that may find a neighbouring step."""
    graph = tmp_path / "cuda.onnx"
    export(traced, graph, ExportOptions(backend="onnxruntime-cuda", validate=False))
    contract = read_contract(graph)
    assert contract.manifest["target"] == "onnxruntime-cuda"
    assert contract.target_mismatch("cuda") is None
    message = r"was exported for onnxruntime-cuda and runs with the provider 'cpu'.*again without --backend"
    with pytest.warns(RuntimeWarning, match=message):
        session = Session.load(graph)
    step = inputs(0)
    expected = Session.load(sws_graph).step(**step)
    np.testing.assert_allclose(session.step(**step), expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    mismatch = contract.target_mismatch("tensorrt-rtx")
    assert mismatch is not None
    assert "export it again with --backend tensorrt-rtx" in mismatch


def test_a_guard_that_is_the_same_for_every_target(sws_graph: Path, node_graph: Path, traced: Path) -> None:
    for graph, form in ((sws_graph, "literal"), (node_graph, "literal"), (traced, None)):
        contract = read_contract(graph)
        assert (contract.manifest["guard"] or {}).get("form") == form
        assert contract.target_mismatch("cuda") is None
