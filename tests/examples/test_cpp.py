"""The C++ example: compiled against NVIDIA's headers, and run on a stand-in for TensorRT in host memory."""

import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sws_export.validation.trajectory import timestep_of
from tests.plugins.toolchain import (
    ROOT,
    STRICT_FLAGS,
    cuda_headers,
    require_compiler,
    run,
    tensorrt_headers,
)

SOURCE = ROOT / "examples" / "cpp" / "run_plan.cpp"
STAND_IN = Path(__file__).parent / "host_tensorrt"
STEPS = 5


def test_it_compiles_against_tensorrt(tmp_path: Path) -> None:
    headers = [str(tensorrt_headers()), str(cuda_headers())]
    includes = [argument for folder in headers for argument in ("-isystem", folder)]
    compiler = [require_compiler(), *STRICT_FLAGS, "-Wno-deprecated-declarations", *includes]
    run([*compiler, "-c", str(SOURCE), "-o", str(tmp_path / "run_plan.o")])
    assert (tmp_path / "run_plan.o").stat().st_size > 1000


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same source in host memory, under the sanitizers."""
    out = tmp_path_factory.mktemp("cpp") / "run_plan"
    sanitizers = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    # The stand-in's classes are freed by pointers of their own type; -Wconversion is for the example alone.
    command = [require_compiler(), "-std=c++17", "-Wall", "-Wextra", "-Werror", *sanitizers]
    run([*command, f"-I{STAND_IN}", str(SOURCE), "-o", str(out)])
    return out


def start(program: Path, folder: Path, plan: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    (folder / "engine.plan").write_text(plan)
    return subprocess.run([program, "engine.plan", *arguments], cwd=folder, capture_output=True, check=False)


@pytest.mark.parametrize("plan", ["fp32", "fp16"])
def test_states_alternate_and_are_fed_back(program: Path, tmp_path: Path, plan: str) -> None:
    text = np.arange(40, dtype=np.float32)
    text.tofile(tmp_path / "text.f32")
    done = start(program, tmp_path, plan, str(STEPS), "text.f32")
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stderr.decode().splitlines() if line.startswith("run ")]
    places = [(line[0], line[1]) for line in lines]
    assert places == [places[0] if step % 2 == 0 else places[0][::-1] for step in range(STEPS)]
    assert places[0][0] != places[0][1]

    state, sigma, timestep, intensity, last_text = np.array([line[2:] for line in lines], np.float64).T
    levels = np.geomspace(14, 0.3, STEPS + 1)
    np.testing.assert_allclose(sigma, levels[:-1], rtol=1e-6)
    # The state is zero at first, and each step adds its sigma to it.
    np.testing.assert_allclose(state, np.cumsum([0, *levels[:-2]]), rtol=1e-5)
    np.testing.assert_array_equal(timestep, np.ceil(timestep_of(levels[:-1])))
    assert set(intensity) == {0.5}
    # Whole, to the last number of the second sample.
    assert set(last_text) == {39.0}

    found = np.frombuffer(done.stdout, np.float32).reshape(2, 3, 4, 2)
    assert np.isfinite(found).all()
    # By Euler's method each number goes its own way: linear in where it started.
    slope, offset = 1.0, 0.0
    for level, following, known in zip(levels, levels[1:], state, strict=False):
        change = following - level
        slope, offset = (
            slope * (1 + 0.1 * change / math.hypot(level, 1)),
            offset * (1 + 0.1 * change / math.hypot(level, 1)) + change * known,
        )
    start_values = (found - offset) / slope
    # Standard normal noise of level 14.
    assert abs(start_values.std() - 14) < 5
    assert abs(start_values.mean()) < 8


@pytest.mark.parametrize(
    ("plan", "arguments", "code", "message"),
    [
        ("fp32", (), 2, "usage: run_plan ENGINE STEPS [TEXT] > latent.f32"),
        ("fp32", ("0",), 2, "usage: run_plan ENGINE STEPS [TEXT] > latent.f32"),
        (
            "damaged",
            ("2",),
            1,
            "run_plan: engine.plan is for another GPU or version of TensorRT; build it again",
        ),
        ("fp32", ("2", "missing"), 1, "run_plan: missing: cannot be read"),
        ("fp32", ("2", "engine.plan"), 1, "run_plan: 1 values in place of 40"),
    ],
)
def test_errors_are_one_line(
    program: Path, tmp_path: Path, plan: str, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = start(program, tmp_path, plan, *arguments)
    assert (done.returncode, done.stdout) == (code, b"")
    assert done.stderr.decode().splitlines() == [message]
