"""Estimates of memory, disk, time and engine size before an export."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sws_export import ExportOptions, SwsOptions
from sws_export.engines.backend import BuildOptions
from sws_export.engines.choice import get_backend
from sws_export.pipeline.plan import EngineConfig
from sws_export.pipeline.preflight import Preflight, preflight
from sws_export.progress import SilentProgress
from sws_export.sources import open_source
from sws_export.tensors import Range, SizeRanges
from tests.export_runs import with_options

ONE = Range(1, 1, 1)
ENGINE = EngineConfig(
    (SizeRanges(Range(1, 2, 4), ONE, ONE, Range(77, 77, 77)),),
    BuildOptions(backend=get_backend("tensorrt-rtx")),
)


def needs(model: Path, out: Path, *, engine: bool = False, **options: Any) -> Preflight:
    chosen = with_options(ExportOptions(), **options)
    return preflight(
        open_source(model, chosen, SilentProgress()), ENGINE if engine else None, chosen, out / "e.plan"
    )


def test_skipped_stages_need_no_memory(random_unet: Path, tmp_path: Path) -> None:
    assert needs(random_unet, tmp_path, validate=False).memory.keys() == {"export"}
    assert needs(random_unet, tmp_path).memory.keys() == {"export", "validation"}
    assert needs(random_unet, tmp_path, engine=True).memory.keys() == {"export", "validation", "engine build"}


def test_a_calibration_over_the_trajectory_is_a_stage(random_unet: Path, tmp_path: Path) -> None:
    found = needs(random_unet, tmp_path, activations="int8")
    assert list(found.memory) == list(found.seconds) == ["export", "calibration", "validation"]
    # How long a pipeline runs is not known.
    recorded = needs(random_unet, tmp_path, activations="int8", calibration=tmp_path, prompts=tmp_path / "p")
    assert "calibration" not in {*recorded.memory, *recorded.seconds}


def test_the_graph_is_as_large_as_its_weights(random_unet: Path, tmp_path: Path) -> None:
    stored = (random_unet / "diffusion_pytorch_model.safetensors").stat().st_size
    full, half = (needs(random_unet, tmp_path, precision=name) for name in ("fp32", "fp16"))
    assert full.graph_size == pytest.approx(stored, rel=0.02)
    assert half.graph_size * 2 == full.graph_size
    assert full.disk == full.graph_size
    assert needs(random_unet, tmp_path, engine=True).disk == 2 * full.graph_size


def test_shortages(random_unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs(random_unet, tmp_path).shortages() == []
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    (shortage,) = needs(random_unet, tmp_path).shortages()
    assert shortage == "about 0.0 GB of disk are needed, 0.0 GB are free"
    few = Preflight({"export": 1, "engine build": 6 * 10**9}, 10**9, 10**9, 4 * 10**9, 2 * 10**9)
    assert few.shortages() == [
        "engine build needs about 6.0 GB of memory and 4.0 GB are available; it may be killed"
    ]


def test_memory_and_disk_as_text() -> None:
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


def of_size(parameters: int, path: Path, *, converts: bool = False) -> Any:
    """The attributes of a source that the preflight reads: float16 weights in a sparse file."""
    with path.open("wb") as file:
        file.truncate(2 * parameters)
    return SimpleNamespace(
        parameter_count=parameters,
        precision="fp16",
        files=(path,),
        converts=converts,
        config=None,
        quantization=None,
    )


@pytest.mark.parametrize(
    ("parameters", "plain", "seconds", "size"),
    [
        # From benchmarks/README.md: SD1.5 to a plan, plain and with SWS, and the plan of SDXL.
        (859_500_000, True, 41.4, 1_745_052_116),
        (859_500_000, False, 67.3, 1_797_284_324),
        (2_567_000_000, False, None, 5_210_000_000),
    ],
)
def test_time_and_engine_size_are_near_the_measured_values(
    tmp_path: Path, parameters: int, plain: bool, seconds: float | None, size: int
) -> None:
    source = of_size(parameters, tmp_path / "weights")
    found = preflight(source, ENGINE, ExportOptions(sws=SwsOptions(plain=plain)), tmp_path / "e.plan")
    assert found.engine_size == pytest.approx(size, rel=0.05)
    assert found.seconds.keys() == {"export", "validation", "engine build"}
    if seconds is not None:
        assert sum(found.seconds.values()) == pytest.approx(seconds, rel=0.3)


def test_gpu_memory_is_near_what_the_builder_reports(tmp_path: Path) -> None:
    source = of_size(859_500_000, tmp_path / "weights")
    source.config = {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    }
    sizes = SizeRanges(Range(1, 2, 2), Range(64, 64, 64), Range(64, 64, 64), Range(77, 77, 77))
    engine = dataclasses.replace(ENGINE, profiles=(sizes, ENGINE.profiles[0]))
    options = with_options(ExportOptions(), max_gpu_memory="1GB", plain=True)
    plain = preflight(source, engine, options, tmp_path / "e.plan")
    assert plain.gpu_memory is not None
    assert plain.gpu_memory.largest == 0
    # The builder's figure for the plain SD1.5.
    assert plain.gpu_memory.profiles[0].activations == pytest.approx(84e6, rel=0.05)
    assert plain.gpu_memory.profiles[0].states == 0
    first, second = plain.describe()[-2:]
    assert "needs 1.80 GB of GPU memory: weights 1.72 GB, activations 83." in first
    assert first.endswith(", for batch 1:2:2, height 64, width 64, tokens 77 (activations ± 50%)")
    assert second.endswith(", for batch 1:2:4, height 1, width 1, tokens 77 (activations ± 50%)")
    assert plain.shortages()[-1].startswith("the engine needs about 1.80 GB of GPU memory, --max-gpu-memory")
    sws = preflight(source, engine, ExportOptions(), tmp_path / "e.plan").gpu_memory
    assert sws is not None
    source.precision = "fp32"
    source.config["attention_head_dim"] = 8
    full = preflight(source, engine, ExportOptions(), tmp_path / "e.plan").gpu_memory
    assert full is not None
    # Logits and weights of 8 heads and 4096 tokens at batch 2 are stored.
    assert full.profiles[0].activations > 2 * 4 * 2 * 8 * 4096**2
    # Two buffers of float32 for each of the grids 64, 32, 16 and 8, at batch 2.
    assert sws.profiles[0].states == 2 * 4 * 2 * 145 * (64**2 + 32**2 + 16**2 + 8**2)


def test_conversion_takes_time(tmp_path: Path) -> None:
    kept, changed = (
        preflight(
            of_size(10**9, tmp_path / "w", converts=converts), None, ExportOptions(), tmp_path / "g.onnx"
        )
        for converts in (False, True)
    )
    assert changed.seconds["export"] > kept.seconds["export"] + 3
    assert kept.engine_size is None


def test_cached_results_need_no_time(tmp_path: Path) -> None:
    source = of_size(10**9, tmp_path / "w")
    graph = preflight(source, ENGINE, ExportOptions(), tmp_path / "e.plan", ("graph",))
    assert graph.memory.keys() == graph.seconds.keys() == {"engine build"}
    both = preflight(source, ENGINE, ExportOptions(), tmp_path / "e.plan", ("graph", "engine"))
    assert both.memory == both.seconds == {}
    assert both.describe()[0] == "in the cache: graph, engine"


def test_time_and_engine_as_text(tmp_path: Path) -> None:
    found = preflight(of_size(2 * 10**9, tmp_path / "w"), ENGINE, ExportOptions(), tmp_path / "e.plan")
    time, engine = found.describe()[2:]
    assert time.startswith(
        "expected time: 3 min on two idle cores (export 18 s, validation 50 s, engine build 2"
    )
    assert engine == "expected engine: 4.15 GB ± 5% for batch 1:2:4, height 1, width 1, tokens 77"


def test_turing_and_stripped_weights_change_the_plan(tmp_path: Path) -> None:
    def size(**options: Any) -> int:
        build = dataclasses.replace(ENGINE.build, **options)
        engine = dataclasses.replace(ENGINE, build=build)
        return (
            preflight(of_size(10**9, tmp_path / "w"), engine, ExportOptions(), tmp_path / "e").engine_size
            or 0
        )

    assert size(compute_capabilities=("7.5", "8.9")) == pytest.approx(
        1.2 * size(compute_capabilities=("8.9",))
    )
    tensorrt = get_backend("tensorrt")
    assert size(backend=tensorrt, strip_weights=True) < 10**8
