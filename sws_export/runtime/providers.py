"""The execution providers of ONNX Runtime that a session can use."""

import functools
import importlib
from typing import Any, Literal, NamedTuple

from sws_export.errors import EngineError, OptionError
from sws_export.runtime.contract import Contract

ProviderName = Literal["cpu", "cuda", "tensorrt-rtx"]


class Provider(NamedTuple):
    """An execution provider.

    Attributes:
        name: In ONNX Runtime.
        device: Where it runs.
    """

    name: str
    device: Literal["cpu", "cuda"]


PROVIDERS: dict[ProviderName, Provider] = {
    "cpu": Provider("CPUExecutionProvider", "cpu"),
    "cuda": Provider("CUDAExecutionProvider", "cuda"),
    "tensorrt-rtx": Provider("NvTensorRTRTXExecutionProvider", "cuda"),
}

_RTX_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"

# TF32, the default, would round the operands of float32 products (transports, statistics) to 10 bits.
_CUDA_OPTIONS = {"use_tf32": "0"}


def create_session(
    runtime: Any,
    contract: Contract,
    provider: ProviderName | None,
    options: Any,
    *,
    cuda_graphs: bool = False,
) -> tuple[Any, ProviderName]:
    """An `InferenceSession`, and the provider that it uses.

    Args:
        runtime: The module `onnxruntime`.
        contract: Of the graph.
        provider: None is `cuda` with CUDA graphs, or if ONNX Runtime has this provider and it can start;
            otherwise `cpu`.
        options: The `SessionOptions`.
        cuda_graphs: The provider captures steps.

    Raises:
        EngineError: The provider is not installed or cannot start, or the graph is for another one.
        OptionError: The provider captures no steps.
        Exception: ONNX Runtime cannot load the graph; its exceptions share no base class.
    """
    available = runtime.get_available_providers()
    chosen = provider or ("cuda" if cuda_graphs or PROVIDERS["cuda"].name in available else "cpu")
    providers: list[Any] | None = [PROVIDERS[chosen].name]
    if cuda_graphs:
        _check_capture(contract, chosen)
    if chosen == "tensorrt-rtx":
        _check_target(contract)
        options.add_provider_for_devices(_rtx_devices(runtime), {})
        providers = None
    elif chosen not in ("cpu", *(name for name, found in PROVIDERS.items() if found.name in available)):
        raise EngineError(
            "ONNX Runtime has no CUDA provider here; install it with: pip install 'sws-export[gpu]', or load "
            "with provider='cpu'"
        )
    elif chosen == "cuda":
        cuda_options = _CUDA_OPTIONS | ({"enable_cuda_graph": "1"} if cuda_graphs else {})
        providers = [(PROVIDERS["cuda"].name, cuda_options), PROVIDERS["cpu"].name]
    session = runtime.InferenceSession(contract.path, options, providers=providers)
    if PROVIDERS[chosen].name in session.get_providers():
        return session, chosen
    if provider is None and not cuda_graphs:
        return session, "cpu"
    raise EngineError(
        f"ONNX Runtime could not start {PROVIDERS[chosen].name} and fell back to the CPU; check the driver "
        "with nvidia-smi, or load with provider='cpu'"
    )


def _check_capture(contract: Contract, provider: ProviderName) -> None:
    """Raises if the steps of a graph cannot be captured."""
    if provider != "cuda":
        raise OptionError(
            f"{contract.path}: cuda_graphs=True is for engines and for provider='cuda', found '{provider}'; "
            "leave one of them out"
        )
    target = contract.manifest["target"]
    if target != "onnxruntime-cuda":
        raise EngineError(
            f"{contract.path} was exported for {target}, and cuda_graphs=True expects onnxruntime-cuda; "
            "export it again with --backend onnxruntime-cuda, or load it without cuda_graphs"
        )
    # ONNX Runtime computes dynamic shapes on the CPU, which a CUDA graph does not contain.
    if dynamic := contract.dynamic_sizes:
        options = " ".join(f"--{name} N" for name in dynamic)
        raise EngineError(
            f"{contract.path} has dynamic shapes ({', '.join(dynamic)}), and CUDA graphs need static ones; "
            f"export it again with {options}, or load it without cuda_graphs"
        )


def _check_target(contract: Contract) -> None:
    target = contract.manifest["target"]
    if target != "tensorrt-rtx":
        raise EngineError(
            f"{contract.path} was exported for {target}, whose operators TensorRT for RTX does not run; "
            "export it again with --backend tensorrt-rtx, or load it with another provider"
        )


def _rtx_devices(runtime: Any) -> list[Any]:
    """The GPUs that the provider of TensorRT for RTX supports, one at least."""
    try:
        package = importlib.import_module(_RTX_PACKAGE)
    except ModuleNotFoundError as error:
        raise EngineError(
            f"provider 'tensorrt-rtx' needs the Python package {_RTX_PACKAGE} ({error}); install it with: "
            "pip install 'sws-export[ort-rtx]'"
        ) from error
    try:
        _register(runtime, package.get_ep_name(), package.get_library_path())
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        raise EngineError(
            f"ONNX Runtime {runtime.__version__} cannot load the provider of TensorRT for RTX ({error}); it "
            "needs an NVIDIA RTX GPU and its driver: check with nvidia-smi, or load with provider='cpu'"
        ) from error
    devices = [device for device in runtime.get_ep_devices() if device.ep_name == package.get_ep_name()]
    if not devices:
        raise EngineError(
            "provider 'tensorrt-rtx' runs on an NVIDIA RTX GPU (Ampere or later), and found none; check with "
            "nvidia-smi, or load with provider='cpu'"
        )
    return devices[:1]


@functools.cache
def _register(runtime: Any, name: str, library: str) -> None:
    """Register the provider, once in a process."""
    runtime.register_execution_provider_library(name, library)
