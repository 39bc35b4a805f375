"""The library against TensorRT's plugin interfaces, call by call (see contract/)."""

from pathlib import Path

import pytest

from tests.plugins.toolchain import run

CHECKS = [
    "names",
    "defaults",
    "refusals",
    "serialization",
    "clones",
    "formats",
    "output_types",
    "output_shapes",
    "transport_shapes",
    "guard_shapes",
    "workspace",
    "failed_launches",
    "logger_layouts",
]


@pytest.mark.parametrize("check", CHECKS)
def test_contract(contract_program: Path, library: Path, check: str) -> None:
    run([str(contract_program), str(library), check])


@pytest.mark.parametrize("check", ["no_logger", "unknown_version"])
def test_without_a_known_logger_messages_go_to_stderr(
    contract_program: Path, library: Path, check: str
) -> None:
    output = run([str(contract_program), str(library), check])
    assert output.count("attribute 'radius': expected 1 to 8, found 9") == 1


@pytest.mark.skipif(
    Path("/dev/nvidiactl").exists(), reason="there is a GPU: the launch would run on null pointers"
)
def test_a_launch_without_a_driver_fails_with_a_reason(contract_program: Path, library: Path) -> None:
    run([str(contract_program), str(library), "missing_driver"])
