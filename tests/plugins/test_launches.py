"""The host side of the launches on a simulated CUDA runtime (see launches/)."""

from pathlib import Path

import pytest

from tests.plugins.toolchain import build_launch_program, run


@pytest.fixture(scope="session")
def launch_program() -> Path:
    return build_launch_program()


@pytest.mark.parametrize(
    "check", ["limit_is_set_once", "threads_do_not_race", "errors_are_cleared", "tiling_follows_occupancy"]
)
def test_launches(launch_program: Path, check: str) -> None:
    run([str(launch_program), check])
