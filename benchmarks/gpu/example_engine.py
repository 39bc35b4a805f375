"""The trained example as a TensorRT for RTX engine for this GPU, compared with ONNX Runtime step by step."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.kernels import ROOT

STEPS = 3
# float16 through a whole UNet and back into the state.
ALLOWED = 0.02


def check_example_engine(folder: Path) -> dict[str, Any] | str:
    """Largest relative differences of the predictions over a few steps, or the reason they are missing."""
    for package in ("tensorrt_rtx", "onnxruntime", "diffusers", "onnx_ir", "onnxscript", "psutil"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    from sws_export import export
    from sws_export.errors import OptionError
    from sws_export.options import EngineOptions, ExportOptions, SizeOptions

    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    options = ExportOptions(
        engine=EngineOptions(compute_capabilities=(capability,)),
        sizes=SizeOptions(batch="2", tokens="8"),
        backend="tensorrt-rtx",
        validate=False,
        keep_onnx=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        export(ROOT / "examples" / "shapes", folder / "example.plan", options)
    except OptionError as error:
        # TensorRT for RTX has no target for compute capability 9.0 (H100, H200).
        return str(error)
    return compare_steps(folder / "example.onnx", folder / "example.plan")


def compare_steps(expected_from: Path, found_from: Path) -> dict[str, Any]:
    """Run both artefacts on the same random latents, 3 x 32 x 32 at batch 2, each with its own state."""
    from sws_export.runtime import Session

    expected, found = Session.load(expected_from), Session.load(found_from)
    generator = np.random.default_rng(0)
    text = generator.standard_normal((2, 8, 64)).astype(np.float32)
    errors = []
    for sigma in np.geomspace(10.0, 0.5, STEPS):
        sample = generator.standard_normal((2, 3, 32, 32)).astype(np.float32)
        a, b = (
            np.asarray(session.step(sample, 500.0, text, sigma=float(sigma)), np.float32)
            for session in (expected, found)
        )
        errors.append(float(np.abs(b - a).max() / np.abs(a).max()))
    return {"steps": STEPS, "relative_errors": errors, "allowed": ALLOWED, "passed": max(errors) <= ALLOWED}
