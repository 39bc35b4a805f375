"""Exports of the trained example, traced once for each precision, and the reference's run of five steps."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graph_passes.parameters import SwsParameters
from sws_export import ExportOptions, SwsOptions
from sws_export.reference.attention import SiteResult
from sws_export.tensors import Precision
from tests.conftest import ShapesOnnx
from tests.export_runs import TRAINED, Array, Outputs, Session, export_once

HEIGHT, WIDTH = 16, 12
TIGHT = SwsParameters(kl_floor=1e-5, kl_slope=0.0)

ExportTrained = Callable[..., Path]


@pytest.fixture(scope="session")
def export_trained(shapes_onnx: ShapesOnnx, tmp_path_factory: pytest.TempPathFactory) -> ExportTrained:
    """Exports of the trained example's plain graph in a precision, each made once a session."""

    def run(precision: Precision = "fp32", **sws: Any) -> Path:
        options = ExportOptions(sws=SwsOptions(**sws), validate=False)
        return export_once(tmp_path_factory, shapes_onnx(precision), options)

    return run


@pytest.fixture(scope="session")
def plain(shapes_onnx: ShapesOnnx) -> Session:
    """The example without SWS."""
    return Session(shapes_onnx("fp32"))


@pytest.fixture(scope="session")
def graph(export_trained: ExportTrained) -> Path:
    """The example with SWS in float32."""
    return export_trained()


@pytest.fixture(scope="session")
def half_graph(export_trained: ExportTrained) -> Path:
    """The example with SWS in float16."""
    return export_trained("fp16")


@pytest.fixture(scope="session")
def tight_graph(export_trained: ExportTrained) -> Path:
    """The example with a KL budget so small that every bisection binds."""
    return export_trained(parameters=TIGHT)


@dataclasses.dataclass(frozen=True)
class Run:
    """Five steps from noise to image; members differ in latent, text, noise level and intensity.

    Attributes:
        steps: Inputs of each step.
        expected: Prediction and state of each step by the reference in float64.
        records: What the reference computed at each site in each step.
    """

    steps: list[dict[str, Array]]
    expected: list[tuple[Array, Outputs]]
    records: list[dict[str, SiteResult]]


def inputs_of_steps(
    batch: int = 2, height: int = HEIGHT, width: int = WIDTH, tokens: int = 7
) -> list[Outputs]:
    random = np.random.default_rng(0)
    text = random.standard_normal((batch, tokens, 64))
    steps = []
    for index, sigma in enumerate(np.geomspace(14.0, 0.4, 5)):
        sigmas = sigma * 0.8 ** np.arange(batch)
        steps.append(
            {
                "sample": random.standard_normal((batch, 3, height, width)),
                "timestep": np.full(batch, 900.0 - 200.0 * index) - 10.0 * np.arange(batch),
                "encoder_hidden_states": text,
                "sigma": sigmas,
                "intensity": np.linspace(1.0, 0.5, batch),
            }
        )
    return steps


@pytest.fixture(scope="session")
def reference_run() -> Callable[[SwsParameters], Run]:
    """The run by the reference in float64 with some parameters."""
    import torch

    from sws_export.checkpoint import open_checkpoint
    from sws_export.checkpoint.unet_module import load_unet
    from sws_export.reference import ReferenceUNet

    unet = load_unet(open_checkpoint(TRAINED), torch.float64)
    known: dict[SwsParameters, Run] = {}

    def run(parameters: SwsParameters) -> Run:
        if parameters not in known:
            reference = ReferenceUNet(unet, parameters)
            steps, expected, records, state = inputs_of_steps(), [], [], None
            for inputs in steps:
                tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
                out, state = reference.step(**tensors, state=state)
                expected.append((out.numpy(), {name: value.numpy() for name, value in state.items()}))
                records.append(dict(reference.records))
            known[parameters] = Run(steps, expected, records)
        return known[parameters]

    return run
