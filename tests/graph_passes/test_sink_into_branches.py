"""What only one branch uses is computed in it; at intensity 0 nothing but the state update runs."""

import collections
import functools
import json
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from graph_passes.guard import GuardOptions
from graph_passes.parameters import SwsParameters
from graph_passes.sink_into_branches import SinkIntoBranches
from graph_passes.target import TARGETS
from sws_export.pipeline.rewrite import rewrite
from sws_export.progress import SilentProgress
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import SiteSpec, build_model, feeds, site_name
from tests.graph_passes.test_insert_sws import sws_feeds

SITES = ("down_blocks.0", "up_blocks.1", "up_blocks.1.more")
# What is in the branches of the search does not matter here, their number costs time.
PARAMETERS = SwsParameters(bisection_steps=1)
STATIC = {"height": 8, "width": 12, "tokens": 5}


@functools.cache
def made(rows: Fraction = Fraction(1), **sizes: int) -> ir.Model:
    """A rewritten model, which tests must not change."""
    model = build_model([SiteSpec(name=site_name(name)) for name in SITES], levels=2)
    guard, target = GuardOptions("fused", rows), TARGETS["onnxruntime"]
    rewrite(model, PARAMETERS, (), guard, target, SilentProgress(), sizes=sizes)
    return model


def executed(model: ir.Model, inputs: dict[str, np.ndarray]) -> collections.Counter[str]:
    """How many nodes of each type run."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        serialized = ir.to_proto(model).SerializeToString()
        session = onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    return collections.Counter(
        event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")
    )


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ({}, Fraction(1, 8)),
        (STATIC, Fraction(1)),
        pytest.param({}, Fraction(1), marks=pytest.mark.slow),
        pytest.param(STATIC, Fraction(1, 8), marks=pytest.mark.slow),
    ],
)
def test_a_site_adds_one_attention_at_intensity_zero(sizes: dict[str, int], rows: Fraction) -> None:
    """The product of a transport with keys and values, and its gathers, are those of active steps."""
    model = made(rows, **sizes)
    plain = build_model([SiteSpec(name=site_name(name)) for name in SITES], levels=2)
    values = sws_feeds(model, **({"height": 8, "width": 12} if sizes else {}))
    off, on = (executed(model, values | {"intensity": np.full(2, x, np.float32)}) for x in (0.0, 1.0))
    base = executed(plain, {name: values[name] for name in (value.name for value in plain.graph.inputs)})
    assert off["Attention"] == base["Attention"] < on["Attention"]
    # One product for the blend of the transport.
    assert off["MatMul"] == base["MatMul"] + 1 <= on["MatMul"] - len(SITES)
    assert off["Split"] == 0 < on["Split"]


def test_shared_nodes_stay() -> None:
    """The matrix of a grid is made once for all its sites."""
    model = made(**STATIC)
    kept = {node.op_type for node in model.graph}
    assert {"Conv", "Pad", "Gather"} <= kept
    sites = [node for node in model.graph if node.op_type == "If"]
    assert len(sites) == len(SITES)
    for node in sites:
        inside = [inner.op_type for inner in node.attributes["then_branch"].as_graph()]
        assert "Split" in inside
        plain = [inner.op_type for inner in node.attributes["else_branch"].as_graph()]
        assert plain.count("Attention") == 1
        assert not {"MatMul", "Gather", "Split"} & set(plain)


def test_a_second_run_changes_nothing() -> None:
    assert not SinkIntoBranches()(made(**STATIC)).modified
    assert not SinkIntoBranches()(build_model([SiteSpec()])).modified


def test_a_batch_with_one_active_sample(run_onnx: RunOnnx) -> None:
    """The other one is that of the plain graph, bit for bit."""
    model = made(**STATIC)
    values = sws_feeds(model, height=8, width=12) | {"intensity": np.array([0.0, 1.0], np.float32)}
    plain = build_model([SiteSpec(name=site_name(name)) for name in SITES], levels=2)
    expected = run_onnx(plain, feeds(height=8, width=12))["out_sample"]
    found = run_onnx(model, values)["out_sample"]
    assert (found[0] == expected[0]).all()
    assert np.abs(found[1] - expected[1]).max() > 1e-4
