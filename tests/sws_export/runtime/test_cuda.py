"""Sessions on a GPU, with ONNX Runtime's CUDA provider; skipped on machines without one."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from sws_export import ExportOptions, SizeOptions, SourceOptions, export
from sws_export.runtime import Session
from tests.export_runs import TRAINED, Array

STEPS = 8

pytestmark = [
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or not torch.cuda.is_available(),
        reason="needs a GPU and onnxruntime-gpu",
    ),
    # The reference: the same graph on the CPU.
    pytest.mark.filterwarnings("ignore:.*exported for onnxruntime-cuda:RuntimeWarning"),
]


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda") / f"{request.param}.onnx"
    options = ExportOptions(
        source=SourceOptions(precision=request.param),
        sizes=SizeOptions(batch="2", height="16", width="24", tokens="8"),
        backend="onnxruntime-cuda",
        validate=False,
    )
    export(TRAINED, path, options)
    return path


def predictions(graph: Path, provider: Any, place: Any, *, cuda_graphs: bool = False) -> list[Array]:
    """A trajectory; `place` moves an input to where the session should find it."""
    session = Session.load(graph, provider=provider, cuda_graphs=cuda_graphs)
    stream = session.stream()
    random = np.random.default_rng(1)
    sample = place(random.standard_normal((2, 3, 16, 24), np.float32))
    text = place(random.standard_normal((2, 8, 64), np.float32))
    intensity = place(np.array([0.5, 1.0], np.float32))
    found = []
    for step in range(STEPS):
        sigma, timestep = (
            place(np.full(2, value, np.float32)) for value in (10 * 0.6**step, 900 - 100 * step)
        )
        found.append(stream.step(sample, timestep, text, sigma=sigma, intensity=intensity))
    return [np.asarray(torch.as_tensor(x).float().cpu()) for x in found]


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("memory", ["cpu", "cuda"])
def test_a_trajectory_is_that_of_the_cpu(graph: Path, memory: str, cuda_graphs: bool) -> None:
    exact = predictions(graph, "cpu", lambda x: x)
    found = predictions(graph, "cuda", lambda x: torch.from_numpy(x).to(memory), cuda_graphs=cuda_graphs)
    tolerance = {"fp32": 1e-4, "fp16": 5e-3}[graph.stem]
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())
