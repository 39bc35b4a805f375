"""Graphs in ONNX Runtime."""

import warnings
from typing import Any

from sws_export.errors import EngineError, OptionError
from sws_export.manifest import METADATA_KEY
from sws_export.runtime.backend import StateShapes
from sws_export.runtime.contract import Contract
from sws_export.runtime.cuda_device import CudaDevice
from sws_export.runtime.integrity import FoundTensor, check_embedded, check_tensors
from sws_export.runtime.onnxruntime_loop import CapturedLoop, CaptureThread, OnnxRuntimeLoop
from sws_export.runtime.providers import PROVIDERS, ProviderName, create_session

# Errors are raised as well; ONNX Runtime would print them raw, with names from the graph.
_FATAL_ONLY = 4


class OnnxRuntimeBackend:
    """A graph loaded in ONNX Runtime."""

    def __init__(
        self,
        contract: Contract,
        provider: ProviderName | None,
        threads: int | None,
        *,
        cuda_graphs: bool = False,
    ) -> None:
        """Load the graph.

        Args:
            contract: Of the graph.
            provider: None is `cuda` with CUDA graphs, or if ONNX Runtime has this provider and it can start;
                otherwise `cpu`.
            threads: Threads of one operator on the CPU; None is ONNX Runtime's default.
            cuda_graphs: Capture the step of each stream as two CUDA graphs.

        Raises:
            EngineError: ONNX Runtime or the provider is not installed or cannot start, ONNX Runtime cannot
                load the graph, or its steps cannot be captured.
            OptionError: CUDA graphs are asked for and the provider is another one than `cuda`.

        Warns:
            RuntimeWarning: The graph was exported for another target.
        """
        runtime = _import_onnxruntime()
        options = runtime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session, used = create_session(
                runtime, contract, provider, options, cuda_graphs=cuda_graphs
            )
        except (EngineError, OptionError):
            raise
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise EngineError(_rejection(contract, error, cuda_graphs=cuda_graphs)) from error
        self.device: str = PROVIDERS[used].device
        if mismatch := contract.target_mismatch(used):
            warnings.warn(mismatch, RuntimeWarning, stacklevel=2)
        embedded = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        check_embedded(contract.path, contract.manifest, embedded)
        check_tensors(
            contract.path,
            contract.manifest,
            [_found(node) for node in self._session.get_inputs()],
            [_found(node) for node in self._session.get_outputs()],
        )
        self._contract = contract
        self._captures = CaptureThread(CudaDevice(), runtime.RunOptions) if cuda_graphs else None

    def loop(self, states: StateShapes) -> OnnxRuntimeLoop:
        """Buffers for one stream, all zero."""
        if self._captures is not None:
            return CapturedLoop(self._session, self._contract, self.device, states, self._captures)
        return OnnxRuntimeLoop(self._session, self._contract, self.device, states)


def _found(node: Any) -> FoundTensor:
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    return FoundTensor(node.name, {"float": "float32", "double": "float64"}.get(kind, kind), node.shape)


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise EngineError(
            "an .onnx graph runs in ONNX Runtime, which is not installed; install it with: "
            "pip install 'sws-export[cpu]'"
        ) from error
    return onnxruntime


def _rejection(contract: Contract, error: Exception, *, cuda_graphs: bool) -> str:
    if cuda_graphs and "graph capture" in str(error):
        return (
            f"ONNX Runtime cannot capture the steps of {contract.path} as CUDA graphs; load it without "
            f"cuda_graphs ({error})"
        )
    if contract.manifest["precision"] == "bf16":
        return (
            f"ONNX Runtime cannot run {contract.path}: it has no bfloat16 kernels for this graph; "
            f"export with --precision fp16 or fp32, or build an engine ({error})"
        )
    return f"ONNX Runtime cannot load {contract.path}: {error}; export it again"
