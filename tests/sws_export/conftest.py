"""Exports that read the traced graph of `random_unet` instead of tracing it again."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from sws_export.checkpoint import Checkpoint
from sws_export.tensors import Precision


@pytest.fixture
def quick_trace(monkeypatch: pytest.MonkeyPatch, traced: Path) -> None:
    """Exports of `random_unet` in float32 load its traced graph from disk."""
    from sws_export.tracing.export_unet import export_plain

    def load(checkpoint: Checkpoint, precision: Precision, *rest: Any, **named: Any) -> ir.Model:
        if precision != "fp32":
            return export_plain(checkpoint, precision, *rest, **named)
        model = ir.load(traced)
        model.metadata_props.clear()
        return model

    monkeypatch.setattr("sws_export.sources.checkpoint.export_plain", load)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty directory for artefacts."""
    directory = tmp_path / "out"
    directory.mkdir()
    return directory
