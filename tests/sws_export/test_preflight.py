"""What an export is expected to need."""

import shutil
from pathlib import Path

import pytest

from sws_export import ExportOptions
from sws_export.engines.choice import named_backend
from sws_export.preflight import Preflight, preflight
from sws_export.progress import Silent
from sws_export.sources import open_source

RTX = named_backend("tensorrt-rtx")


def needs(model: Path, out: Path, *, engine: bool = False, **options: object) -> Preflight:
    chosen = ExportOptions(**options)
    return preflight(open_source(model, chosen, Silent()), RTX if engine else None, chosen, out / "e.plan")


def test_stages_that_are_left_out_need_nothing(random_unet: Path, tmp_path: Path) -> None:
    assert needs(random_unet, tmp_path, validate=False).memory.keys() == {"export"}
    assert needs(random_unet, tmp_path).memory.keys() == {"export", "validation"}
    assert needs(random_unet, tmp_path, engine=True).memory.keys() == {"export", "validation", "engine build"}


def test_the_graph_is_as_large_as_its_weights(random_unet: Path, tmp_path: Path) -> None:
    stored = (random_unet / "diffusion_pytorch_model.safetensors").stat().st_size
    full, half = (needs(random_unet, tmp_path, precision=name) for name in ("fp32", "fp16"))
    assert full.graph_size == pytest.approx(stored, rel=0.02)
    assert half.graph_size * 2 == full.graph_size
    assert full.disk == full.graph_size
    assert needs(random_unet, tmp_path, engine=True).disk == 2 * full.graph_size


def test_shortages_are_told(random_unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs(random_unet, tmp_path).shortages() == []
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("sws_export.preflight.shutil.disk_usage", lambda _: usage)
    (said,) = needs(random_unet, tmp_path).shortages()
    assert said == "about 0.0 GB of disk are needed, 0.0 GB are free"
    few = Preflight({"export": 1, "engine build": 6 * 10**9}, 10**9, 10**9, 4 * 10**9, 2 * 10**9)
    assert few.shortages() == [
        "engine build needs about 6.0 GB of memory and 4.0 GB are available; it may be killed"
    ]


def test_needs_in_words() -> None:
    found = Preflight(
        {"export": 800_000_000, "validation": 2 * 10**9}, 10**9, 5 * 10**8, 4 * 10**9, 2 * 10**9
    )
    assert found.describe() == [
        "expected memory: export 0.8 GB, validation 2.0 GB; 4.0 GB available",
        "expected disk: 1.00 GB, of it the graph 0.50 GB; 2.0 GB free",
    ]


def test_validation_needs_no_disk_and_holds_a_small_graph_several_times(
    random_unet: Path, tmp_path: Path
) -> None:
    for precision in ("fp32", "fp16", "bf16"):
        found = needs(random_unet, tmp_path, precision=precision)
        assert found.disk == found.graph_size
        assert found.memory["validation"] == 800_000_000 + 5 * found.graph_size
