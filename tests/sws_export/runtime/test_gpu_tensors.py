"""torch tensors in GPU memory are used at their addresses. The GPU is host memory that pretends to be one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from sws_export.errors import StepError
from sws_export.runtime import Session
from sws_export.runtime.contract import Contract, read_contract
from sws_export.runtime.onnxruntime_backend import OnnxRuntimeBackend
from sws_export.runtime.session import Stream
from sws_export.runtime.tensorrt_backend import TensorRtBackend
from tests.sws_export.runtime.test_tensorrt_backend import FakeLibrary, HostDevice, engine_contract

MakeInputs = Callable[..., dict[str, Any]]
CHECKED = 8
"""Elements that may be read from the GPU: those of sigma and intensity, to be checked."""


class GpuTensor(torch.Tensor):
    """A tensor of the host that reports a GPU as its device, and cannot be copied from it."""

    index = 0
    is_cuda = True
    device = property(lambda self: torch.device("cuda", self.index))

    def cpu(self) -> torch.Tensor:
        assert self.numel() <= CHECKED, "a trip through host memory"
        return self.as_subclass(torch.Tensor)

    def numpy(self) -> None:
        raise AssertionError("a trip through host memory")


class OtherGpuTensor(GpuTensor):
    """On the second GPU."""

    index = 1


# As those of torch, which they stand for.
GpuTensor.__module__ = OtherGpuTensor.__module__ = "torch"


def on_gpu(array: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The array at an address that is a multiple of 256, as torch allocates on a GPU."""
    values = torch.from_numpy(np.asarray(array)).to(dtype)
    block = torch.empty(values.numel() * values.element_size() + 256, dtype=torch.uint8)
    first = -block.data_ptr() % 256
    tensor = block[first : first + values.numel() * values.element_size()].view(dtype).view(values.shape)
    return tensor.copy_(values).as_subclass(GpuTensor)


def tensors_of(step: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: on_gpu(array) for name, array in step.items()}


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices whose current stream was waited for."""
    found: list[torch.device] = []

    class CurrentStream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def synchronize(self) -> None:
            found.append(self.device)

    monkeypatch.setattr(torch.cuda, "current_stream", CurrentStream)
    return found


@pytest.fixture
def device() -> HostDevice:
    found = HostDevice()
    found.has_tensors = True
    return found


@pytest.fixture
def contract(sws_graph: Path, tmp_path: Path) -> Contract:
    return engine_contract(sws_graph, tmp_path)


@pytest.fixture
def library(sws_graph: Path, device: HostDevice) -> FakeLibrary:
    return FakeLibrary(sws_graph, device)


@pytest.fixture
def graph_on_gpu(sws_graph: Path, monkeypatch: pytest.MonkeyPatch) -> Stream:
    """A graph in ONNX Runtime whose GPU is the memory of the host."""

    def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(
            *(
                "cpu" if isinstance(argument, str) and argument == "cuda" else argument
                for argument in arguments
            )
        )

    for owner, name in (
        (onnxruntime.IOBinding, "bind_input"),
        (onnxruntime.IOBinding, "bind_output"),
        (onnxruntime.OrtValue, "ortvalue_from_numpy"),
    ):
        monkeypatch.setattr(owner, name, on_host(getattr(owner, name)))
    contract = read_contract(sws_graph)
    backend = OnnxRuntimeBackend(contract, "cpu", 1)
    backend.device = "cuda"
    return Stream(contract, backend)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_an_engine_reads_and_writes_tensors_in_place(
    contract: Contract,
    library: FakeLibrary,
    device: HostDevice,
    sws_graph: Path,
    inputs: MakeInputs,
    waited: list[torch.device],
    cuda_graphs: bool,
) -> None:
    stream = Stream(contract, TensorRtBackend(contract, library, device, cuda_graphs=cuda_graphs))
    other = Session.load(sws_graph, device="cpu")
    for number in range(6):
        step = inputs(number)
        tensors = tensors_of(step)
        prediction = stream.step(**tensors)
        assert isinstance(prediction, GpuTensor)
        np.testing.assert_allclose(torch.Tensor.numpy(prediction), other.step(**step), rtol=0, atol=1e-6)
        if not cuda_graphs:
            bound = library.contexts[0].seen[-1]
            assert {name: bound[name] for name in tensors} == {
                name: tensor.data_ptr() for name, tensor in tensors.items()
            }
            assert bound["out_sample"] == prediction.data_ptr()
    # The states are zeroed on the device: nothing went between it and the host.
    assert device.transfers == []
    assert waited == [torch.device("cuda:0")] * 6
    # A CUDA graph contains addresses: tensors are copied on the device, to and from buffers that stay.
    assert (device.captures, device.copies) == ((2, 6 * 6) if cuda_graphs else (0, 0))


def test_a_graph_reads_and_writes_tensors_in_place(
    graph_on_gpu: Stream, sws_graph: Path, inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a copy to the GPU")

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_cpu_input", refuse)
    found = [graph_on_gpu.step(**tensors_of(inputs(number))) for number in range(3)]
    monkeypatch.undo()
    other = Session.load(sws_graph, device="cpu")
    for number, prediction in enumerate(found):
        assert isinstance(prediction, GpuTensor)
        np.testing.assert_allclose(
            torch.Tensor.numpy(prediction), other.step(**inputs(number)), rtol=0, atol=1e-5
        )


def test_tensors_of_other_dtypes_strides_and_places(
    graph_on_gpu: Stream, sws_graph: Path, inputs: MakeInputs
) -> None:
    step = inputs()
    expected = Session.load(sws_graph, device="cpu").step(**step)
    tensors = tensors_of(step)
    tensors["sample"] = tensors["sample"].to(torch.float64).transpose(2, 3).contiguous().transpose(2, 3)
    tensors["timestep"] = torch.cat([torch.zeros(1), torch.from_numpy(step["timestep"])])[1:].as_subclass(
        GpuTensor
    )
    # Numbers and arrays of the host may be mixed with tensors.
    tensors["encoder_hidden_states"] = step["encoder_hidden_states"]
    prediction = graph_on_gpu.step(**tensors)
    assert prediction.dtype == torch.float64
    np.testing.assert_allclose(torch.Tensor.numpy(prediction), expected, rtol=0, atol=1e-5)
    one = graph_on_gpu.step(**(tensors | {"sigma": on_gpu(3.0), "intensity": 0.5}))
    assert one.shape == expected.shape


@pytest.mark.filterwarnings("ignore:the latent of 7 x 5 is padded")
def test_tensors_are_padded_on_the_gpu(graph_on_gpu: Stream, sws_graph: Path, inputs: MakeInputs) -> None:
    step = inputs(height=7, width=5)
    prediction = graph_on_gpu.step(**tensors_of(step))
    assert isinstance(prediction, GpuTensor)
    expected = Session.load(sws_graph, device="cpu").step(**step)
    assert prediction.shape == expected.shape == (2, 4, 7, 5)
    np.testing.assert_allclose(torch.Tensor.numpy(prediction), expected, rtol=0, atol=1e-5)


def test_tensors_that_are_refused(graph_on_gpu: Stream, inputs: MakeInputs) -> None:
    tensors = tensors_of(inputs())
    with pytest.raises(StepError, match="input sigma: expected a finite number above 0, found -1"):
        graph_on_gpu.step(**(tensors | {"sigma": on_gpu([2.0, -1.0])}))
    with pytest.raises(StepError, match="input timestep: dimension 0 is 3, expected 2"):
        graph_on_gpu.step(**(tensors | {"timestep": on_gpu(np.ones(3))}))
    elsewhere = tensors["sample"].as_subclass(torch.Tensor).as_subclass(OtherGpuTensor)
    with pytest.raises(StepError, match=r"input sample is on cuda:1, the artefact runs on cuda:0; move it"):
        graph_on_gpu.step(**(tensors | {"sample": elsewhere}))
