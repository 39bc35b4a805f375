"""A random UNet, the graph traced from it once, and exports that need no trace of their own."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from sws_export.checkpoint import Checkpoint
from sws_export.tensors import Precision
from tests import road


@pytest.fixture(scope="session")
def random_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers directory with a UNet of random weights in float32."""
    return road.shared(tmp_path_factory, "random_unet", road.make_unet)


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory, random_unet: Path) -> Path:
    """The plain graph of `random_unet`, as `sws-export --plain` writes it."""
    return road.shared(tmp_path_factory, "traced.onnx", lambda path: road.trace(random_unet, path))


@pytest.fixture
def quick_trace(monkeypatch: pytest.MonkeyPatch, traced: Path) -> None:
    """Exports of `random_unet` in float32 take its graph from disk in place of tracing it anew."""

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
