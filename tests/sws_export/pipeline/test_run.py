"""`export`: the files it writes, the manifest, validation failures, interrupts and bugs."""

import json
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from sws_export.cli import main

from sws_export import (
    ExportOptions,
    SizeOptions,
    SwsOptions,
    SwsParameters,
    export,
)
from sws_export.errors import ValidationError
from sws_export.progress import SilentProgress
from sws_export.runtime.contract import read_contract
from tests.export_runs import (
    ONE_SITE,
    ROUNDED_AWAY,
    AtStage,
    Builds,
    Session,
    changed_copy,
    difference,
    error_line,
    listing,
    with_options,
)

VALIDATED = ExportOptions(sws=ONE_SITE)
FAST = with_options(VALIDATED, validate=False)


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builds:
    """The engines that were built, which are a few bytes."""
    return Builds(tmp_path / "builds", monkeypatch)


def inputs(batch: int = 2) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "sample": random.standard_normal((batch, 4, 8, 6)),
        "timestep": np.full(batch, 500.0),
        "encoder_hidden_states": random.standard_normal((batch, 7, 16)),
        "sigma": np.full(batch, 3.0),
        "intensity": np.ones(batch),
    }


@pytest.mark.usefixtures("quick_trace")
class TestFiles:
    def test_a_graph_and_its_manifest(self, middle_unet: Path, out: Path) -> None:
        report = export(middle_unet, out / "graph.onnx", with_options(VALIDATED, cache=False))
        assert report.files == (out / "graph.onnx", out / "graph.onnx.json")
        assert sorted(listing(out)) == ["graph.onnx", "graph.onnx.json"]
        assert json.loads((out / "graph.onnx.json").read_text()) == report.manifest
        assert report.validation is not None
        assert report.validation.passed
        assert report.engine is None
        assert report.manifest["profiles"] is None
        names = [timing.name for timing in report.stages]
        assert names[:5] == ["export", "rewrite", "check", "save", "validate"]
        assert all(timing.peak_memory > 10**7 for timing in report.stages)

    def test_an_engine_alone(self, middle_unet: Path, out: Path, built: Builds) -> None:
        options = with_options(FAST, vae_scale=1, tokens="1:8:77", compute_capabilities=("8.9",))
        report = export(middle_unet, out / "e.engine", options)
        assert sorted(listing(out)) == ["e.engine", "e.engine.json"]
        (specification,) = built.specifications
        assert specification["options"]["compute_capabilities"] == ["8.9"]
        (shapes,) = specification["profiles"]
        assert shapes["sample"] == [[1, 4, 16, 16], [2, 4, 16, 16], [2, 4, 16, 16]]
        assert shapes["sws_state_d2"][0] == [1, 145, 8, 8]
        assert report.manifest["profiles"][0]["encoder_hidden_states"] == {
            "min": [1, 1, 16],
            "opt": [2, 8, 16],
            "max": [2, 77, 16],
        }
        assert report.manifest["engine"]["library_version"] == "1.7"

    @pytest.mark.usefixtures("built")
    def test_an_engine_and_its_graph(self, middle_unet: Path, out: Path) -> None:
        options = with_options(FAST, keep_onnx=True, vae_scale=1)
        report = export(middle_unet, out / "e.plan", options)
        assert report.files[0] == out / "e.plan"
        assert read_contract(out / "e.onnx").backend == "onnxruntime"
        assert sorted(listing(out)) == ["e.onnx", "e.onnx.json", "e.plan", "e.plan.json"]

    def test_a_second_run_replaces_the_first(self, middle_unet: Path, out: Path) -> None:
        export(middle_unet, out / "graph.onnx", FAST)
        first = listing(out)
        export(middle_unet, out / "graph.onnx", with_options(FAST, parameters=SwsParameters(beta=0.5)))
        second = listing(out)
        assert first.keys() == second.keys()
        assert first["graph.onnx"] != second["graph.onnx"]
        assert json.loads((out / "graph.onnx.json").read_text())["sws"]["beta"] == 0.5

    def test_a_dry_run_writes_nothing(
        self, middle_unet: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("onnx_ir.save", None)
        report = export(
            middle_unet, out / "e.plan", ExportOptions(sizes=SizeOptions(vae_scale=1), dry_run=True)
        )
        assert report.files == ()
        assert report.preflight.memory.keys() == {"export", "validation", "engine build"}
        assert listing(out) == {}

    def test_a_skipped_validation_is_in_the_manifest(self, middle_unet: Path, out: Path) -> None:
        report = export(middle_unet, out / "graph.onnx", FAST)
        assert report.validation is None
        assert report.manifest["validation"] == {"passed": None, "reason": "skipped by --no-validate"}

    def test_sites_are_selected_by_pattern(self, random_unet: Path, out: Path) -> None:
        patterns = ("up_blocks.*.attn1", "mid_*.attn1")
        report = export(random_unet, out / "graph.onnx", with_options(FAST, sites=patterns))
        (names,) = report.manifest["sites"].values()
        assert {name.split(".")[0] for name in names} == {"up_blocks", "mid_block"}
        deselected = {
            site["name"]
            for site in report.manifest["skipped_sites"]
            if site["reason"] == "not selected by --sites" and site["name"].endswith("attn1")
        }
        assert deselected == {"down_blocks.1.attentions.0.transformer_blocks.0.attn1"}

    def test_a_plain_graph_has_no_sws(self, middle_unet: Path, out: Path) -> None:
        report = export(middle_unet, out / "graph.onnx", ExportOptions(sws=SwsOptions(plain=True)))
        assert report.manifest["sws"] is None
        assert report.manifest["states"] == []
        assert report.validation is not None
        assert [output.name for output in report.validation.outputs] == ["out_sample"]
        assert Session(out / "graph.onnx").inputs.keys() == {"sample", "timestep", "encoder_hidden_states"}

    def test_an_export_in_a_thread(self, middle_unet: Path, out: Path) -> None:
        thread = threading.Thread(target=export, args=(middle_unet, out / "graph.onnx", FAST))
        thread.start()
        thread.join()
        assert sorted(listing(out)) == ["graph.onnx", "graph.onnx.json"]


@pytest.mark.usefixtures("quick_trace")
def test_a_plain_graph_as_the_source(random_unet: Path, traced: Path, out: Path) -> None:
    export(random_unet, out / "a.onnx", FAST)
    report = export(traced, out / "b.onnx", VALIDATED)
    assert report.validation is not None
    assert report.validation.reference == "plain graph, at intensity 0"
    assert report.manifest["source"]["kind"] == "onnx"
    state = {"sws_state_d2": np.random.default_rng(1).random((2, 145, 4, 3))}
    (a, state_a), (b, state_b) = (Session(out / name).step(inputs(), state) for name in ("a.onnx", "b.onnx"))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(state_a["sws_state_d2"], state_b["sws_state_d2"])


def test_bfloat16_is_validated_as_a_float32_copy(middle_unet: Path, out: Path) -> None:
    report = export(middle_unet, out / "graph.onnx", with_options(VALIDATED, precision="bf16"))
    assert report.validation is not None
    assert any("float32 copy" in remark for remark in report.validation.remarks)
    assert report.validation.passed
    assert sorted(listing(out)) == ["graph.onnx", "graph.onnx.json"]
    model = ir.load(out / "graph.onnx")
    types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    assert types["sample"] == types["out_sample"] == ir.DataType.BFLOAT16
    assert types["sws_state_d2"] == types["sws_state_d2_out"] == types["sigma"] == ir.DataType.FLOAT


# Validation


@pytest.mark.usefixtures("quick_trace")
def test_what_float32_rounds_away_is_found(middle_unet: Path, out: Path, tmp_path: Path) -> None:
    model = changed_copy(middle_unet, tmp_path, ROUNDED_AWAY)
    message = (
        "the graph differs from the eager reference in float64: out_sample by .* allowed is 2e-04; nothing"
    )
    with pytest.raises(ValidationError, match=message):
        export(model, out / "graph.onnx", VALIDATED)
    assert listing(out) == {}


@pytest.mark.usefixtures("quick_trace")
def test_an_overflow_is_reported(middle_unet: Path, out: Path, tmp_path: Path) -> None:
    """Two factors of 1e20 and more are too large for float32, and not for the reference."""
    layer = "mid_block.attentions.0.transformer_blocks.0.ff.net"
    changes = {f"{layer}.0.proj.weight": lambda w: w * 1e21, f"{layer}.2.weight": lambda w: w * 1e-38}
    with pytest.raises(ValidationError, match="has NaN or Inf"):
        export(changed_copy(middle_unet, tmp_path, changes), out / "graph.onnx", VALIDATED)
    assert listing(out) == {}


# Interrupts

EARLIER = ("e.plan", "e.onnx", "e.plan.json")
PLAN = with_options(FAST, keep_onnx=True, vae_scale=1)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("quick_trace", "built")
@pytest.mark.parametrize("stage", ["open", "check tensors", "rewrite", "check weights", "validate", "hash"])
def test_an_interrupt_in_each_stage(middle_unet: Path, out: Path, stage: str) -> None:
    for name in EARLIER:
        (out / name).write_text("of an earlier run")
    before = listing(out)
    options = with_options(PLAN, validate=stage == "validate")
    with pytest.raises(KeyboardInterrupt):
        export(middle_unet, out / "e.plan", options, AtStage(stage, interrupt))
    assert listing(out) == before


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("function", ["onnx_ir.save", "json.dump", "os.fsync"])
def test_an_interrupt_while_a_file_is_written(
    middle_unet: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    function: str,
) -> None:
    for name in EARLIER:
        (out / name).write_text("of an earlier run")
    before = listing(out)

    def interrupted(*arguments: Any, **_: Any) -> None:
        for argument in arguments:
            if isinstance(argument, Path) and argument.parent.parent == out and not argument.exists():
                argument.write_bytes(b"half of it")
        interrupt()

    monkeypatch.setattr(function, interrupted)
    arguments = [str(middle_unet), "--out", str(out / "e.plan"), "--keep-onnx", "--vae-scale", "1"]
    arguments += ["--sites", "mid_block.*.attn1", "--guard", "literal", "--no-validate", "--no-cache"]
    assert main(arguments) == 1
    assert error_line(capsys.readouterr().err) == "interrupted; nothing was written"
    assert listing(out) == before


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_during_publishing_is_ignored(
    middle_unet: Path, out: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """All artefacts move, or none."""
    replace, handler = Path.replace, signal.getsignal(number)

    def interrupted(self: Path, target: Path) -> Path:
        moved = replace(self, target)
        signal.raise_signal(number)
        return moved

    monkeypatch.setattr(Path, "replace", interrupted)
    export(middle_unet, out / "e.plan", with_options(PLAN, cache=False))
    assert sorted(listing(out)) == ["e.onnx", "e.onnx.json", "e.plan", "e.plan.json"]
    assert signal.getsignal(number) is handler


def test_a_second_interrupt_leaves_nothing(
    middle_unet: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def interrupted(directory: Path, **options: Any) -> None:
        interrupt()
        remove(directory, **options)

    monkeypatch.setattr("shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(
            middle_unet, out / "graph.onnx", with_options(FAST, cache=False), AtStage("rewrite", interrupt)
        )
    assert listing(out) == {}


def test_a_bug_leaves_nothing_and_keeps_its_traceback(
    middle_unet: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnx_ir.save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([str(middle_unet), "--out", str(out / "graph.onnx"), "--quiet", "--no-cache"])
    assert listing(out) == {}


@pytest.mark.usefixtures("quick_trace")
def test_tightening_the_budget_changes_the_prediction(middle_unet: Path, out: Path) -> None:
    loose = with_options(FAST, parameters=SwsParameters(kl_floor=100.0))
    tight = with_options(FAST, parameters=SwsParameters(value_cap=0.0, key_cap=0.0))
    results = []
    for name, options in (("loose.onnx", loose), ("tight.onnx", tight)):
        export(middle_unet, out / name, options, SilentProgress())
        results.append(Session(out / name).step(inputs(), {"sws_state_d2": np.zeros((2, 145, 4, 3))})[0])
    assert difference(*results) > 1e-7
