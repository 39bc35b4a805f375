"""Cache hits and misses of the export stages, damaged entries, and interrupts."""

import json
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sws_export.cli import main

from examples.make_checkpoint import ldm_names
from sws_export import (
    EngineOptions,
    ExportOptions,
    SizeOptions,
    SourceOptions,
    SwsParameters,
    export,
)
from sws_export.cache import Cache, code_version, open_cache
from sws_export.cache.digests import file_stamps
from sws_export.errors import CheckpointError, ValidationError
from sws_export.pipeline.describe import library_version
from sws_export.pipeline.run import ExportReport
from sws_export.progress import SilentProgress
from tests.export_runs import (
    ONE_SITE,
    ROUNDED_AWAY,
    AtStage,
    Builds,
    RecordingProgress,
    SharedTraces,
    changed_copy,
    listing,
    with_options,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
SIDE = "16:16:32"
GRAPH = ExportOptions(sws=ONE_SITE)
UNVALIDATED = with_options(GRAPH, validate=False)
PLAN = ExportOptions(
    source=SourceOptions(precision="fp32"),
    sws=ONE_SITE,
    sizes=SizeOptions(vae_scale=1, height=SIDE, width=SIDE, tokens="1:77:77"),
    engine=EngineOptions(compute_capabilities=("8.9",)),
    validate=False,
)
VALIDATED_PLAN = with_options(PLAN, validate=True)
STAGES = ["check", "export", "rewrite", "save"]
"""In the order in which the cache returns them."""
VALIDATED_STAGES = ["check", "validate", *STAGES[1:]]


@pytest.fixture
def cache(traces: SharedTraces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    """A cache with traces only, which remembers the digests of recent files too."""
    store_recent_digests(monkeypatch)
    with traces.used_in(tmp_path / "cache", monkeypatch):
        yield open_cache()


@pytest.fixture
def model(middle_unet: Path, tmp_path: Path) -> Path:
    """A UNet that a test may change."""
    return Path(shutil.copytree(middle_unet, tmp_path / "model"))


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builds:
    """The engines that were built, which are a few bytes."""
    return Builds(tmp_path / "builds", monkeypatch)


@pytest.fixture(scope="module")
def filled(traces: SharedTraces, middle_unet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory with the graph of `middle_unet` for `UNVALIDATED`."""
    directory = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch, traces.used_in(directory / "cache", patch):
        store_recent_digests(patch)
        export(middle_unet, directory / "graph.onnx", UNVALIDATED)
    return directory / "cache"


def store_recent_digests(patch: pytest.MonkeyPatch) -> None:
    """Store the digests of files that were written a moment ago, too."""
    patch.setattr("time.time", lambda: time.time_ns() / 1e9 + 10)


pytestmark = pytest.mark.usefixtures("cache")


def cached(report: ExportReport) -> list[str]:
    return [timing.name for timing in report.stages if timing.cached]


def from_cache(progress: RecordingProgress) -> list[str]:
    """Kinds of the results that are from the cache, as logged."""
    return [text.split(":")[0] for _, text in progress.lines if ": from the cache (" in text]


def change_weights(model: Path) -> None:
    """Change the last weight; length and header of the file stay."""
    with (model / WEIGHTS).open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(struct.pack("<f", 0.5))


def write_lora(file: Path, value: float) -> Path:
    save_file(
        {
            f"{LAYER}.lora.down.weight": torch.full((2, 64), value),
            f"{LAYER}.lora.up.weight": torch.full((64, 2), value),
        },
        file,
    )
    return file


# Hits


def test_a_second_export_restores_the_graph(model: Path, out: Path) -> None:
    first = export(model, out / "graph.onnx", GRAPH)
    before = listing(out)
    assert cached(first) == []
    progress = AtStage()
    second = export(model, out / "graph.onnx", GRAPH, progress)
    assert cached(second) == VALIDATED_STAGES
    assert progress.stages == ["open", "check weights"]
    after = listing(out)
    assert after["graph.onnx"] == before["graph.onnx"]
    assert any("graph: from the cache" in text for _, text in progress.lines)
    assert any(text.startswith("SWS at ") for _, text in progress.lines)
    # The report is as complete as the first, apart from the timings.
    assert second.validation == first.validation
    assert {timing.name for timing in second.stages} - {"restore"} == {timing.name for timing in first.stages}
    assert second.manifest | {"stages": []} == first.manifest | {"stages": []}
    assert json.loads((out / "graph.onnx.json").read_text()) == second.manifest


def test_a_restored_small_graph_removes_old_external_weights(model: Path, out: Path) -> None:
    export(model, out / "graph.onnx", UNVALIDATED)
    (out / "graph.onnx.data").write_bytes(b"weights of a larger graph")
    assert "export" in cached(export(model, out / "graph.onnx", UNVALIDATED))
    assert sorted(listing(out)) == ["graph.onnx", "graph.onnx.json"]


def test_converted_weights_are_restored(model: Path, out: Path) -> None:
    half = with_options(UNVALIDATED, precision="fp16")
    export(model, out / "a.onnx", half)
    assert "export" in cached(export(model, out / "b.onnx", half))
    assert (out / "a.onnx").read_bytes() == (out / "b.onnx").read_bytes()


@pytest.mark.parametrize("source", ["model", "traced"])
def test_quantized_weights(source: str, request: pytest.FixtureRequest, out: Path) -> None:
    options = with_options(UNVALIDATED, weights="fp8")
    export(request.getfixturevalue(source), out / "graph.onnx", options)
    before = listing(out)
    (out / "graph.onnx").unlink()
    assert "export" in cached(export(request.getfixturevalue(source), out / "graph.onnx", options))
    assert listing(out)["graph.onnx"] == before["graph.onnx"]


def test_an_onnx_source_is_cached(traced: Path, out: Path) -> None:
    export(traced, out / "a.onnx", UNVALIDATED)
    assert "rewrite" in cached(export(traced, out / "b.onnx", UNVALIDATED))
    assert (out / "a.onnx").read_bytes() == (out / "b.onnx").read_bytes()


def test_checkpoints_of_one_architecture_are_traced_once(model: Path, out: Path) -> None:
    export(model, out / "graph.onnx", UNVALIDATED)
    change_weights(model)
    traced = export(model, out / "expected.onnx", with_options(UNVALIDATED, cache=False))
    progress, again = RecordingProgress(SilentProgress()), RecordingProgress(SilentProgress())
    report = export(model, out / "graph.onnx", UNVALIDATED, progress)
    assert cached(report) == []
    assert from_cache(progress) == ["trace"]
    assert (out / "graph.onnx").read_bytes() == (out / "expected.onnx").read_bytes()
    assert report.manifest["source"] == traced.manifest["source"]
    # The log of a graph that was made from a trace does not have it again.
    export(model, out / "graph.onnx", UNVALIDATED, again)
    assert from_cache(again) == ["graph"]


@pytest.mark.parametrize("change", [{"precision": "fp16"}, {"controlnet": True}])
def test_a_trace_has_one_precision_and_one_set_of_inputs(
    model: Path, out: Path, change: dict[str, Any]
) -> None:
    options = with_options(UNVALIDATED, **change)
    export(model, out / "graph.onnx", UNVALIDATED)
    export(model, out / "graph.onnx", options)
    found = (out / "graph.onnx").read_bytes()
    export(model, out / "graph.onnx", with_options(options, cache=False))
    assert (out / "graph.onnx").read_bytes() == found


def test_a_trace_that_is_made_after_a_cached_validation(model: Path, out: Path, cache: Cache) -> None:
    """Names and shapes were compared by the run that validated."""
    export(model, out / "graph.onnx", GRAPH)
    for entry in cache.entries():
        if entry.kind == "trace":
            cache.evict(entry)
    progress = RecordingProgress(SilentProgress())
    export(model, out / "graph.onnx", with_options(GRAPH, tokens="7"))
    export(model, out / "graph.onnx", with_options(GRAPH, tokens="8"), progress)
    assert from_cache(progress) == ["validation", "trace"]


def test_weights_are_compared_with_the_shapes_of_a_trace(model: Path, out: Path) -> None:
    export(model, out / "graph.onnx", UNVALIDATED)
    weights = load_file(model / WEIGHTS)
    save_file(weights | {"conv_in.bias": torch.zeros(5)}, model / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"'conv_in.bias' expected \[32\], found \[5\]"):
        export(model, out / "graph.onnx", UNVALIDATED)
    weights.pop("conv_in.bias")
    save_file(weights, model / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"lacks 1 of the \d+ tensors .*conv_in.bias"):
        export(model, out / "graph.onnx", UNVALIDATED)


def test_an_export_from_a_trace_does_not_load_torch(middle_unet: Path, out: Path) -> None:
    export(middle_unet, out / "graph.onnx", UNVALIDATED)
    command = [str(middle_unet), "--out", str(out / "b.onnx"), "--no-validate", "--guard", "literal"]
    program = (
        f"import sys; from sws_export.cli import main; main({command!r}); "
        "assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=100)
    assert (out / "b.onnx").is_file()


def test_a_second_export_restores_the_engine(model: Path, out: Path, built: Builds) -> None:
    progress, again = RecordingProgress(SilentProgress()), RecordingProgress(SilentProgress())
    first = export(model, out / "e.plan", VALIDATED_PLAN, progress)
    second = export(model, out / "e.plan", VALIDATED_PLAN, again)
    assert len(built) == 1
    assert cached(second) == [*VALIDATED_STAGES, "build"]
    assert (out / "e.plan").read_bytes()[-4:] == b"\1\0\0\0"
    assert second.engine == first.engine
    assert second.manifest | {"stages": []} == first.manifest | {"stages": []}
    assert any("engine: from the cache" in text for _, text in again.lines)
    warnings = [text for warning, text in progress.lines if warning]
    assert warnings == [text for warning, text in again.lines if warning] != []


def test_a_changed_profile_builds_only_the_engine(model: Path, out: Path, built: Builds) -> None:
    export(model, out / "e.plan", VALIDATED_PLAN)
    for number, change in enumerate(
        [{"batch": "1:2:4"}, {"height": "16:32:32"}, {"width": "16:16:64"}, {"tokens": "1:7:77"}], 2
    ):
        report = export(model, out / "e.plan", with_options(VALIDATED_PLAN, **change))
        assert cached(report) == VALIDATED_STAGES
        assert report.validation is not None
        assert len(built) == number
    assert "build" in cached(export(model, out / "e.plan", VALIDATED_PLAN))


def test_a_static_size_makes_another_graph_with_the_same_validation(
    model: Path, out: Path, built: Builds
) -> None:
    export(model, out / "e.plan", VALIDATED_PLAN)
    progress = RecordingProgress(SilentProgress())
    fixed = with_options(VALIDATED_PLAN, tokens="7")
    report = export(model, out / "e.plan", fixed, progress)
    assert cached(report) == ["check", "validate"]
    assert any(text.startswith("validation: from the cache") for _, text in progress.lines)
    assert report.validation is not None
    assert any("tokens was set to 7" in remark for remark in report.validation.remarks)
    assert len(built) == 2
    again = export(model, out / "e.plan", fixed)
    assert cached(again) == [*VALIDATED_STAGES, "static shapes", "build"]
    assert again.validation == report.validation


def test_keep_onnx_with_a_cached_engine(model: Path, out: Path, built: Builds) -> None:
    export(model, out / "e.plan", PLAN)
    export(model, out / "e.plan", with_options(PLAN, keep_onnx=True))
    assert len(built) == 1
    assert sorted(listing(out)) == ["e.onnx", "e.onnx.json", "e.plan", "e.plan.json"]


def test_log_and_json_name_cached_stages(
    model: Path, out: Path, built: Builds, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(model), "--out", str(out / "e.plan"), "--vae-scale", "1", "--json"]
    command += ["--sites", *ONE_SITE.sites, "--guard", "literal"]
    command += [*("--height", SIDE), *("--width", SIDE), *("--tokens", "1:77:77")]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["cached"] == []
    assert main(command) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["cached"] == [*VALIDATED_STAGES, "build"]
    assert printed.err.count("from the cache") == 3 + len(VALIDATED_STAGES) + 1


# Misses

CHANGES: dict[str, dict[str, Any]] = {
    "precision": {"precision": "fp16"},
    "parameters": {"parameters": SwsParameters(beta=0.5)},
    "sites": {"sites": ("mid_block.*",)},
    "guard": {"guard": "fused"},
    "guard_rows": {"guard_rows": "1/2"},
    "guard_branches": {"guard_branches": "off"},
    "plain": {"plain": True, "sites": (), "guard": None},
    "controlnet": {"controlnet": True},
    "prediction_type": {"prediction_type": "v_prediction"},
    "attention_head_dim": {"attention_head_dim": (4,)},
    "debug_outputs": {"debug_outputs": True},
    "validate": {"validate": True},
    "target": {"backend": "tensorrt"},
    "weights": {"weights": "int8"},
    "activations": {"activations": "int8"},
}


@pytest.fixture
def find(filled: Path, middle_unet: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What a dry run with some options changed finds in the cache `filled`."""
    monkeypatch.setenv("SWS_EXPORT_CACHE_DIR", str(filled))

    def find(**changes: Any) -> tuple[str, ...]:
        options = with_options(UNVALIDATED, dry_run=True, **changes)
        return export(middle_unet, out / "graph.onnx", options).preflight.cached

    return find


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_option_is_a_miss(name: str, find: Callable[..., Any]) -> None:
    assert find() == ("graph",)
    assert find(**CHANGES[name]) == ()


@pytest.fixture
def other_versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Libraries have another version."""
    library_version.cache_clear()
    monkeypatch.setattr("importlib.metadata.version", lambda *_: "other")
    yield
    library_version.cache_clear()


@pytest.mark.usefixtures("other_versions")
def test_another_version_of_a_library_is_a_miss(find: Callable[..., Any]) -> None:
    assert find() == ()


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One source file of the passes reads as if it had another line."""
    read = Path.read_bytes

    def read_edited(file: Path) -> bytes:
        return read(file) + b"#\n" * (file.parts[-2:] == ("graph_passes", "find_sites.py"))

    code_version.cache_clear()
    monkeypatch.setattr(Path, "read_bytes", read_edited)
    yield
    code_version.cache_clear()


@pytest.mark.usefixtures("edited")
def test_edited_code_is_a_miss(find: Callable[..., Any]) -> None:
    assert find() == ()


def test_changed_weights_are_a_miss(model: Path, out: Path) -> None:
    export(model, out / "graph.onnx", UNVALIDATED)
    change_weights(model)
    assert cached(export(model, out / "graph.onnx", UNVALIDATED)) == []


def test_a_changed_configuration_is_a_miss(model: Path, out: Path) -> None:
    export(model, out / "graph.onnx", UNVALIDATED)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"norm_eps": 1e-6}))
    assert cached(export(model, out / "graph.onnx", UNVALIDATED)) == []


def test_a_changed_lora_or_scale_is_a_miss(model: Path, out: Path, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "lora.safetensors", 0.1)
    with_lora = with_options(UNVALIDATED, loras=(str(file),))
    export(model, out / "graph.onnx", UNVALIDATED)
    first = export(model, out / "graph.onnx", with_lora)
    before = (out / "graph.onnx").read_bytes()
    assert cached(first) == []
    assert "export" in cached(export(model, out / "graph.onnx", with_lora))
    assert (out / "graph.onnx").read_bytes() == before
    scaled = with_options(with_lora, loras=(f"{file}:0.5",))
    assert cached(export(model, out / "graph.onnx", scaled)) == []
    write_lora(file, 0.2)
    assert cached(export(model, out / "graph.onnx", with_lora)) == []


@pytest.mark.parametrize(
    "change", [{"optimization_level": 1}, {"weight_streaming": True}, {"compute_capabilities": ("8.6",)}]
)
def test_a_changed_build_option_builds_again(
    model: Path, out: Path, built: Builds, change: dict[str, Any]
) -> None:
    export(model, out / "e.plan", PLAN)
    export(model, out / "e.plan", with_options(PLAN, **change))
    assert len(built) == 2
    export(model, out / "e.plan", PLAN)
    assert len(built) == 2


def test_ema_weights_of_the_same_file_make_another_engine(
    model: Path, out: Path, built: Builds, tmp_path: Path
) -> None:
    weights = load_file(model / WEIGHTS)
    config = json.loads((model / "config.json").read_text())
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    tensors = {}
    for name, original in ldm_names(shapes, config).items():
        tensors[original] = weights[name]
        path = original.removeprefix("model.")
        tensors[f"model_ema.{path.replace('.', '')}"] = weights[name] + 1
    save_file(tensors, tmp_path / "both.safetensors")
    options = with_options(PLAN, config=model / "config.json")
    export(tmp_path / "both.safetensors", out / "e.plan", options)
    export(tmp_path / "both.safetensors", out / "e.plan", with_options(options, ema=True))
    assert len(built) == 2


def test_a_disabled_cache_stores_nothing(model: Path, out: Path, built: Builds, cache: Cache) -> None:
    options = with_options(PLAN, cache=False)
    before = {entry.key for entry in cache.entries()}
    export(model, out / "e.plan", options)
    assert {entry.key for entry in cache.entries()} == before
    export(model, out / "e.plan", with_options(options, cache=True))
    assert cached(export(model, out / "e.plan", options)) == []
    assert len(built) == 3


# Damage and interrupts


def test_a_damaged_trace_is_made_again(model: Path, out: Path, cache: Cache) -> None:
    export(model, out / "graph.onnx", UNVALIDATED)
    for entry in cache.entries():
        if entry.kind == "trace":
            file = entry.directory / "graph.onnx"
            file.write_bytes(file.read_bytes()[::-1])
    change_weights(model)
    progress, again = RecordingProgress(SilentProgress()), RecordingProgress(SilentProgress())
    export(model, out / "graph.onnx", UNVALIDATED, progress)
    assert [text for warning, text in progress.lines if warning and text.startswith("the trace ")]
    export(model, out / "graph.onnx", with_options(UNVALIDATED, parameters=SwsParameters(beta=0.5)), again)
    assert from_cache(again) == ["trace"]


def test_a_damaged_graph_is_exported_again(model: Path, out: Path, cache: Cache) -> None:
    export(model, out / "graph.onnx", GRAPH)
    before = (out / "graph.onnx").read_bytes()
    (entry,) = (entry for entry in cache.entries() if entry.kind == "graph")
    file = entry.directory / "graph.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    progress = RecordingProgress(SilentProgress())
    report = export(model, out / "graph.onnx", GRAPH, progress)
    assert cached(report) == ["check", "validate"]
    assert any(
        warning and "damaged or was removed: making it again" in text for warning, text in progress.lines
    )
    assert (out / "graph.onnx").read_bytes() == before
    assert "export" in cached(export(model, out / "graph.onnx", GRAPH))


def test_changed_weights_behind_a_stale_digest_are_found(model: Path, out: Path, cache: Cache) -> None:
    """The stored digest is wrong: the weights themselves are checked before a graph is used."""
    export(model, out / "graph.onnx", UNVALIDATED)
    files = [model / WEIGHTS]
    known = cache.digests.get(files)
    assert known is not None
    change_weights(model)
    cache.digests.put(files, *file_stamps(files), known)
    before = listing(out)
    with pytest.raises(CheckpointError, match="was changed, and its size and times are the same as before"):
        export(model, out / "graph.onnx", UNVALIDATED)
    assert listing(out) == before
    report = export(model, out / "graph.onnx", UNVALIDATED)
    assert cached(report) == []
    assert report.manifest["source"]["sha256"] != known


def test_a_damaged_engine_is_built_again(model: Path, out: Path, built: Builds, cache: Cache) -> None:
    export(model, out / "e.plan", PLAN)
    (entry,) = (entry for entry in cache.entries() if entry.kind == "engine")
    (entry.directory / "e.plan").write_bytes(b"plan X")
    report = export(model, out / "e.plan", PLAN)
    assert len(built) == 2
    assert cached(report) == STAGES
    assert (out / "e.plan").read_bytes()[-4:] == b"\2\0\0\0"


def test_an_engine_removed_during_the_run_is_built_again(
    model: Path, out: Path, built: Builds, cache: Cache
) -> None:
    export(model, out / "e.plan", PLAN)
    entries = (cache.root or Path()) / "entries"
    report = export(model, out / "e.plan", PLAN, AtStage("read cache", lambda: shutil.rmtree(entries)))
    assert len(built) == 2
    assert cached(report) == ["check"]


@pytest.mark.parametrize("function", ["pathlib.Path.rename", "pathlib.Path.write_text", "onnx_ir.save"])
def test_an_interrupt_leaves_no_partial_entry(
    model: Path, out: Path, built: Builds, cache: Cache, function: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(model, out / "e.plan", PLAN)
    assert listing(out) == {}
    entries = (cache.root or Path()) / "entries"
    assert len(cache.entries()) == len(list(entries.glob("*")))
    export(model, out / "e.plan", PLAN)
    assert (out / "e.plan").is_file()


def test_a_graph_over_tolerance_is_not_stored(
    middle_unet: Path, out: Path, tmp_path: Path, cache: Cache
) -> None:
    model = changed_copy(middle_unet, tmp_path, ROUNDED_AWAY)
    with pytest.raises(ValidationError, match=r"out_sample by .* allowed is 2e-04; nothing was written"):
        export(model, out / "graph.onnx", GRAPH)
    assert {entry.kind for entry in cache.entries()} == {"trace"}


def test_an_unwritable_cache_is_a_warning(
    model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SWS_EXPORT_CACHE_DIR", str(tmp_path / "file"))
    progress = RecordingProgress(SilentProgress())
    export(model, out / "graph.onnx", UNVALIDATED, progress)
    assert (out / "graph.onnx").is_file()
    assert any(warning and "cannot be stored in the cache" in text for warning, text in progress.lines)


# The command


def test_list_and_clear(
    model: Path, out: Path, built: Builds, cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    export(model, out / "e.plan", PLAN)
    assert main(["cache", "list"]) == 0
    printed = capsys.readouterr()
    kinds = [line.split()[0] for line in printed.out.splitlines()]
    assert [kind for kind in sorted(kinds) if kind != "trace"] == ["engine", "graph"]
    assert "model, fp32, sws, for tensorrt-rtx" in printed.out
    assert f"of 1 GB in {cache.root}" in printed.err
    assert main(["cache", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["kind"] for entry in listed["entries"]] == kinds
    assert listed["bytes"] == sum(entry["bytes"] for entry in listed["entries"])
    assert main(["cache", "clear"]) == 0
    assert f"removed {len(kinds)} results" in capsys.readouterr().err
    assert main(["cache", "list", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


# Inputs that change while they are exported


@pytest.mark.parametrize(
    ("stage", "options", "kept"),
    [
        ("check tensors", PLAN, set()),
        ("rewrite", PLAN, set()),
        ("hash", VALIDATED_PLAN, {"graph", "validation"}),
        ("hash", with_options(PLAN, cache=False), set()),
    ],
)
def test_a_checkpoint_replaced_while_it_is_exported(
    stage: str,
    options: ExportOptions,
    kept: set[str],
    model: Path,
    out: Path,
    cache: Cache,
    built: Builds,
) -> None:
    """Nothing is written, and the replacement never gets results of the first file from the cache."""
    replacement = Path(shutil.copytree(model, model.with_name("replacement")))
    change_weights(replacement)

    def replace() -> None:
        (replacement / WEIGHTS).replace(model / WEIGHTS)

    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} was changed while it was exported; nothing"):
        export(model, out / "e.plan", options, AtStage(stage, replace))
    assert listing(out) == {}
    assert {entry.kind for entry in cache.entries()} - {"trace"} == kept
    assert cached(export(model, out / "e.plan", with_options(options, cache=True))) == []


def test_a_lora_replaced_while_it_is_exported(model: Path, out: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.safetensors", 0.1)

    def replace() -> None:
        write_lora(tmp_path / "other.safetensors", 0.2).replace(lora)

    options = with_options(UNVALIDATED, loras=(str(lora),))
    with pytest.raises(CheckpointError, match=r"lora\.safetensors was changed while it was exported"):
        export(model, out / "graph.onnx", options, AtStage("rewrite", replace))
    assert listing(out) == {}
