"""The logic of the TensorRT backend, on a device of host memory and a library that runs the graph elsewhere.

Nothing here shows that a GPU is driven rightly: only that addresses, shapes, turns and recordings are.
"""

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from sws_export.errors import EngineError, StepError
from sws_export.runtime import Session
from sws_export.runtime.contract import Contract, read_contract
from sws_export.runtime.cuda_device import Memory
from sws_export.runtime.inputs import Array
from sws_export.runtime.session import Stream
from sws_export.runtime.tensorrt_backend import TensorRtBackend
from sws_export.tensors import ProfileShapes, Range, SizeRanges, shapes_for
from tests.sws_export.runtime.test_contract import make_plan

MakeInputs = Callable[..., dict[str, Any]]
STREAM = 7


class HostDevice:
    """Memory of the host in place of a GPU's. Work in a recording is kept in place of being done."""

    name = "host"
    capability = "8.9"

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.launches = 0
        self.captures = 0
        self.copies = 0
        self.transfers: list[int] = []
        """Bytes of each copy between host and device."""
        self.has_tensors = False
        """Whether addresses outside the blocks of this device may be used: those of torch tensors."""

    def activate(self) -> None:
        pass

    def stream(self) -> int:
        return STREAM

    def allocate(self, nbytes: int) -> Memory:
        block = ctypes.create_string_buffer(b"\xff" * nbytes, nbytes)
        self.held[ctypes.addressof(block)] = block
        return Memory(ctypes.addressof(block), self.held.pop)

    def zero(self, memory: Memory, nbytes: int, stream: int) -> None:
        assert stream == STREAM
        ctypes.memset(memory.address, 0, nbytes)

    def upload(self, memory: Memory, array: Array, stream: int) -> None:
        assert stream == STREAM
        assert array.flags.c_contiguous
        assert array.nbytes <= len(self.held[memory.address])
        self.transfers.append(array.nbytes)
        ctypes.memmove(memory.address, array.ctypes.data, array.nbytes)

    def download(self, array: Array, memory: Memory, stream: int) -> None:
        assert stream == STREAM
        assert array.nbytes <= len(self.held[memory.address])
        self.transfers.append(array.nbytes)
        ctypes.memmove(array.ctypes.data, memory.address, array.nbytes)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        assert stream == STREAM
        assert (target in self.held) != (source in self.held)
        self.copies += 1
        ctypes.memmove(target, source, nbytes)

    def synchronize(self, stream: int) -> None:
        assert stream == STREAM

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Callable[[], None]:
        assert stream == STREAM
        self.captures += 1
        self.recording = recorded = []
        enqueue()
        self.recording = None

        def launch() -> None:
            self.launches += 1
            for work in recorded:
                work()

        return launch


class FakeContext:
    """An execution context that runs the ONNX graph on what lies at the addresses it was given."""

    def __init__(self, graph: Path, device: HostDevice) -> None:
        self._session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self._device = device
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.seen: list[dict[str, int]] = []
        self.failing = False
        self.profiles: list[int] = []

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        self.profiles.append(profile_index)
        self.shapes.clear()
        self.addresses.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self._device.held or self._device.has_tensors
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        if self.failing:
            return False

        def work() -> None:
            self._compute(addresses, shapes)

        if self._device.recording is None:
            work()
        else:
            self._device.recording.append(work)
        return True

    def _compute(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        self.seen.append(addresses)
        feeds = {name: self._array(addresses[name], shapes[name]).copy() for name in shapes}
        for node, value in zip(self._session.get_outputs(), self._session.run(None, feeds), strict=True):
            assert addresses[node.name] not in [addresses[name] for name in shapes]
            self._array(addresses[node.name], value.shape)[...] = value

    @staticmethod
    def _array(address: int, shape: tuple[int, ...]) -> Array:
        count = int(np.prod(shape))
        return np.frombuffer((ctypes.c_float * count).from_address(address), np.float32).reshape(shape)


def profile_of_shape(shape: Sequence[int | str]) -> tuple[tuple[int, ...], ...]:
    """Smallest, optimal and largest shape of an input of a fake engine: each open size is 1, 2 or 64."""
    return tuple(tuple(size if isinstance(size, int) else open_ for size in shape) for open_ in (1, 2, 64))


def fake_engine(session: onnxruntime.InferenceSession) -> SimpleNamespace:
    """An engine with the tensors of a graph."""
    nodes = {node.name: node for node in (*session.get_inputs(), *session.get_outputs())}
    inputs = [node.name for node in session.get_inputs()]
    return SimpleNamespace(
        num_io_tensors=len(nodes),
        get_tensor_name=list(nodes).__getitem__,
        get_tensor_mode=lambda name: "input" if name in inputs else "output",
        get_tensor_dtype=lambda _: SimpleNamespace(name="FLOAT"),
        get_tensor_shape=lambda name: [size if isinstance(size, int) else -1 for size in nodes[name].shape],
        num_optimization_profiles=1,
        get_tensor_profile_shape=lambda name, _: profile_of_shape(nodes[name].shape),
    )


class FakeLibrary:
    """As much of the TensorRT module as the backend uses."""

    __name__ = "tensorrt_rtx"
    __version__ = "1.7.1"
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")

    ExecutionContextAllocationStrategy = SimpleNamespace(ON_PROFILE_CHANGE="on profile change")

    class ILogger:
        Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, INFO=3)

    def __init__(self, graph: Path, device: HostDevice, complaint: str = "") -> None:
        self.contexts: list[FakeContext] = []
        self.strategies: list[str | None] = []
        self.complaint = complaint

        def create_execution_context(strategy: str | None = None) -> FakeContext:
            self.strategies.append(strategy)
            self.contexts.append(FakeContext(graph, device))
            return self.contexts[-1]

        self.engine = fake_engine(onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]))
        self.engine.create_execution_context = create_execution_context
        self.runtimes: list[Any] = []

    def Runtime(self, logger: Any) -> Any:  # noqa: N802  (TensorRT's name)
        def deserialize_cuda_engine(plan: bytes) -> Any:
            assert plan[:4] == b"vtrt"
            logger.log(self.ILogger.Severity.INFO, "all is well")
            if self.complaint:
                logger.log(self.ILogger.Severity.ERROR, self.complaint)
                return None
            return self.engine

        self.runtimes.append(SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine))
        return self.runtimes[-1]


def engine_contract(graph: Path, folder: Path) -> Contract:
    """The contract of a fake engine of `graph`."""
    contract = read_contract(graph)
    profile = {entry["name"]: profile_of_shape(entry["shape"]) for entry in contract.manifest["inputs"]}
    return dataclasses.replace(contract, path=make_plan(folder / "engine.plan"), profiles=(profile,))


def profile_of_sizes(contract: Contract, **ranges: tuple[int, int]) -> ProfileShapes:
    sizes = SizeRanges(**{name: Range(low, high, high) for name, (low, high) in ranges.items()})
    return shapes_for([*contract.inputs, *(pair.spec for pair in contract.states)], sizes)


def with_profiles(contract: Contract, library: FakeLibrary, *profiles: ProfileShapes) -> Contract:
    """The contract of an engine with these profiles, which is that of `library` from now on."""
    library.engine.num_optimization_profiles = len(profiles)
    library.engine.get_tensor_profile_shape = lambda name, index: profiles[index][name]
    return dataclasses.replace(contract, profiles=profiles)


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def library(sws_graph: Path, device: HostDevice) -> FakeLibrary:
    return FakeLibrary(sws_graph, device)


@pytest.fixture
def contract(sws_graph: Path, tmp_path: Path) -> Contract:
    return engine_contract(sws_graph, tmp_path)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_steps_are_those_of_onnx_runtime(
    contract: Contract,
    library: FakeLibrary,
    device: HostDevice,
    sws_graph: Path,
    inputs: MakeInputs,
    cuda_graphs: bool,
) -> None:
    stream = Stream(contract, TensorRtBackend(contract, library, device, cuda_graphs=cuda_graphs))
    other = Session.load(sws_graph, device="cpu")
    for number in range(6):
        if number == 4:
            stream.reset([1])
            other.reset([1])
        np.testing.assert_allclose(
            stream.step(**inputs(number)), other.step(**inputs(number)), rtol=0, atol=1e-6
        )
        for name, values in other.state().items():
            np.testing.assert_allclose(stream.state()[name], values, rtol=0, atol=1e-6)


def test_state_stays_in_two_buffers(
    contract: Contract, library: FakeLibrary, device: HostDevice, inputs: MakeInputs
) -> None:
    stream = Stream(contract, TensorRtBackend(contract, library, device, cuda_graphs=False))
    for number in range(4):
        stream.step(**inputs(number))
    turns = [(seen["sws_state_d2"], seen["sws_state_d2_out"]) for seen in library.contexts[0].seen]
    assert turns == [turns[0], turns[0][::-1]] * 2
    assert turns[0][0] != turns[0][1]


def test_each_direction_is_recorded_once(
    contract: Contract, library: FakeLibrary, device: HostDevice, inputs: MakeInputs
) -> None:
    stream = Stream(contract, TensorRtBackend(contract, library, device, cuda_graphs=True))
    for number in range(8):
        stream.step(**inputs(number))
    # One run of each direction outside a recording, then all from the two recordings.
    assert (device.captures, device.launches) == (2, 6)


def test_more_tokens_are_recorded_anew(
    contract: Contract, library: FakeLibrary, device: HostDevice, sws_graph: Path, inputs: MakeInputs
) -> None:
    stream = Stream(contract, TensorRtBackend(contract, library, device, cuda_graphs=True))
    other = Session.load(sws_graph, device="cpu")
    for number in range(10):
        step = inputs(number)
        if number >= 5:
            step["encoder_hidden_states"] = np.tile(step["encoder_hidden_states"], (1, 2, 1))
        np.testing.assert_allclose(stream.step(**step), other.step(**step), rtol=0, atol=1e-6)
    assert device.captures == 4


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_the_narrowest_profile_of_a_step_is_used(
    contract: Contract,
    library: FakeLibrary,
    device: HostDevice,
    sws_graph: Path,
    inputs: MakeInputs,
    cuda_graphs: bool,
) -> None:
    wide = profile_of_sizes(contract, batch=(1, 4), height=(8, 16), width=(6, 12), tokens=(1, 77))
    narrow = profile_of_sizes(contract, batch=(2, 2), height=(8, 8), width=(6, 6), tokens=(5, 5))
    several = with_profiles(contract, library, wide, narrow)
    stream = Stream(several, TensorRtBackend(several, library, device, cuda_graphs=cuda_graphs))
    other = Session.load(sws_graph, device="cpu")
    for number, tokens in enumerate((5, 5, 5, 9, 9, 9, 5, 5)):
        step = inputs(number, tokens=tokens)
        np.testing.assert_allclose(stream.step(**step), other.step(**step), rtol=0, atol=1e-6)
    (context,) = library.contexts
    assert context.profiles == [1, 0, 1]
    assert library.strategies == ["on profile change"]


def test_a_step_outside_all_profiles(
    contract: Contract, library: FakeLibrary, device: HostDevice, inputs: MakeInputs
) -> None:
    profiles = tuple(
        profile_of_sizes(contract, batch=(2, 2), height=(side, side), width=(6, 6), tokens=(5, 5))
        for side in (8, 16)
    )
    several = with_profiles(contract, library, *profiles)
    stream = Stream(several, TensorRtBackend(several, library, device, cuda_graphs=False))
    message = (
        "the step has batch 3, height 8, width 6, tokens 5, and none of the profiles of the engine accepts "
        "that: batch 2, height 8, width 6, tokens 5; batch 2, height 16, width 6, tokens 5; build it again "
        "with: sws-export traced.onnx --out engine.plan --profile batch=2,height=8,width=6,tokens=5 "
        "--profile batch=2,height=16,width=6,tokens=5 --profile batch=3,height=8,width=6,tokens=5, and the"
    )
    with pytest.raises(StepError, match=message):
        stream.step(**inputs(batch=3))
    with pytest.raises(StepError, match="the step has batch 2, height 12, width 6, tokens 5, and none"):
        stream.step(**inputs(height=12))


def test_an_engine_with_more_profiles_than_its_manifest(
    contract: Contract, library: FakeLibrary, device: HostDevice
) -> None:
    library.engine.num_optimization_profiles = 2
    with pytest.raises(EngineError, match="the engine has 2 optimization profiles, the manifest 1; copy"):
        TensorRtBackend(contract, library, device, cuda_graphs=False)


def test_another_size_frees_the_old_buffers(
    contract: Contract, library: FakeLibrary, device: HostDevice, inputs: MakeInputs
) -> None:
    stream = Stream(contract, TensorRtBackend(contract, library, device, cuda_graphs=False))
    stream.step(**inputs())
    before = len(device.held)
    stream.step(**inputs(height=12))
    library.contexts.clear()
    assert len(device.held) == before


def test_streams_have_contexts_of_their_own(
    contract: Contract, library: FakeLibrary, device: HostDevice, inputs: MakeInputs
) -> None:
    backend = TensorRtBackend(contract, library, device, cuda_graphs=False)
    first, second = Stream(contract, backend), Stream(contract, backend)
    alone = first.step(**inputs(0))
    first.step(**inputs(1))
    assert np.array_equal(second.step(**inputs(0)), alone)
    assert len(library.contexts) == 2


def test_a_step_that_fails_leaves_the_state(
    contract: Contract, library: FakeLibrary, device: HostDevice, inputs: MakeInputs
) -> None:
    stream = Stream(contract, TensorRtBackend(contract, library, device, cuda_graphs=False))
    stream.step(**inputs(0))
    before = stream.state()["sws_state_d2"]
    library.contexts[0].failing = True
    with pytest.raises(EngineError, match="TensorRT rejects this step, and the state is unchanged"):
        stream.step(**inputs(1))
    assert np.array_equal(stream.state()["sws_state_d2"], before)


def test_a_plan_for_another_gpu(contract: Contract, library: FakeLibrary, device: HostDevice) -> None:
    device.capability = "9.0"
    with pytest.raises(EngineError, match=r"was built for compute capability 8\.9; host has 9\.0: build it"):
        TensorRtBackend(contract, library, device, cuda_graphs=False)


def test_a_plan_that_the_library_refuses(contract: Contract, sws_graph: Path, device: HostDevice) -> None:
    library = FakeLibrary(sws_graph, device, complaint="the version tag does not match")
    with pytest.raises(
        EngineError, match=r"1\.7\.1 on host cannot load .* built by version 1\.7\.1\.116: the version tag"
    ):
        TensorRtBackend(contract, library, device, cuda_graphs=False)


@pytest.mark.parametrize("allowed", [False, True])
def test_host_code_is_the_callers_decision(
    contract: Contract, library: FakeLibrary, device: HostDevice, allowed: bool
) -> None:
    contract.manifest["target"] = "tensorrt"
    TensorRtBackend(contract, library, device, cuda_graphs=False, engine_host_code_allowed=allowed)
    assert library.runtimes[0].engine_host_code_allowed is allowed


@pytest.mark.parametrize(
    ("name", "method", "value", "message"),
    [
        (
            "sigma",
            "get_tensor_dtype",
            SimpleNamespace(name="HALF"),
            r"input sigma: .* has float16 \[\?\], the",
        ),
        (
            "sws_state_d2",
            "get_tensor_shape",
            [-1, 99, -1, -1],
            r"sws_state_d2: .* has float32 \[\?, 99, \?, \?\]",
        ),
        ("out_sample", "get_tensor_shape", [-1, 4, -1], r"output out_sample: .* has float32 \[\?, 4, \?\]"),
        ("sigma", "get_tensor_mode", "output", "input sigma: the artefact does not have it"),
        (
            "sample",
            "get_tensor_profile_shape",
            ((1, 4, 1, 1), (2, 4, 2, 2), (99, 4, 64, 64)),
            r"profile 0 of sample: .* to \[99, 4, 64, 64\], the manifest .* to \[64, 4, 64, 64\]",
        ),
    ],
)
def test_an_engine_that_its_manifest_does_not_describe(
    contract: Contract,
    library: FakeLibrary,
    device: HostDevice,
    name: str,
    method: str,
    value: Any,
    message: str,
) -> None:
    real = getattr(library.engine, method)
    setattr(library.engine, method, lambda tensor, *rest: value if tensor == name else real(tensor, *rest))
    with pytest.raises(EngineError, match=rf"does not describe engine\.plan: .*{message}"):
        TensorRtBackend(contract, library, device, cuda_graphs=False)
