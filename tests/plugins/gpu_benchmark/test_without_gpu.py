"""As much of benchmarks/gpu as runs without a GPU: references, compilation, refusals, summaries."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.kernels import KernelError, Kernels, compile_kernels
from benchmarks.gpu.ptxas_report import as_table, parse_ptxas_log
from benchmarks.gpu.references import (
    dense_transport,
    literal_guard,
    make_guard_inputs,
    make_weights,
    plain_attention,
)
from benchmarks.gpu.sites import SITES
from benchmarks.gpu.summary import as_markdown, summarize
from tests.plugins.banded_transport import reference as transport_reference
from tests.plugins.key_guard.reference import GuardCase, bisection_step, value_mix
from tests.plugins.toolchain import BUILDS, ROOT


def test_dense_transport_is_the_literal_one() -> None:
    weights = make_weights(2, (5, 7), 4, "cpu")
    assert torch.equal(dense_transport(weights, 4), transport_reference.dense_transport(weights, 4))


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
    names = ("transport_two_launches", "dense_matmul", "copy_same_bytes", "guard_tight_budget", "guard_idle")
    return [
        dict.fromkeys(names, 50.0)
        | {"site": site.name, "attention": attention, "transport": transport, "guard": guard}
        | {"literal_guard": None}
        for site in SITES
    ]


def test_summary_adds_up_over_sites() -> None:
    summary = summarize(timings(100.0, 20.0, 80.0), {"SD1.5": 16_000.0, "SDXL": "no diffusers"}, 3e12, 6e14)

    sd15, sdxl = summary["models"]
    assert sd15["added_microseconds"] == 16 * 100
    assert sdxl["added_microseconds"] == 70 * 100
    assert sd15["overhead_of_step"] == pytest.approx(0.1)
    assert sdxl["overhead_of_step"] is None
    # Memory-bound at SD1.5 64 x 64: P once, keys and values in and out.
    moved = 2 * 4096 * (145 * 4 + 4 * 2 * 320)
    assert summary["sites"][0]["transport_fraction_of_bound"] == pytest.approx(moved / 3e12 * 1e6 / 20)
    assert list(summary["goals"].values()) == [True, False, True, None]


def test_tables_show_every_site_and_model() -> None:
    rows = timings(100.0, 20.0, 80.0)
    summary = summarize(rows, {"SD1.5": 16_000.0, "SDXL": "no diffusers"}, 3e12, 6e14)
    results = {"device": "X", "torch": "2", "cuda": "13", "timings": rows, "summary": summary}

    table = as_markdown(results)

    assert all(f"| {site.name} | 20.0 |" in table for site in SITES)
    assert "| SD1.5 | 1600 | 1600 | 16000 | 10.0 |" in table
    assert "| SDXL | 7000 | 7000 | no diffusers | - |" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_the_command_says_that_there_is_no_gpu() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "no GPU" in result.stderr
