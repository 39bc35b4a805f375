"""Metrics of the sites of an artefact: through a session, a stand-in for TensorRT, Triton and validation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from graph_passes.debug_outputs import PREFIX, debug_output_names
from sws_export import ExportOptions, SwsOptions
from sws_export.checkpoint import open_checkpoint
from sws_export.checkpoint.unet_module import load_unet
from sws_export.errors import OptionError
from sws_export.parameters import SwsParameters
from sws_export.pipeline.validate import validate
from sws_export.reference import ReferenceUNet, schedule
from sws_export.runtime import Session, StepError
from sws_export.runtime.session import Stream
from sws_export.runtime.tensorrt_backend import TensorRtBackend
from tests.sws_export.runtime.test_tensorrt_backend import FakeLibrary, HostDevice, engine_contract

MakeInputs = Callable[..., dict[str, Any]]


def manifest(graph: Path) -> dict[str, Any]:
    return dict(json.loads(graph.with_name(f"{graph.name}.json").read_text()))


def test_the_manifest_lists_them(metrics_graph: Path, sws_graph: Path) -> None:
    described = manifest(metrics_graph)
    listed = described["debug_outputs"]
    assert sorted(listed["outputs"].values()) == sorted(debug_output_names())
    assert listed["sites"] == described["sites"]["d2"]
    outputs = {spec["name"]: (spec["dtype"], spec["shape"]) for spec in described["outputs"]}
    assert outputs["sws_debug_alpha_k"] == ("float32", ["batch", 4])
    assert outputs["sws_debug_kl_cap"] == ("float32", ["batch"])
    compared = {output["name"] for output in described["validation"]["outputs"]}
    assert compared == outputs.keys()
    assert manifest(sws_graph)["debug_outputs"] is None


def test_they_are_the_references(metrics_graph: Path, random_unet: Path, inputs: MakeInputs) -> None:
    unet = load_unet(open_checkpoint(random_unet), torch.float64)
    reference = ReferenceUNet(unet, SwsParameters())
    stream = Session.load(metrics_graph)
    sites = stream.contract.metric_sites
    state = None
    for number in range(3):
        given = inputs(number)
        stream.step(**given)
        tensors = {name: torch.from_numpy(values).double() for name, values in given.items()}
        _, state = reference.step(**tensors, state=state)
        found = stream.metrics()
        expected = {
            figure: torch.stack([getattr(reference.records[site], figure) for site in sites], dim=1)
            for figure in ("alpha_k", "a_v", "entropy_mean", "entropy_min", "entropy_max", "kl")
        }
        now = schedule(tensors["sigma"], tensors["intensity"], SwsParameters())
        for figure, values in expected.items():
            np.testing.assert_allclose(found[figure], values.numpy(), rtol=2e-4, atol=2e-5, err_msg=figure)
        np.testing.assert_allclose(found["kl_cap"], now.kappa.numpy(), rtol=1e-5)
        # Members and sites differ, so that a mix-up would be seen.
        assert len(np.unique(found["a_v"].round(5))) == found["a_v"].size
    assert found["alpha_k"].shape == (2, 4)


def test_they_are_the_callers_own_and_of_the_last_step(metrics_graph: Path, inputs: MakeInputs) -> None:
    stream = Session.load(metrics_graph)
    with pytest.raises(StepError, match="site metrics are those of the last step, and no step has run"):
        stream.metrics()
    stream.step(**inputs(0))
    first = stream.metrics()
    first["alpha_k"][:] = 7.0
    assert stream.metrics()["alpha_k"].max() < 1.0
    with pytest.raises(StepError):
        stream.step(**(inputs(1) | {"intensity": 2.0}))
    assert np.array_equal(stream.metrics()["a_v"], first["a_v"])
    stream.step(**inputs(1, batch=3))
    assert stream.metrics()["a_v"].shape == (3, 4)


def test_the_prediction_is_that_of_a_graph_without(
    metrics_graph: Path, sws_graph: Path, inputs: MakeInputs
) -> None:
    telling, silent = Session.load(metrics_graph), Session.load(sws_graph)
    for number in range(2):
        np.testing.assert_allclose(
            telling.step(**inputs(number)), silent.step(**inputs(number)), rtol=0, atol=2e-5
        )
    with pytest.raises(StepError, match=r"sws\.onnx has no site metrics among its outputs.*--debug-outputs"):
        silent.metrics()


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_the_tensorrt_backend_has_them_too(
    metrics_graph: Path, tmp_path: Path, inputs: MakeInputs, cuda_graphs: bool
) -> None:
    contract = engine_contract(metrics_graph, tmp_path)
    device = HostDevice()
    library = FakeLibrary(metrics_graph, device)
    stream = Stream(contract, TensorRtBackend(contract, library, device, cuda_graphs=cuda_graphs))
    other = Session.load(metrics_graph)
    for number in range(5):
        np.testing.assert_allclose(
            stream.step(**inputs(number)), other.step(**inputs(number)), rtol=0, atol=1e-6
        )
        for figure, values in other.metrics().items():
            np.testing.assert_allclose(stream.metrics()[figure], values, rtol=1e-5, atol=1e-6)


def test_validation_rejects_wrong_metrics(metrics_graph: Path, random_unet: Path, tmp_path: Path) -> None:
    """Each off by a tenth and a thousandth; the random UNet's KL divergences are smaller than that."""
    model = ir.load(metrics_graph)
    for output in list(model.graph.outputs):
        name = output.name or ""
        if not name.startswith(PREFIX):
            continue
        output.name = f"right_{name}"
        factor = ir.node("Constant", [], {"value_float": 1.1})
        product = ir.node("Mul", [output, factor.outputs[0]])
        offset = ir.node("Constant", [], {"value_float": 1e-3})
        wrong = ir.node("Add", [product.outputs[0], offset.outputs[0]])
        wrong.outputs[0].name, wrong.outputs[0].type, wrong.outputs[0].shape = name, output.type, output.shape
        model.graph.extend([factor, product, offset, wrong])
        model.graph.outputs[model.graph.outputs.index(output)] = wrong.outputs[0]
    ir.save(model, tmp_path / "wrong.onnx")
    report = validate(tmp_path / "wrong.onnx", random_unet)
    wrong_ones = {entry.name for entry in report.outputs if not entry.passed}
    assert wrong_ones == set(debug_output_names())


def test_a_plain_graph_has_none() -> None:
    with pytest.raises(
        OptionError, match="--debug-outputs has no meaning with --plain, which exports the UNet without"
    ):
        ExportOptions(sws=SwsOptions(plain=True, debug_outputs=True))
