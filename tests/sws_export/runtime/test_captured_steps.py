"""Steps of a graph as CUDA graphs. The GPU is the memory of the host, and the provider that of the CPU."""

import dataclasses
import gc
import signal
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from sws_export.errors import EngineError, OptionError
from sws_export.runtime import Session
from sws_export.runtime.backend import StateShapes
from sws_export.runtime.contract import Contract, read_contract
from sws_export.runtime.cuda_device import Memory
from sws_export.runtime.onnxruntime_backend import OnnxRuntimeBackend
from sws_export.runtime.onnxruntime_loop import CapturedLoop, CaptureThread
from sws_export.runtime.session import Stream
from tests.sws_export.runtime.test_tensorrt_backend import HostDevice

MakeInputs = Callable[..., dict[str, Any]]
ID = "gpu_graph_id"


class OneThread(HostDevice):
    """A GPU whose work is done in one thread."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[str] = set()
        self.fails = False
        self.interrupts = False
        self.is_done = threading.Event()

    def note(self) -> None:
        self.threads.add(threading.current_thread().name)

    def allocate(self, nbytes: int) -> Memory:
        self.note()
        memory = super().allocate(nbytes)
        weakref.finalize(memory, self.note)
        return memory

    def synchronize(self, stream: int) -> None:
        self.note()
        super().synchronize(stream)

    def download(self, array: Any, memory: Memory, stream: int) -> None:
        if self.fails:
            raise EngineError("the driver failed")
        if self.interrupts:
            self.is_done.clear()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        super().download(array, memory, stream)
        self.is_done.set()


class Backend:
    """A graph on the CPU whose loops capture their steps; the numbers of the CUDA graphs that ran."""

    device = "cpu"

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self._session = onnxruntime.InferenceSession(contract.path, providers=["CPUExecutionProvider"])
        self.gpu = OneThread()
        self._thread = CaptureThread(self.gpu, onnxruntime.RunOptions)
        self.ran: list[str] = []

    def loop(self, states: StateShapes) -> CapturedLoop:
        return CapturedLoop(self, self._contract, "cpu", states, self._thread)

    def io_binding(self) -> Any:
        self.gpu.note()
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.gpu.note()
        self.ran.append(options.get_run_config_entry(ID))
        self._session.run_with_iobinding(binding, options)


@pytest.fixture
def backend(sws_graph: Path) -> Backend:
    return Backend(read_contract(sws_graph))


def test_steps_are_those_of_a_session(sws_graph: Path, backend: Backend, inputs: MakeInputs) -> None:
    """Each direction has one CUDA graph, and buffers that stay where they are."""
    stream = Stream(read_contract(sws_graph), backend)
    other = Session.load(sws_graph, device="cpu")
    held = []
    for number in range(5):
        step = inputs(number)
        np.testing.assert_array_equal(stream.step(**step), other.step(**step))
        held.append(set(backend.gpu.held))
    assert backend.ran == ["1", "2", "1", "2", "1"]
    assert all(blocks == held[0] for blocks in held)


def test_streams_have_graphs_of_their_own(sws_graph: Path, backend: Backend, inputs: MakeInputs) -> None:
    """All captured in one thread, and freed there."""
    expected = [Session.load(sws_graph, device="cpu").step(**inputs(number)) for number in range(2)]
    streams = [Stream(read_contract(sws_graph), backend) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda number: streams[number].step(**inputs(number)), range(2)))
    np.testing.assert_array_equal(found, expected)
    assert len(set(backend.ran)) == 2
    del streams[0]
    gc.collect()
    streams[0].step(**inputs(1))
    assert backend.gpu.threads == {"cuda-graphs_0"}


@pytest.mark.filterwarnings("ignore:.*is padded to:UserWarning")
def test_a_loop_is_kept_for_other_samples_with_the_same_state(
    sws_graph: Path, backend: Backend, inputs: MakeInputs
) -> None:
    """Latents that are padded to the same size: the state starts from zero, and nothing is captured again."""
    stream = Stream(read_contract(sws_graph), backend, pad=True)
    other = Session.load(sws_graph, device="cpu")
    for number, width in enumerate((6, 5, 6)):
        step = inputs(number, width=width)
        np.testing.assert_array_equal(stream.step(**step), other.step(**step))
    assert backend.ran == ["1", "2", "1"]


def test_a_step_whose_prediction_cannot_be_read(
    sws_graph: Path, backend: Backend, inputs: MakeInputs
) -> None:
    """It leaves the state unchanged."""
    stream = Stream(read_contract(sws_graph), backend)
    stream.step(**inputs(0))
    before = stream.state()
    backend.gpu.fails = True
    with pytest.raises(EngineError, match="the driver failed"):
        stream.step(**inputs(1))
    for name, values in stream.state().items():
        np.testing.assert_array_equal(values, before[name])


def test_an_interrupted_step(sws_graph: Path, backend: Backend, inputs: MakeInputs) -> None:
    """It is complete when the interrupt arrives at the caller, and leaves the state unchanged."""
    stream = Stream(read_contract(sws_graph), backend)
    stream.step(**inputs(0))
    before = stream.state()
    backend.gpu.interrupts = True
    with pytest.raises(KeyboardInterrupt):
        stream.step(**inputs(1))
    assert backend.gpu.is_done.is_set()
    for name, values in stream.state().items():
        np.testing.assert_array_equal(values, before[name])


def test_a_state_is_read_and_written(sws_graph: Path, backend: Backend, inputs: MakeInputs) -> None:
    stream = Stream(read_contract(sws_graph), backend)
    stream.step(**inputs(0))
    kept = stream.state()
    second = stream.step(**inputs(1))
    stream.restore(kept)
    np.testing.assert_array_equal(stream.step(**inputs(1)), second)


def test_a_provider_that_captures_nothing(sws_graph: Path) -> None:
    with pytest.raises(
        OptionError, match=r"\.onnx: cuda_graphs=True is for engines and for provider='cuda', found 'cpu'"
    ):
        Session.load(sws_graph, provider="cpu", cuda_graphs=True)


def captured_contract(graph: Path, *, static: bool) -> Contract:
    """That of a graph as if it was exported for CUDA graphs, also with static shapes."""
    found = read_contract(graph)
    inputs = found.inputs
    if static:
        inputs = tuple(
            dataclasses.replace(spec, shape=tuple(8 if isinstance(n, str) else n for n in spec.shape))
            for spec in inputs
        )
    manifest = {**found.manifest, "target": "onnxruntime-cuda"}
    return dataclasses.replace(found, inputs=inputs, manifest=manifest)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime lists the CUDA provider."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("provider", ["cuda", None])
def test_a_graph_of_another_target(sws_graph: Path, provider: str | None) -> None:
    with pytest.raises(
        EngineError, match=r"was exported for onnxruntime, .* with --backend onnxruntime-cuda"
    ):
        Session.load(sws_graph, provider=provider, cuda_graphs=True)


def test_no_cuda_provider(sws_graph: Path) -> None:
    """CUDA graphs are asked for without a provider."""
    contract = captured_contract(sws_graph, static=True)
    with pytest.raises(EngineError, match=r"has no CUDA provider here; install it with: .*\[gpu\]"):
        OnnxRuntimeBackend(contract, None, None, cuda_graphs=True)


@pytest.mark.usefixtures("cuda")
def test_a_graph_that_onnxruntime_cannot_capture(sws_graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("This session cannot use the graph capture feature as requested by the user")

    monkeypatch.setattr(onnxruntime, "InferenceSession", reject)
    contract = captured_contract(sws_graph, static=True)
    with pytest.raises(EngineError, match=r"cannot capture the steps of .*\.onnx as CUDA graphs; load it"):
        OnnxRuntimeBackend(contract, None, None, cuda_graphs=True)


@pytest.mark.usefixtures("cuda")
def test_dynamic_shapes(sws_graph: Path) -> None:
    contract = captured_contract(sws_graph, static=False)
    with pytest.raises(EngineError, match=r"dynamic shapes \(batch, height, .* with --batch N --height N"):
        OnnxRuntimeBackend(contract, "cuda", None, cuda_graphs=True)
