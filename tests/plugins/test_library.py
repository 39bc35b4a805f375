"""What is inside the shared library: symbols, machine code, registers."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu.ptxas_report import parse_ptxas_log
from sws_export.engines.plugin_library import DEFAULT_ARCHITECTURES, plugin_info, source_hash
from tests.plugins.toolchain import PLUGINS, build_library, cuobjdump, run

KERNELS = {
    "transport_tensor_core_kernel": 4,
    "transport_scalar_kernel": 3,
    "survey_tensor_core_kernel": 2,
    "survey_scalar_kernel": 3,
    "middle_tensor_core_kernel": 2,
    "middle_scalar_kernel": 3,
    "candidate_tensor_core_kernel": 2,
    "search_scalar_kernel": 3,
    "finish_kernel": 1,
}


def symbols(library: Path, which: str) -> list[str]:
    lines = run(["nm", "--dynamic", which, str(library)]).splitlines()
    return [line.split()[-1] for line in lines]


def architectures_in(library: Path, listing: str) -> list[str]:
    output = cuobjdump(listing, str(library))
    return sorted(set(re.findall(r"sm_(\d+[af]?)", output)), key=int)


def test_exactly_three_symbols_are_shown(library: Path) -> None:
    assert sorted(symbols(library, "--defined-only")) == [
        "getCreators",
        "setLoggerFinder",
        "sws_plugins_build_info",
    ]


def test_no_tensorrt_symbol_is_needed(library: Path) -> None:
    undefined = symbols(library, "--undefined-only")
    assert len(undefined) > 10
    forbidden = re.compile(r"nvinfer|InferBuilder|InferRuntime|PluginRegistry|getLogger|cuda|_cu[A-Z]")
    assert [name for name in undefined if forbidden.search(name)] == []


def test_only_system_libraries_are_needed(library: Path) -> None:
    needed = re.findall(r"NEEDED.*\[(.*?)\]", run(["readelf", "--dynamic", str(library)]))
    allowed = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
    assert set(needed) <= allowed | {"libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-aarch64.so.1"}


def test_machine_code_and_ptx_of_the_architecture_asked_for(library: Path) -> None:
    assert architectures_in(library, "--list-elf") == ["90"]
    assert architectures_in(library, "--list-ptx") == ["90"]


def test_tensor_cores_and_asynchronous_copies_are_used(library: Path) -> None:
    code = cuobjdump("--dump-sass", str(library))
    for instruction in (
        "HMMA.16816.F32 ",
        "HMMA.16816.F32.BF16",
        "LDSM.16.M88.4",
        "LDSM.16.MT88.4",
        "LDGSTS",
    ):
        assert instruction in code
    # Local memory would mean a register array indexed at run time.
    assert re.findall(r"\b(?:LDL|STL)\b", code) == []


def test_two_16_bit_results_are_stored_at_once(library: Path) -> None:
    """A store of less than 32 bits would mean that the compiler splits the pairs."""
    functions = cuobjdump("--dump-sass", str(library)).split("Function : ")
    kernels = [text for text in functions if "transport_tensor_core_kernel" in text.partition("\n")[0]]
    assert len(kernels) == KERNELS["transport_tensor_core_kernel"]
    for kernel in kernels:
        stores = re.findall(r"\bSTG\.E(\S*)", kernel)
        assert stores
        assert set(stores) == {""}


def test_no_kernel_spills(library: Path) -> None:
    usages = parse_ptxas_log((library.parent / "build.log").read_text())
    assert len(usages) == sum(KERNELS.values())
    for usage in usages:
        assert (usage.stack, usage.spill_stores, usage.spill_loads) == (0, 0, 0), usage


def test_build_log_has_no_warning(library: Path) -> None:
    log = (library.parent / "build.log").read_text()
    assert [line for line in log.splitlines() if re.search(r"\bwarning\b", line, re.IGNORECASE)] == []


def test_info_matches_the_sources(library: Path) -> None:
    info = plugin_info(library)
    assert info.operators == ("BandedTransport", "KeyGuard")
    assert info.namespaces == ("sws", "")
    assert info.architectures == ("90",)
    assert info.source_hash == source_hash(PLUGINS)
    assert info.is_current is True


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_architectures() -> None:
    library = build_library(DEFAULT_ARCHITECTURES)

    assert architectures_in(library, "--list-elf") == list(DEFAULT_ARCHITECTURES)
    assert architectures_in(library, "--list-ptx") == ["90", DEFAULT_ARCHITECTURES[-1]]
    usages = parse_ptxas_log((library.parent / "build.log").read_text())
    assert len(usages) == len(DEFAULT_ARCHITECTURES) * sum(KERNELS.values())
    assert [usage for usage in usages if usage.spill_stores or usage.spill_loads or usage.stack] == []


def test_loading_needs_no_gpu(library: Path) -> None:
    program = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).sws_plugins_build_info()"
    result = subprocess.run(["python3", "-c", program, str(library)], capture_output=True, check=False)
    assert result.returncode == 0
