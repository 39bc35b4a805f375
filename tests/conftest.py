"""Fixtures of all tests: the plain export of the trained example, and a graph run without optimisations."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sws_export.tensors import Precision
from tests import export_runs

# Models are small here: more threads of torch than one in each test process spend their time waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# ONNX Runtime has a thread for each processor, which spins while it waits. With one processor a test process
# has one thread, and takes up to a seventh less processor time.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[int(worker.removeprefix("gw")) % len(processors)]})
# Graphs are many small objects: with its default thresholds the collector takes a quarter of an export.
gc.set_threshold(50_000, 50, 100)
# A shell starts background jobs with SIGINT ignored; tests interrupt themselves and their child processes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "examples" / "shapes" / "unet"

RunOnnx = Callable[[ir.Model, Mapping[str, Any]], dict[str, Any]]
ShapesOnnx = Callable[[Precision], Path]
ShapesModel = Callable[[Precision], ir.Model]


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, which would search all of it each time."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_cache() -> Iterator[None]:
    """Tests run without a cache, also in subprocesses, unless they configure one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWS_EXPORT_CACHE_SIZE", "0")
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_signature_per_operator() -> Iterator[None]:
    """Keep the signatures of operators, which onnxscript derives from their schemas again for each node.

    Functions of domain `sws` have up to two thousand nodes: it is a tenth of the time of the tests of passes.
    """
    derive = ir.schemas.OpSignature.from_op_schema
    signatures: dict[tuple[str, str, int], ir.schemas.OpSignature] = {}

    def kept(schema: onnx.defs.OpSchema) -> ir.schemas.OpSignature:
        key = schema.domain, schema.name, schema.since_version
        if key not in signatures:
            signatures[key] = derive(schema)
        return signatures[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ir.schemas.OpSignature, "from_op_schema", kept)
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
    """The file of the example's plain export in a precision: written once a session, not to be changed."""

    def write(file: Path, precision: Precision) -> None:
        from sws_export.checkpoint import open_checkpoint
        from sws_export.onnx_files import save_onnx
        from sws_export.progress import SilentProgress
        from sws_export.tracing.export_unet import export_plain

        save_onnx(export_plain(open_checkpoint(SHAPES), precision), file, SilentProgress())

    def path(precision: Precision) -> Path:
        name = f"shapes-{precision}.onnx"
        return export_runs.shared(tmp_path_factory, name, lambda file: write(file, precision))

    return path


@pytest.fixture(scope="session")
def shapes_model(shapes_onnx: ShapesOnnx) -> ShapesModel:
    """A copy of the example's plain export in a precision, which the test may change."""
    return lambda precision: ir.load(shapes_onnx(precision))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the tracked files as in a fresh clone."""

    def build(directory: Path) -> None:
        command = ["git", "-C", ROOT, "ls-files", "-z", "--", ".", ":!examples", ":!tests", ":!benchmarks"]
        tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for name in filter(None, tracked.split("\0")):
            target = directory / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
        options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", directory]
        pip = [sys.executable, "-m", "pip", "wheel", *options, directory / "source"]
        subprocess.run(pip, check=True, timeout=300)

    (built,) = export_runs.shared(tmp_path_factory, "wheel", build).glob("*.whl")
    return built


@pytest.fixture(scope="session")
def random_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers directory with a UNet of random weights in float32."""
    return export_runs.shared(tmp_path_factory, "random_unet", export_runs.make_unet)


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory, random_unet: Path) -> Path:
    """The plain graph of `random_unet`, as `sws-export --plain` writes it."""
    return export_runs.shared(
        tmp_path_factory, "traced.onnx", lambda path: export_runs.trace(random_unet, path)
    )
