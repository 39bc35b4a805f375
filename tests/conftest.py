"""Shared by all tests: the plain export of the trained example, and a way to run a graph as it is."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "examples" / "shapes" / "unet"

RunOnnx = Callable[[ir.Model, Mapping[str, Any]], dict[str, Any]]
ShapesOnnx = Callable[[str], Path]
ShapesModel = Callable[[str], ir.Model]


@pytest.fixture(scope="session", autouse=True)
def _no_cache() -> Iterator[None]:
    """Tests make everything anew, also in processes that they start, unless they set a cache up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWS_EXPORT_CACHE_SIZE", "0")
        yield


@pytest.fixture(scope="session")
def run_onnx() -> RunOnnx:
    """Run a model in ONNX Runtime with optimisations off; outputs by name."""
    import onnxruntime

    def run(model: ir.Model, feeds: Mapping[str, Any]) -> dict[str, Any]:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results = session.run(None, {name: np.asarray(value) for name, value in feeds.items()})
        return dict(zip([output.name for output in session.get_outputs()], results, strict=True))

    return run


@pytest.fixture(scope="session")
def shapes_onnx(tmp_path_factory: pytest.TempPathFactory) -> ShapesOnnx:
    """File of the example's plain export in `fp32` or `fp16`: written once a session, not to be changed."""
    known: dict[str, Path] = {}

    def path(precision: str) -> Path:
        if precision not in known:
            from sws_export.checkpoint import open_checkpoint
            from sws_export.onnx_files import save_onnx
            from sws_export.progress import Silent
            from sws_export.tracing.export_unet import export_plain

            file = tmp_path_factory.mktemp("shapes") / f"{precision}.onnx"
            save_onnx(export_plain(open_checkpoint(SHAPES), precision), file, Silent())
            known[precision] = file
        return known[precision]

    return path


@pytest.fixture(scope="session")
def shapes_model(shapes_onnx: ShapesOnnx) -> ShapesModel:
    """A fresh copy of the example's plain export in the precision asked for."""
    return lambda precision: ir.load(shapes_onnx(precision))
