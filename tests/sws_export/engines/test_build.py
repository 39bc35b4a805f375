"""Builds with TensorRT for RTX in the child process, and every way in which a build can end."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import onnx
import psutil
import pytest

from sws_export.engines import build
from sws_export.engines.backend import BuildOptions
from sws_export.engines.build import EngineReport, build_engine, log_warnings
from sws_export.engines.choice import get_backend
from sws_export.engines.header import plan_header
from sws_export.errors import EngineError, OptionError

OPTIONS = BuildOptions(get_backend("tensorrt-rtx"), compute_capabilities=("8.9",))
TREE = Path(__file__).parents[3]


def build_processes(process=None):
    found = (process or psutil.Process()).children(recursive=True)
    return [child for child in found if "sws_export.engines.child" in " ".join(child.cmdline())]


@pytest.fixture
def plan(tmp_path):
    """Path of the plan; checks that no build process is left after the test."""
    yield tmp_path / "out" / "engine.plan"
    assert not build_processes()


@pytest.fixture(autouse=True)
def _out(tmp_path):
    (tmp_path / "out").mkdir()


@pytest.mark.parametrize(
    ("dtype", "head_size", "decomposed"),
    [("float16", 64, 0), ("bfloat16", 40, 0), ("float32", 64, 1), ("float16", 8, 1)],
)
def test_an_engine_is_built_and_measured(tmp_path, plan, small, shapes, dtype, head_size, decomposed):
    onnx.save(small(dtype, head_size), tmp_path / "m.onnx")
    options = BuildOptions(OPTIONS.backend, compute_capabilities=("8.9", "12.0"))
    report = build_engine(tmp_path / "m.onnx", plan, [shapes], options)
    assert report.size == plan.stat().st_size == plan_header(plan).size
    assert report.compute_capabilities == ("8.9", "12.0")
    assert report.decomposed_attentions == decomposed
    assert report.layers > 10
    assert 100e6 < report.peak_memory < 2e9
    assert 0 < report.build_seconds < report.seconds
    assert report.gpu_memory.weights > 1000
    assert report.gpu_memory.profiles[0].activations > 0
    assert EngineReport.from_json(json.loads(json.dumps(dataclasses.asdict(report)))) == report


def test_an_engine_with_two_profiles(graph, plan, shapes):
    narrow = {name: (optimal, optimal, optimal) for name, (_, optimal, _) in shapes.items()}
    report = build_engine(graph, plan, [narrow, shapes], OPTIONS)
    first, second = report.gpu_memory.profiles
    assert 0 < first.activations < second.activations


def test_a_complete_engine_with_an_unknown_header_is_kept(graph, plan, shapes, recorder):
    class NextFormat(recorder):
        """Replaces the first bytes of the complete plan."""

        @contextlib.contextmanager
        def stage(self, name, total=None):
            with super().stage(name, total):
                yield self
            with plan.open("r+b") as file:
                file.write(b"next")

    progress = NextFormat()
    report = build_engine(graph, plan, [shapes], OPTIONS, progress)
    assert plan.stat().st_size == report.size > 0
    assert report.compute_capabilities == OPTIONS.targets
    (warning,) = [text for text in progress.warnings if "header" in text]
    assert "unknown layout" in warning
    assert str(plan) in warning


def test_warnings_that_ask_for_nothing_are_remarks(recorder):
    progress, scales = recorder(), "(foreignNode) Converting conv weight scales to fp32."
    warnings = {scales: 82} | {f"slow {number}": 1 for number in range(7)}
    log_warnings(
        EngineReport("tensorrt-rtx", "1.7", ("8.9",), 6, 1.0, 0.5, 0.5, 10**6, 3, 0, warnings), progress
    )
    assert progress.logged == [f"tensorrt-rtx: {scales} (82 times)"]
    assert progress.warnings[:1] == ["tensorrt-rtx: slow 0"]
    assert progress.warnings[5:] == ["tensorrt-rtx: 2 more warnings, see the manifest"]


def test_a_graph_with_external_weights(tmp_path, plan, small, shapes):
    onnx.save(small(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert build_engine(tmp_path / "m.onnx", plan, [shapes], OPTIONS).size > 0


def test_weight_streaming_and_optimization_level(graph, plan, shapes):
    options = BuildOptions(
        OPTIONS.backend, compute_capabilities=("8.9",), optimization_level=0, weight_streaming=True
    )
    assert build_engine(graph, plan, [shapes], options).size > 0


def test_relative_paths(graph, plan, shapes, monkeypatch):
    monkeypatch.chdir(plan.parent)
    build_engine(Path("..") / graph.name, Path(plan.name), [shapes], OPTIONS)
    assert plan.exists()


def test_progress_receives_phases_and_memory(long_graph, plan, long_shapes, recorder):
    progress = recorder()
    build_engine(long_graph, plan, [long_shapes], OPTIONS, progress)
    assert progress.stages == ["engine (tensorrt-rtx)"]
    check, *build = progress.described
    assert check == "checking the graph"
    phases = {text.rpartition(",")[0] for text in build}
    assert {"parsing the graph", "Building engine from subgraph"} <= phases
    assert all(text.endswith(" GB") for text in build)


def test_a_custom_operator_is_an_error_before_parsing(tmp_path, plan, small, shapes):
    model = small()
    model.graph.node[4].domain = "sws"
    model.opset_import.append(onnx.helper.make_opsetid("sws", 1))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(EngineError, match="has custom operators: sws::Attention"):
        build_engine(tmp_path / "m.onnx", plan, [shapes], OPTIONS)


def test_a_parser_error_leaves_no_file(tmp_path, plan, small, shapes):
    model = small()
    model.graph.node[4].input[0] = "x"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(EngineError, match=r"cannot parse .* at node 'site' \(Attention\)"):
        build_engine(tmp_path / "m.onnx", plan, [shapes], OPTIONS)
    assert list(plan.parent.iterdir()) == []


def test_a_builder_error_quotes_the_library(graph, plan, shapes):
    # The height is the same symbol in both inputs, so their ranges must overlap.
    apart = dict(shapes) | {"sws_state_d1": ((1, 145, 17, 16), (2, 145, 17, 16), (4, 145, 18, 32))}
    apart["sample"] = ((1, 4, 8, 16), (2, 4, 8, 16), (4, 4, 16, 32))
    with pytest.raises(
        EngineError, match=r"tensorrt_rtx .* cannot build an engine from .*height: .* contradictory"
    ):
        build_engine(graph, plan, [apart], OPTIONS)
    assert list(plan.parent.iterdir()) == []


def test_missing_shapes_are_an_option_error(graph, plan, shapes):
    with pytest.raises(OptionError, match="no shapes for input sample"):
        build_engine(graph, plan, [{"sws_state_d1": shapes["sws_state_d1"]}], OPTIONS)


def test_an_output_path_that_cannot_be_written(graph, tmp_path, shapes):
    out = tmp_path / "missing" / "engine.plan"
    with pytest.raises(FileNotFoundError, match=str(out)):
        build_engine(graph, out, [shapes], OPTIONS)


def is_library_phase(described):
    """Whether a phase of the library is reported; which one depends on how fast they are."""
    return bool(described) and not described.startswith(("starting", "checking"))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (signal.SIGKILL, r"ended by SIGKILL in phase .* of .* GB of memory; most likely memory ran out"),
        (signal.SIGABRT, r"ended by SIGABRT in phase .*; this is a bug of the library"),
    ],
)
def test_a_killed_build_process_is_an_error(long_graph, plan, long_shapes, recorder, number, text):
    ended = []

    def kill(described):
        if is_library_phase(described) and not ended:
            ended.extend(build_processes())
            for child in ended:
                child.send_signal(number)

    with pytest.raises(EngineError, match=text):
        build_engine(long_graph, plan, [long_shapes], OPTIONS, recorder(kill))
    assert list(plan.parent.iterdir()) == []


def test_an_interrupt_ends_the_build_process(long_graph, plan, long_shapes, recorder):
    seen = []

    def interrupt(described):
        if is_library_phase(described) and not seen:
            seen.extend(build_processes())
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_engine(long_graph, plan, [long_shapes], OPTIONS, recorder(interrupt))
    assert len(seen) == 1
    assert not seen[0].is_running()
    assert list(plan.parent.iterdir()) == []


PROGRAM = """
    import contextlib, sys
    from pathlib import Path
    from sws_export.engines.backend import BuildOptions
    from sws_export.engines.build import EngineReport, build_engine
    from sws_export.engines.choice import get_backend

    class Printer:
        @contextlib.contextmanager
        def stage(self, name, total=None):
            yield self
        def describe(self, text):
            print(text, flush=True)
        def warn(self, text):
            pass

    build_engine(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        [{shapes}],
        BuildOptions(get_backend("tensorrt-rtx"), compute_capabilities=("8.9",)),
        Printer(),
    )
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_build_process_does_not_outlive_its_parent(long_graph, plan, long_shapes, number):
    program = textwrap.dedent(PROGRAM).replace("{shapes}", repr(long_shapes))
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(long_graph), str(plan)],
        cwd=TREE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with parent:
        while not is_library_phase(parent.stdout.readline()):
            assert parent.poll() is None
        (child,) = build_processes(psutil.Process(parent.pid))
        parent.send_signal(number)
        _, errors = parent.communicate()
    assert parent.returncode == -number
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    if number == signal.SIGINT:
        assert list(plan.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "printed", "text"),
    [
        (
            signal.SIGABRT,
            "terminate called\n  what():  std::bad_alloc\n",
            "most likely memory ran out: close",
        ),
        (
            signal.SIGABRT,
            "free(): invalid pointer\n",
            r"last output: free\(\): invalid pointer; this is a bug",
        ),
        (
            signal.SIGSEGV,
            "",
            "ended by SIGSEGV in phase 'starting', at 0.0 of .*; this is a bug of the library",
        ),
    ],
)
def test_the_cause_is_read_from_the_output(number, printed, text):
    with pytest.raises(EngineError, match=text):
        build.raise_failure(-number, build.Outcome(), printed, OPTIONS)


def test_an_exception_of_windows_is_an_error_of_the_library():
    with pytest.raises(EngineError, match="ended by exception 0xc0000005 in phase 'starting'"):
        build.raise_failure(0xC0000005, build.Outcome(), "", OPTIONS)


def test_a_bug_in_the_build_process_keeps_its_traceback():
    with pytest.raises(RuntimeError, match=r"ended with status 1:\nTraceback .*KeyError"):
        build.raise_failure(1, build.Outcome(), "Traceback ... KeyError", OPTIONS)
