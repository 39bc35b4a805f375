"""The GPU memory of an engine, from the builder's log."""

import dataclasses
import json

from sws_export.engines.gpu_memory import GpuMemory, ProfileMemory, add_states, read_builder_memory

# As TensorRT for RTX 1.7.1 logs them for an engine with two profiles.
LOG = """\
Constructing optimization profile number 0 [1/2].
Layer: {ForeignNode[a]} Host Persistent: 80 bytes Device Persistent: 0 bytes Scratch Memory: 15825920 bytes
Total Host Persistent Memory: 80 bytes
Total Device Persistent Memory: 512 bytes
Max Scratch Memory: 15825920 bytes
Total Activation Memory: 15831040 bytes
Constructing optimization profile number 1 [2/2].
Total Device Persistent Memory: 0 bytes
Max Scratch Memory: 102185984 bytes
Total Activation Memory: 102191104 bytes
Total Weights Memory: 12606336 bytes
""".splitlines()
MEMORY = GpuMemory(12606336, (ProfileMemory(15831552, 15825920), ProfileMemory(102191104, 102185984)))


def test_memory_of_each_profile() -> None:
    assert read_builder_memory(LOG, profiles=2) == MEMORY


def test_the_largest_part_of_a_graph_counts() -> None:
    parts = [*LOG[:6], "Total Activation Memory: 7 bytes", *LOG[6:]]
    assert read_builder_memory(parts, profiles=2) == MEMORY


def test_a_log_without_a_figure() -> None:
    assert read_builder_memory(LOG[:-1], profiles=2) is None
    assert read_builder_memory(LOG, profiles=3) is None


def test_states_have_two_float32_buffers_at_the_largest_shapes() -> None:
    small, large = (1, 145, 8, 8), (2, 145, 8, 8)
    profiles = [{"sample": (small, small, small), "state": (small, large, large)}]
    found = add_states(dataclasses.replace(MEMORY, profiles=MEMORY.profiles[:1]), profiles, ["state"])
    assert found.profiles[0].states == 2 * 4 * 2 * 145 * 64
    assert found.total(0) == 12606336 + 15831552 + found.profiles[0].states


def test_needs_in_words() -> None:
    memory = GpuMemory(1_720_000_000, (ProfileMemory(5, 5), ProfileMemory(2_280_000_000, 5, 25_000_000)))
    assert memory.largest == 1
    assert memory.describe(1) == (
        "needs 4.03 GB of GPU memory: weights 1.72 GB, activations 2.28 GB, states 25.00 MB"
    )


def test_json_is_read_back() -> None:
    assert GpuMemory.from_json(json.loads(json.dumps(dataclasses.asdict(MEMORY)))) == MEMORY
