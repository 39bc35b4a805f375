"""Execution providers of ONNX Runtime. That of TensorRT for RTX is replaced by the one of the CPU."""

import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from sws_export.errors import EngineError, OptionError
from sws_export.runtime import Session
from sws_export.runtime.contract import Contract, read_contract
from sws_export.runtime.providers import create_session

PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
CPU = "CPUExecutionProvider"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """The provider's package, whose library does not exist."""
    found = SimpleNamespace(
        get_ep_name=lambda: "NvTensorRTRTXExecutionProvider", get_library_path=lambda: str(tmp_path / "p.so")
    )
    monkeypatch.setitem(sys.modules, PACKAGE, found)
    return found


@pytest.fixture
def contract(sws_graph: Path) -> Contract:
    """Of a graph that was exported for TensorRT for RTX."""
    found = read_contract(sws_graph)
    return dataclasses.replace(found, manifest={**found.manifest, "target": "tensorrt-rtx"})


def created(contract: Contract) -> tuple[Any, str]:
    return create_session(onnxruntime, contract, "tensorrt-rtx", onnxruntime.SessionOptions())


def test_a_graph_of_another_target_is_refused(sws_graph: Path) -> None:
    with pytest.raises(EngineError, match=r"exported for onnxruntime, .* with --backend tensorrt-rtx"):
        Session.load(sws_graph, provider="tensorrt-rtx")


def test_without_the_package(contract: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(EngineError, match=rf"needs the Python package {PACKAGE} .*'sws-export\[ort-rtx\]'"):
        created(contract)


@pytest.mark.usefixtures("package")
def test_a_library_that_cannot_be_loaded(contract: Contract) -> None:
    with pytest.raises(EngineError, match=r"cannot load the provider .*p\.so.* check with nvidia-smi"):
        created(contract)


@pytest.mark.usefixtures("package")
def test_without_a_gpu(contract: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *_: None)
    with pytest.raises(EngineError, match=r"runs on an NVIDIA RTX GPU .* found none; check with nvidia-smi"):
        created(contract)


def test_the_provider_is_registered_and_its_device_used(contract: Contract, package: SimpleNamespace) -> None:
    registered = []
    package.get_ep_name = lambda: CPU

    def open_session(*arguments: Any, **options: Any) -> SimpleNamespace:
        session = onnxruntime.InferenceSession(*arguments, **options)
        assert session.get_providers() == [CPU]
        return SimpleNamespace(get_providers=lambda: ["NvTensorRTRTXExecutionProvider"])

    runtime = ModuleType("onnxruntime")
    vars(runtime).update(
        vars(onnxruntime),
        register_execution_provider_library=lambda *arguments: registered.append(arguments),
        InferenceSession=open_session,
    )
    for _ in range(2):
        _, used = create_session(runtime, contract, "tensorrt-rtx", onnxruntime.SessionOptions())
        assert used == "tensorrt-rtx"
    # Once in a process.
    assert registered == [(CPU, package.get_library_path())]


def test_a_provider_that_does_not_start_is_not_replaced(
    sws_graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"):
        assert Session.load(sws_graph).device == "cpu"
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(EngineError, match="could not start CUDAExecutionProvider and fell back to the CPU"),
    ):
        Session.load(sws_graph, provider="cuda")


def test_options_that_contradict_each_other(sws_graph: Path) -> None:
    assert Session.load(sws_graph, provider="cpu", device="cpu").device == "cpu"
    with pytest.raises(OptionError, match="provider 'dml' is unknown; use 'cpu', 'cuda', 'tensorrt-rtx'"):
        Session.load(sws_graph, provider="dml")
    with pytest.raises(OptionError, match="provider 'cuda' runs on device 'cuda', found device='cpu'"):
        Session.load(sws_graph, provider="cuda", device="cpu")


def test_float32_products_on_a_gpu_are_not_rounded(contract: Contract) -> None:
    """Without TF32."""
    asked: list[Any] = []

    class Runtime:
        get_available_providers = staticmethod(lambda: ["CUDAExecutionProvider", CPU])

        @staticmethod
        def InferenceSession(*_: object, providers: list[Any]) -> Any:  # noqa: N802
            asked.extend(providers)
            return SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider", CPU])

    create_session(Runtime, contract, "cuda", onnxruntime.SessionOptions())
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0"}), CPU]
