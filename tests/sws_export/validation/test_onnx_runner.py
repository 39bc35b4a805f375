"""A graph in ONNX Runtime, whole and partitioned: the same outputs, and the state fed back."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sws_export import ExportOptions, SourceOptions, export
from sws_export.errors import ExportError
from sws_export.progress import SilentProgress
from sws_export.validation.onnx_runner import OnnxRunner
from sws_export.validation.trajectory import Array
from tests.export_runs import ONE_SITE

INPUTS: dict[str, Array] = {
    "sample": np.random.default_rng(0).standard_normal((2, 4, 8, 6)),
    "timestep": np.array([500.0, 300.0]),
    "encoder_hidden_states": np.random.default_rng(1).standard_normal((2, 3, 16)),
    "sigma": np.array([3.0, 1.0]),
    "intensity": np.array([1.0, 0.5]),
    "unknown": np.ones(1),
}
STEPS = [INPUTS | {"sigma": np.array(sigma)} for sigma in ([3.0, 1.0], [10.0, 2.0], [0.5, 0.4])]


@pytest.fixture(scope="module")
def graphs(quick_trace: Path, random_unet: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A graph of each precision, its weights in a file beside it."""
    folder = tmp_path_factory.mktemp("graphs")
    made = {}
    for precision in ("fp32", "fp16", "bf16"):
        embedded = folder / f"{precision}-embedded.onnx"
        export(
            random_unet,
            embedded,
            ExportOptions(source=SourceOptions(precision=precision), sws=ONE_SITE, validate=False),
        )
        made[precision] = folder / f"{precision}.onnx"
        ir.save(ir.load(embedded), made[precision], external_data=f"{precision}.data")
    return made


SMALL = 100_000
"""Bytes of weights in each subgraph of a partitioned graph."""


def run(path: Path, steps: list[dict[str, Array]] = STEPS, **options: int) -> list[dict[str, Array]]:
    with SilentProgress().stage("run") as stage:
        return OnnxRunner(path, **options).run(steps, stage)


# ONNX Runtime fuses no operators across subgraphs, and rounds to float16 at their boundaries.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 4e-3), ("bf16", 1e-5)])
def test_a_partitioned_graph_computes_the_same_outputs(
    graphs: dict[str, Path], precision: str, tolerance: float
) -> None:
    whole = run(graphs[precision])
    assert OnnxRunner(graphs[precision]).subgraph_count == 1
    assert OnnxRunner(graphs[precision], SMALL).subgraph_count > 10
    partitioned = run(graphs[precision], subgraph_bytes=SMALL)
    assert [list(outputs) for outputs in partitioned] == [list(outputs) for outputs in whole]
    for actual, expected in zip(partitioned, whole, strict=True):
        for name, value in expected.items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(actual[name], value, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("options", [{}, {"subgraph_bytes": SMALL}])
def test_the_state_is_fed_back(graphs: dict[str, Path], options: dict[str, int]) -> None:
    together = run(graphs["fp32"], **options)
    assert together[0]["sws_state_d2_out"].shape == (2, 145, 4, 3)
    alone = run(graphs["fp32"], STEPS[2:], **options)
    assert not np.allclose(together[2]["sws_state_d2_out"], alone[0]["sws_state_d2_out"], atol=1e-4)
    with SilentProgress().stage("run") as stage:
        runner = OnnxRunner(graphs["fp32"], **options)
        one_by_one = [outputs for step in STEPS for outputs in runner.run([step], stage)]
    for a, b in zip(together, one_by_one, strict=True):
        for name, value in a.items():
            np.testing.assert_array_equal(b[name], value)


def test_a_file_that_onnx_runtime_cannot_load(graphs: dict[str, Path], tmp_path: Path) -> None:
    model = ir.load(graphs["fp32"])
    model.graph.opset_imports[""] = 999
    broken = tmp_path / "broken.onnx"
    ir.save(model, broken)
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot load .*broken.onnx: .*opset"):
        OnnxRunner(broken)
