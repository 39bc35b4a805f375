"""What runs of benchmarks/gpu without a GPU: references, refusals, summaries, comparisons, a dry run."""

import dataclasses
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import parts, sanitizer, site_timings
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu.correctness import check_fused_guard, check_guard, check_transport
from benchmarks.gpu.example_engine import check_example_engine, compare_steps
from benchmarks.gpu.kernels import KernelError, Kernels, compile_kernels
from benchmarks.gpu.ptxas_report import as_table, parse_ptxas_log
from benchmarks.gpu.references import (
    dense_transport,
    gather_kernel,
    literal_guard,
    make_guard_inputs,
    make_weights,
    plain_attention,
    rebalance_band,
)
from benchmarks.gpu.sizes import FULL, SMALL, SiteGroup
from benchmarks.gpu.summary import as_markdown, summarize
from benchmarks.gpu.timing import input_sets
from sws_export import export
from sws_export.options import ExportOptions, SizeOptions
from sws_export.reference import band_from_dense, dense_from_band, rebalance
from tests.export_runs import ONE_SITE
from tests.plugins.banded_transport import reference as transport_reference
from tests.plugins.gpu_benchmark.plain_kernels import PlainKernels
from tests.plugins.key_guard.reference import GuardCase, bisection_step, value_mix
from tests.plugins.toolchain import BUILDS, ROOT, build_emulated_kernels


def test_dense_transport_is_the_literal_one() -> None:
    weights = make_weights(2, (5, 7), 4, "cpu")
    assert torch.equal(dense_transport(weights, 4), transport_reference.dense_transport(weights, 4))


def test_a_band_is_rebalanced_like_its_dense_matrix() -> None:
    band = band_from_dense(dense_transport(make_weights(2, (5, 7), 8, "cpu"), 8).double(), 5, 7)
    expected = rebalance(dense_from_band(band), 2)
    torch.testing.assert_close(
        rebalance_band(band, gather_kernel(8, "cpu").double(), 2), band_from_dense(expected, 5, 7)
    )


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
def emulated() -> Kernels:
    """The kernels' own code on the CPU, called like the compiled ones."""
    return Kernels(build_emulated_kernels())


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    try:
        return Kernels(compile_kernels("90", BUILDS / "benchmark"))
    except KernelError as error:
        if "was not found" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("check", [check_transport, check_guard])
def test_the_kernels_pass_the_comparisons_on_the_cpu(check, emulated: Kernels) -> None:
    findings = list(check(emulated, "cpu", SMALL.sweep))
    assert len(findings) >= 18
    assert [finding for finding in findings if not finding.passed] == []


def test_a_radius_out_of_range_is_refused(emulated: Kernels) -> None:
    x = torch.zeros(1, 64, 16, dtype=torch.float16)
    with pytest.raises(KernelError, match="cudaErrorInvalidValue"):
        emulated.banded_transport(torch.zeros(1, 181, 8, 8), [x], 9)


@pytest.mark.slow
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU: nothing is refused")
def test_launches_without_a_driver_are_refused_by_name(compiled: Kernels) -> None:
    weights = make_weights(1, (8, 8), 2, "cpu")
    x = torch.zeros(1, 64, 16, dtype=torch.float16)
    with pytest.raises(KernelError, match="CUDA: cudaError"):
        compiled.banded_transport(weights, [x], 2)
    q, k, k_perm, scalars = make_guard_inputs(1, 64, 16, torch.float16, "cpu")
    with pytest.raises(KernelError, match="CUDA: cudaError"):
        compiled.key_guard(q, k, k_perm, scalars, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_ptxas_report_lists_every_kernel() -> None:
    usages = parse_ptxas_log((BUILDS / "benchmark" / "build.log").read_text())
    table = as_table(usages)
    assert len(usages) == 23
    assert "| transport_tensor_core_kernel<bfloat16, 8> | " in table
    assert "| finish_kernel | " in table
    assert "yes" not in table


def timings(attention: float, transport: float, guard: float) -> list[dict[str, object]]:
    names = [field.name for field in dataclasses.fields(site_timings.SiteTimings)]
    return [
        dict.fromkeys(names, 50.0)
        | {"site": site.name, "attention": attention, "transport": transport, "guard": guard}
        | {"literal_guard": None, "mix": 10.0, "fused_guard": 4 * attention}
        for site in FULL.sites
    ]


STATE_UPDATES = {site.name: 40.0 for site in FULL.sites}
SD15, SDXL = "SD1.5 step <= 1.15 plain", "SDXL step <= 1.18 plain"
TRANSPORT, GUARD = "transport at 64x64 <= 40 us", "guard <= 1.3 attention at every site"


def test_summary_adds_up_over_sites() -> None:
    steps = {"SD1.5": 19_200.0, "SDXL": "no diffusers"}
    summary = summarize(FULL.sites, timings(100.0, 20.0, 80.0), STATE_UPDATES, steps, 3e12, 6e14)

    sd15, sdxl = summary["models"]
    assert sd15["added_microseconds"] == 16 * 110 + 4 * 40
    assert sdxl["added_microseconds"] == 70 * 110 + 2 * 40
    assert sd15["overhead_of_step"] == pytest.approx(0.1)
    assert sd15["fused_guard_of_step"] == pytest.approx(16 * 400 / 19_200)
    assert sdxl["overhead_of_step"] is None
    # Memory-bound at SD1.5 64 x 64: P once, keys and values in and out.
    moved = 2 * 4096 * (145 * 4 + 4 * 2 * 320)
    assert summary["sites"][0]["transport_fraction_of_bound"] == pytest.approx(moved / 3e12 * 1e6 / 20)
    assert summary["sites"][0]["fused_guard_over_attention"] == 4
    assert summary["goals"] == {TRANSPORT: True, GUARD: True, SD15: True, SDXL: None}


@pytest.mark.parametrize(
    ("measured", "goal"),
    [((100.0, 41.0, 80.0), TRANSPORT), ((100.0, 20.0, 131.0), GUARD), ((200.0, 40.0, 200.0), SD15)],
)
def test_a_goal_that_is_missed_is_false(measured: tuple[float, float, float], goal: str) -> None:
    summary = summarize(FULL.sites, timings(*measured), STATE_UPDATES, {"SD1.5": 19_200.0}, 3e12, 6e14)
    assert summary["goals"][goal] is False


def test_tables_show_every_site_and_model() -> None:
    rows = timings(100.0, 20.0, 80.0)
    steps = {"SD1.5": 19_200.0, "SDXL": "no diffusers"}
    summary = summarize(FULL.sites, rows, STATE_UPDATES, steps, 3e12, 6e14)
    results = {"device": "X", "torch": "2", "cuda": "13", "timings": rows, "summary": summary}

    table = as_markdown(results)

    assert all(f"| {site.name} | 20.0 |" in table for site in FULL.sites)
    assert "| SD1.5 | 1920 | 1600 | 19200 | 10.0 | 33.3 |" in table
    assert "| SDXL | 7780 | 7000 | no diffusers | - | - |" in table


def test_a_run_cut_short_still_has_a_summary() -> None:
    rows = timings(100.0, 20.0, 80.0)[:4]
    summary = summarize(FULL.sites, rows, STATE_UPDATES, {}, 3e12, 6e14)
    results = {"device": "X", "torch": "2", "cuda": "13", "timings": rows, "summary": summary}

    assert [model["model"] for model in summary["models"]] == ["SD1.5"]
    assert summary["goals"] == dict.fromkeys(summary["goals"])
    assert "| SD1.5 | 1920 | 1600 | not measured | - | - |" in as_markdown(results)
    assert summarize(FULL.sites, [], {}, {}, 3e12, 6e14)["goals"] == dict.fromkeys(summary["goals"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_the_command_fails_without_a_gpu() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "no GPU" in result.stderr


@pytest.mark.parametrize("check", [check_transport, check_guard])
@pytest.mark.parametrize(
    ("kernels", "passes"),
    [
        (PlainKernels(), True),
        (PlainKernels(1.5), False),
        (PlainKernels(float("nan")), False),
        (PlainKernels(repeats=False), False),
    ],
    ids=["right", "wrong", "nan", "not repeatable"],
)
def test_the_comparisons_pass_right_results_only(check, kernels, passes) -> None:
    findings = list(check(kernels, "cpu", SMALL.sweep))

    assert len(findings) >= 18
    assert all(finding.passed for finding in findings) == passes
    json.dumps([finding.as_json() for finding in findings], allow_nan=False)


def test_an_output_that_is_not_written_fails() -> None:
    for check in (check_transport, check_guard):
        assert not all(finding.passed for finding in check(PlainKernels(writes=False), "cpu", SMALL.sweep))


def test_the_full_sweep_has_the_cases_of_the_models() -> None:
    shapes = FULL.sweep.guard_shapes
    assert {4096} <= {shape.tokens for shape in shapes}
    assert any(shape.query_tokens > shape.tokens for shape in shapes)
    # The later rounds have 2 x 132 / batch blocks on an H100: some of these must process several row tiles.
    assert any(shape.heads * -(-shape.query_tokens // 128) > 264 // shape.batch for shape in shapes)
    assert (64, 64) in FULL.sweep.grids


def test_the_guard_of_four_attentions_finds_the_literal_step() -> None:
    sweep = dataclasses.replace(SMALL.sweep, budgets=FULL.sweep.budgets)
    findings = list(check_fused_guard(PlainKernels(), "cpu", sweep))
    assert len(findings) == 2 * 2 * len(sweep.budgets)
    assert [finding for finding in findings if not finding.passed] == []


def set_cache(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with a cache of this size."""
    properties = dataclasses.make_dataclass("Properties", [("L2_cache_size", int)])(nbytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def fill_with_three_sets(site: SiteGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose cache, twice over, is filled by three sets of the float16 inputs of a site."""
    set_cache(3 * 3 * site.batch * site.tokens * site.channels * 2 // 2, monkeypatch)


def test_inputs_rotate_through_more_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = 50 * 2**20
    set_cache(cache, monkeypatch)
    for nbytes in (10**5, 3 * 10**6, 10**7, 10**9):
        count = input_sets(nbytes)
        assert count * nbytes >= 2 * cache or count == 64
        assert (count - 1) * nbytes < 2 * cache


def test_a_site_is_timed_in_every_respect(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[set[int]] = []

    def run_once(works):
        for work in works:
            work()
        addresses.append({id(work) for work in works})
        return 1.0

    site = FULL.sites[3]
    fill_with_three_sets(site, monkeypatch)
    row = site_timings.time_site(PlainKernels(), site, "cpu", time=run_once).as_json()

    assert row.pop("site") == site.name
    assert row.pop("sets") == 3
    assert set(row.values()) == {1.0}
    assert sorted(map(len, addresses)) == [1, *[3] * 10]
    assert site_timings.time_state_update(site, "cpu", run_once) == 1.0


def test_sets_of_inputs_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_with_three_sets(FULL.sites[3], monkeypatch)
    sets = site_timings.make_site_inputs(PlainKernels(), FULL.sites[3], "cpu", torch.float16)
    tensors = [
        tensor
        for inputs in sets
        for value in vars(inputs).values()
        for tensor in (value if isinstance(value, list) else [value])
    ]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors) == 33


def succeed(record: parts.Record) -> bool:
    record.values["found"] = 1
    return True


def fail(record: parts.Record) -> bool:
    record.values["failed"] = 1
    return False


def crash(record: parts.Record) -> bool:
    record.values["before_the_crash"] = 1
    record.save()
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGSEGV)
    return True


def raise_error(record: parts.Record) -> bool:
    record.values["before_the_error"] = 1
    raise RuntimeError("an error")


def hang(record: parts.Record) -> bool:
    helper = subprocess.Popen(["sleep", "100"])
    record.values["helper"] = helper.pid
    record.save()
    time.sleep(100)
    return True


def skip(record: parts.Record) -> bool:
    record.values["not_run"] = "no package"
    return True


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path: Path) -> None:
    work = {
        "build": succeed,
        "transport": crash,
        "guard": hang,
        "timings": raise_error,
        "unet": skip,
        "engine": fail,
        "sanitizer": succeed,
    }
    limited = [parts.Part(name, 1 if name == "guard" else 30) for name in work]

    results = parts.run_parts(limited, tmp_path / "gpu.json", 100, work)

    how = results["parts"]
    assert how["build"].startswith("done in")
    assert how["transport"].startswith(f"failed with status -{signal.SIGSEGV:d} ")
    assert how["guard"].startswith("stopped after ")
    assert how["timings"].startswith("failed with status 1 ")
    assert how["unet"] == "not run: no package"
    assert how["engine"].startswith("failed with status 1 ")
    assert how["sanitizer"].startswith("done in")
    for name in ("found", "failed", "before_the_crash", "before_the_error"):
        assert results[name] == 1
    # What a part has started ends with it.
    assert not is_alive(results["helper"])
    assert json.loads((tmp_path / "gpu.json").read_text()) == results
    late = parts.run_parts([parts.Part("unet", 30)], tmp_path / "late.json", 0, work)
    assert late["parts"] == {"unet": "not run: no time left"}


def test_every_part_has_its_work_and_the_slowest_comes_last() -> None:
    assert parts.PARTS[-1].name == "sanitizer"
    assert {part.name for part in parts.PARTS} == set(gpu_run.work_of_parts(FULL, Path()))


def add_program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)


SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING" > FOLDER/allocator
case "$2" in
memcheck) echo "========= ERROR SUMMARY: 0 errors"; exit 0 ;;
racecheck) echo "========= Race at kernel"; echo "========= RACECHECK SUMMARY: 1 hazard"; exit 9 ;;
synccheck) sleep 100 & echo $! > FOLDER/helper; wait ;;
*) exit 1 ;;
esac
"""


def test_verdicts_of_the_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_program(tmp_path, "compute-sanitizer", SANITIZER.replace("FOLDER", str(tmp_path)))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    started = time.monotonic()

    verdicts = dict(sanitizer.sanitize(tmp_path, 4, least=0.5))

    assert time.monotonic() - started < 4
    assert verdicts["memcheck"] == "exit 0: ERROR SUMMARY: 0 errors"
    assert "Race at kernel" in verdicts["racecheck"]
    assert verdicts["synccheck"].startswith("not finished in ")
    assert not is_alive(int((tmp_path / "helper").read_text()))
    assert [sanitizer.found_nothing(verdict) for verdict in verdicts.values()] == [True, False, True, False]
    assert (tmp_path / "allocator").read_text() == "1\n"
    assert set(dict(sanitizer.sanitize(tmp_path, 0.1, least=0.5)).values()) == {"not run: no time left"}


DRY_SANITIZER = """#!/bin/sh
tool=$2
shift 4
[ "$tool" = memcheck ] && { "$@" || exit 1; }
echo "========= ERROR SUMMARY: 0 errors"
"""
DRY_NVCC = """#!/bin/sh
for last; do :; done
[ "$last" = --version ] && exit
cp LIBRARY "$last"
echo "ptxas info    : Compiling entry function '_ZN3sws13finish_kernelEv' for 'sm_90'"
echo "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
echo "ptxas info    : Used 48 registers, used 1 barriers"
"""


def test_a_dry_run_of_the_script(tmp_path: Path) -> None:
    """The script on small sizes: calls of CUDA are answered on the CPU, and nvcc makes the kernels for it."""
    out, tools = tmp_path / "out", tmp_path / "tools"
    add_program(tools, "compute-sanitizer", DRY_SANITIZER)
    add_program(tools, "nvcc", DRY_NVCC.replace("LIBRARY", str(build_emulated_kernels())))
    environment = os.environ | {
        "OUT": str(out),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(Path(__file__).parent / "simulated_cuda"),
        "PATH": f"{tools}:{os.environ['PATH']}",
    }
    result = subprocess.run(
        [ROOT / "benchmarks" / "gpu" / "run.sh", "--small", "--build-folder", tmp_path / "build"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(file.name for file in out.iterdir()) == ["gpu.json", "log.txt", "machine.txt"]
    results = json.loads((out / "gpu.json").read_text())
    how = results["parts"]
    assert list(how) == [part.name for part in parts.PARTS]
    assert how.pop("engine") == "not run: tensorrt_rtx is not installed"
    assert all(line.startswith("done in") for line in how.values()), how
    assert results["device"] == "simulated GPU"
    assert "| finish_kernel | 48 | none |" in results["ptxas"]
    findings = results["transport_findings"] + results["guard_findings"]
    assert {finding["kernel"].partition(",")[0] for finding in findings} == {
        "banded_transport",
        "key_guard alpha_k",
        "key_guard a_v",
        "key_guard",
        "fused guard",
    }
    assert len(results["timings"]) == len(SMALL.sites)
    assert {model["model"] for model in results["summary"]["models"]} == {"SD1.5", "SDXL"}
    assert all(model["overhead_of_step"] is not None for model in results["summary"]["models"])
    assert set(results["sanitizer"].values()) == {"exit 0: ERROR SUMMARY: 0 errors"}
    assert "| model | added |" in (out / "log.txt").read_text()


@pytest.mark.parametrize(("model", "size"), [("SD1.5", 860), ("SDXL", 2567)])
def test_the_unets_are_those_of_the_models(model: str, size: int) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL.unets[model])
    assert round(sum(weight.numel() for weight in unet.parameters()) / 1e6) == size


def test_artefacts_of_the_example_are_compared_step_by_step(tmp_path: Path) -> None:
    options = ExportOptions(sws=ONE_SITE, sizes=SizeOptions(batch="2", tokens="8"), validate=False)
    export(ROOT / "examples" / "shapes", tmp_path / "a.onnx", options)

    assert compare_steps(tmp_path / "a.onnx", tmp_path / "a.onnx")["relative_errors"] == [0, 0, 0]


def test_an_engine_for_a_gpu_that_is_no_target_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "9.0" in str(check_example_engine(tmp_path))
