"""The float32 twin of a bfloat16 graph, which ONNX Runtime can run."""

from pathlib import Path

import onnx_ir as ir

from graph_passes.widen_bfloat16 import WidenBfloat16
from sws_export.onnx_files import save_onnx
from sws_export.progress import Silent


def save_float32_twin(onnx_path: Path, scratch: Path) -> Path:
    """Write the twin of `onnx_path` into `scratch`; returns its path."""
    model = ir.load(onnx_path)
    WidenBfloat16()(model)
    twin = scratch / f"{onnx_path.stem}.float32.onnx"
    save_onnx(model, twin, Silent())
    return twin
