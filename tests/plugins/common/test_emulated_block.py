"""The emulated block reports errors that a GPU would not."""

import pytest

from tests.plugins.cases import Harness


def test_a_correct_program_passes(harness: Harness) -> None:
    harness.run({"operator": "emulator", "fault": "none"}, {})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("read_after_write", "read without a barrier after another thread's write"),
        ("write_after_read", "written without a barrier after another thread's read"),
        ("write_after_write", "two threads write without a barrier in between"),
        ("copy_in_flight", "a copy in flight is read"),
        ("copy_not_published", "read without a barrier after another thread's write"),
        ("beyond_the_array", "shared array of 32 elements: index 32"),
        ("misaligned_pair", "store_pair to a misaligned address"),
        ("beyond_shared_memory", "shared array ends beyond the 128 bytes asked for"),
    ],
)
def test_faults_are_found(harness: Harness, fault: str, message: str) -> None:
    assert message in harness.failure({"operator": "emulator", "fault": fault})
