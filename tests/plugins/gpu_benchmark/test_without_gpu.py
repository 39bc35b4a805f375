"""As much of benchmarks/gpu as runs without a GPU: references, compilation, refusals, summaries."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import correctness, parts, sanitizer, site_timings, unet_step
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu.correctness import check_guard, check_transport
from benchmarks.gpu.example_engine import check_example_engine, compare_steps
from benchmarks.gpu.kernels import KernelError, Kernels, compile_kernels
from benchmarks.gpu.ptxas_report import as_table, parse_ptxas_log
from benchmarks.gpu.references import (
    dense_transport,
    literal_guard,
    make_guard_inputs,
    make_weights,
    plain_attention,
    rebalance_band,
)
from benchmarks.gpu.sites import SITES
from benchmarks.gpu.summary import as_markdown, summarize
from sws_export import export
from sws_export.options import ExportOptions, SizeOptions
from sws_export.reference import band_from_dense, dense_from_band, rebalance
from tests.plugins.banded_transport import reference as transport_reference
from tests.plugins.key_guard.reference import GuardCase, bisection_step, value_mix
from tests.plugins.toolchain import BUILDS, ROOT


def test_dense_transport_is_the_literal_one() -> None:
    weights = make_weights(2, (5, 7), 4, "cpu")
    assert torch.equal(dense_transport(weights, 4), transport_reference.dense_transport(weights, 4))


def test_a_band_is_rebalanced_like_its_dense_matrix() -> None:
    band = band_from_dense(dense_transport(make_weights(2, (5, 7), 8, "cpu"), 8).double(), 5, 7)
    expected = rebalance(dense_from_band(band), 2)
    torch.testing.assert_close(rebalance_band(band, 2), band_from_dense(expected, 5, 7))


def test_literal_guard_lands_on_the_step_of_the_other_reference() -> None:
    q, k, k_perm, scalars = make_guard_inputs(2, 60, 80, torch.float32, "cpu", sharpness=2, kappa=1e-3)
    alpha, value = literal_guard(q, k, k_perm, scalars, 2, dtype=torch.float64)

    tau_q, amplitude, kappa, key_gate, value_gain = scalars
    case = GuardCase(q, k, k_perm, 2, amplitude, kappa, tau_q, key_gate, value_gain)
    for sample in range(2):
        assert float(value[sample]) == pytest.approx(value_mix(case, sample), rel=1e-6)
        cap = 0.3 * 2 * float(value[sample])
        assert float(alpha[sample]) == pytest.approx(cap * bisection_step(case, sample) / 128, rel=1e-6)
        assert 0 < bisection_step(case, sample) < 127


def test_plain_attention_is_attention_by_heads() -> None:
    q, k, v = torch.randn(3, 1, 10, 16)
    heads = [slice(0, 8), slice(8, 16)]
    expected = [torch.softmax(q[..., h] @ k[..., h].transpose(1, 2) / 8**0.5, -1) @ v[..., h] for h in heads]
    torch.testing.assert_close(plain_attention(q, k, v, 2), torch.cat(expected, -1))


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    try:
        return Kernels(compile_kernels("90", BUILDS / "benchmark"))
    except KernelError as error:
        if "was not found" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU: nothing is refused")
def test_launches_without_a_driver_are_refused_by_name(kernels: Kernels) -> None:
    weights = make_weights(1, (8, 8), 2, "cpu")
    x = torch.zeros(1, 64, 16, dtype=torch.float16)
    with pytest.raises(KernelError, match="CUDA: cudaError"):
        kernels.banded_transport(weights, [x], 2)
    q, k, k_perm, scalars = make_guard_inputs(1, 64, 16, torch.float16, "cpu")
    with pytest.raises(KernelError, match="CUDA: cudaError"):
        kernels.key_guard(q, k, k_perm, scalars, 2)


def test_a_radius_out_of_range_is_refused(kernels: Kernels) -> None:
    x = torch.zeros(1, 64, 16, dtype=torch.float16)
    with pytest.raises(KernelError, match="cudaErrorInvalidValue"):
        kernels.banded_transport(torch.zeros(1, 181, 8, 8), [x], 9)


def test_ptxas_report_lists_every_kernel(kernels: Kernels) -> None:
    usages = parse_ptxas_log((BUILDS / "benchmark" / "build.log").read_text())
    table = as_table(usages)
    assert len(usages) == 18
    assert "| transport_tensor_core_kernel<bfloat16, 8> | " in table
    assert "| finish_kernel | " in table
    assert "yes" not in table


def timings(attention: float, transport: float, guard: float) -> list[dict[str, object]]:
    names = (
        "mix",
        "transport_two_launches",
        "dense_matmul",
        "copy_same_bytes",
        "guard_tight_budget",
        "guard_idle",
    )
    return [
        dict.fromkeys(names, 50.0)
        | {"site": site.name, "attention": attention, "transport": transport, "guard": guard}
        | {"literal_guard": None, "mix": 10.0}
        for site in SITES
    ]


STATE_UPDATES = {site.name: 40.0 for site in SITES}


def test_summary_adds_up_over_sites() -> None:
    steps = {"SD1.5": 19_200.0, "SDXL": "no diffusers"}
    summary = summarize(timings(100.0, 20.0, 80.0), STATE_UPDATES, steps, 3e12, 6e14)

    sd15, sdxl = summary["models"]
    assert sd15["added_microseconds"] == 16 * 110 + 4 * 40
    assert sdxl["added_microseconds"] == 70 * 110 + 2 * 40
    assert sd15["overhead_of_step"] == pytest.approx(0.1)
    assert sdxl["overhead_of_step"] is None
    # Memory-bound at SD1.5 64 x 64: P once, keys and values in and out.
    moved = 2 * 4096 * (145 * 4 + 4 * 2 * 320)
    assert summary["sites"][0]["transport_fraction_of_bound"] == pytest.approx(moved / 3e12 * 1e6 / 20)
    assert list(summary["goals"].values()) == [True, False, True, None]


def test_tables_show_every_site_and_model() -> None:
    rows = timings(100.0, 20.0, 80.0)
    steps = {"SD1.5": 19_200.0, "SDXL": "no diffusers"}
    summary = summarize(rows, STATE_UPDATES, steps, 3e12, 6e14)
    results = {"device": "X", "torch": "2", "cuda": "13", "timings": rows, "summary": summary}

    table = as_markdown(results)

    assert all(f"| {site.name} | 20.0 |" in table for site in SITES)
    assert "| SD1.5 | 1920 | 1600 | 19200 | 10.0 |" in table
    assert "| SDXL | 7780 | 7000 | no diffusers | - |" in table


def test_a_run_cut_short_still_has_a_summary() -> None:
    rows = timings(100.0, 20.0, 80.0)[:4]
    summary = summarize(rows, STATE_UPDATES, {}, 3e12, 6e14)
    results = {"device": "X", "torch": "2", "cuda": "13", "timings": rows, "summary": summary}

    assert [model["model"] for model in summary["models"]] == ["SD1.5"]
    assert list(summary["goals"].values()) == [True, False, None, None]
    assert "| SD1.5 | 1920 | 1600 | not measured | - |" in as_markdown(results)
    assert summarize([], {}, {}, 3e12, 6e14)["goals"] == dict.fromkeys(summary["goals"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_the_command_says_that_there_is_no_gpu() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "no GPU" in result.stderr


class PlainKernels:
    """The kernels' calls, answered by plain torch; `spoil` is what each result is multiplied by."""

    def __init__(self, spoil: float = 1.0) -> None:
        self.spoil = spoil

    def guard_workspace(self, *_):
        return None

    def banded_transport(self, weights, tensors, radius, *_):
        dense = dense_transport(weights, radius)
        return [(dense @ x.float() * self.spoil).to(x.dtype) for x in tensors]

    def key_guard(self, q, k, k_perm, scalars, heads, **_):
        return [x * self.spoil for x in literal_guard(q, k, k_perm, scalars, heads, dtype=torch.float64)]


@pytest.mark.parametrize("check", [check_transport, check_guard])
@pytest.mark.parametrize("spoil", [1.0, 1.5, float("nan")])
def test_the_comparisons_pass_what_is_right_and_nothing_else(check, spoil, monkeypatch) -> None:
    monkeypatch.setattr(correctness, "GRIDS", ((5, 7), (8, 8)))
    monkeypatch.setattr(correctness, "GUARD_SHAPES", ((64, 2, 40),))
    monkeypatch.setattr(correctness, "CHANNELS", (8, 33))
    findings = list(check(PlainKernels(spoil), "cpu"))

    assert len(findings) >= 18
    assert all(finding.passed for finding in findings) == (spoil == 1.0)
    json.dumps([finding.as_json() for finding in findings], allow_nan=False)


def test_a_site_is_timed_in_every_respect(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_once(work):
        work()
        return 1.0

    monkeypatch.setattr(site_timings, "time_graph", run_once)
    site = SITES[3]
    row = site_timings.time_site(PlainKernels(), site, "cpu").as_json()

    assert row.pop("site") == site.name
    assert set(row.values()) == {1.0}
    assert site_timings.time_state_update(site, "cpu") == 1.0
    assert set(timings(1, 1, 1)[0]) == {"site", *row}


PART = """
import json, sys, time
from pathlib import Path
name, out = sys.argv[4], Path(sys.argv[6])
out.write_text(json.dumps({"found_" + name: 1} | ({"not_run": "no package"} if name == "engine" else {})))
if name == "guard":
    sys.exit(-11)
if name == "timings":
    time.sleep(60)
"""


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/part.py -m "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "part.py").write_text(PART.replace("argv[4]", "argv[5]").replace("argv[6]", "argv[7]"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(
        parts,
        "PARTS",
        tuple(parts.Part(part.name, 2 if part.name == "timings" else 30) for part in parts.PARTS),
    )
    names = ["transport", "guard", "timings", "engine", "sanitizer"]

    results = parts.run_parts(names, tmp_path / "gpu.json", 100)

    how = results["parts"]
    assert how["transport"].startswith("done in")
    assert how["guard"].startswith("failed with status")
    assert how["timings"].startswith("cut off after 2 s")
    assert how["engine"] == "not run: no package"
    assert how["sanitizer"].startswith("done in")
    assert all(results[f"found_{name}"] == 1 for name in names)
    assert json.loads((tmp_path / "gpu.json").read_text()) == results
    late = parts.run_parts(["unet"], tmp_path / "late.json", 0)
    assert late["parts"] == {"unet": "not run: the time is up"}


def test_every_part_has_its_work_and_the_slowest_comes_last() -> None:
    assert parts.PARTS[-1].name == "sanitizer"
    assert {part.name for part in parts.PARTS} == set(gpu_run.WORK)


SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING" > ALLOCATOR
case "$2" in
memcheck) echo "========= ERROR SUMMARY: 0 errors"; exit 0 ;;
racecheck) echo "========= Race at kernel"; echo "========= RACECHECK SUMMARY: 1 hazard"; exit 9 ;;
*) exit 1 ;;
esac
"""


def test_verdicts_of_the_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER.replace("ALLOCATOR", str(tmp_path / "allocator")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    verdicts = dict(sanitizer.sanitize())

    assert verdicts["memcheck"] == "exit 0: ERROR SUMMARY: 0 errors"
    assert "Race at kernel" in verdicts["racecheck"]
    assert [sanitizer.found_nothing(verdict) for verdict in verdicts.values()] == [True, False, False, False]
    assert (tmp_path / "allocator").read_text() == "1\n"
    assert sanitizer.found_nothing("not run: compute-sanitizer is not installed")


@pytest.mark.parametrize(("config", "size"), [(unet_step.SD15, 860), (unet_step.SDXL, 2567)])
def test_the_unets_are_those_of_the_models(config: dict[str, object], size: int) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert round(sum(weight.numel() for weight in unet.parameters()) / 1e6) == size


def test_artefacts_of_the_example_are_compared_step_by_step(tmp_path: Path) -> None:
    options = ExportOptions(sizes=SizeOptions(batch="2", tokens="8"), validate=False)
    export(ROOT / "examples" / "shapes", tmp_path / "a.onnx", options)

    assert compare_steps(tmp_path / "a.onnx", tmp_path / "a.onnx")["relative_errors"] == [0, 0, 0]


def test_an_engine_for_a_gpu_that_is_no_target_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "9.0" in str(check_example_engine(tmp_path))
