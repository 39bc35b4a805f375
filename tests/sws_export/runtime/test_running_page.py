"""The commands and code of docs/running.md run."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sws_export.cli import main

from sws_export import ExportOptions, SwsOptions, export
from sws_export.runtime import Session
from tests import export_runs
from tests.conftest import ShapesOnnx

PAGE = export_runs.ROOT / "docs" / "running.md"

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def blocks() -> list[str]:
    """The fenced blocks of the page."""
    return re.findall(r"^```\w+\n(.*?)\n```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def shell_commands() -> list[str]:
    """Commands of the page, each on one line."""
    starts = ("sws-export ", "SWS_MANIFEST=")
    texts = [block.replace("\\\n", "") for block in blocks() if block.startswith(starts)]
    return [line for text in texts for line in text.splitlines()]


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    metrics_graph: Path,
    random_unet: Path,
    pipeline: Path,
) -> Path:
    """A directory with the files that the commands of the page name."""
    directory = tmp_path_factory.mktemp("place")
    shutil.copy(metrics_graph, directory / "unet.onnx")
    shutil.copy(f"{metrics_graph}.json", directory / "unet.onnx.json")
    (directory / "MODEL").symlink_to(random_unet)
    (directory / "PIPELINE").symlink_to(pipeline)
    (directory / "examples").symlink_to(export_runs.ROOT / "examples")
    return directory


@pytest.fixture
def trained(place: Path, shapes_onnx: ShapesOnnx) -> None:
    """The graph that `make demo` writes."""
    (place / "out").mkdir(exist_ok=True)
    options = ExportOptions(sws=SwsOptions(guard="literal"), validate=False)
    export(shapes_onnx("fp32"), place / "out" / "engine.onnx", options)


def test_the_page_has_the_commands_that_are_tested() -> None:
    programs = [command.split()[:2] for command in shell_commands()]
    assert [words[1] for words in programs if words[0] == "sws-export"] == [
        *("sample", "sample", "report", "report", "triton", "triton")
    ]
    assert sum(command.startswith("SWS_MANIFEST=") for command in shell_commands()) == 1


def is_long(command: str) -> bool:
    """Whether a command runs whole sampling loops, or Polygraphy, as `test_polygraphy_data.py` does too."""
    return not command.startswith("sws-export triton")


@pytest.mark.parametrize("command", [command for command in shell_commands() if not is_long(command)])
def test_commands_run(place: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert main(shlex.split(command)[1:]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in shell_commands() if is_long(command)])
def test_long_commands_run(place: Path, trained: None, command: str) -> None:
    run_in(place, command)


def run_in(place: Path, command: str) -> None:
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=place,
        env=os.environ
        | {
            "PATH": f"{export_runs.COMMAND.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(export_runs.ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def python_block(start: str) -> str:
    """A block of the page for the CPU, without the lines that need an engine."""
    (block,) = [block for block in blocks() if block.startswith(start)]
    block = block.replace('provider="tensorrt-rtx"', 'provider="cpu"')
    return "\n".join(line for line in block.splitlines() if ".plan" not in line)


def test_the_session_of_the_page(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names: dict[str, Any] = {
        "schedule": [(900.0, 9.0), (300.0, 1.0)],
        "latent": np.ones((1, 4, 8, 6), np.float32),
        "text": np.ones((1, 5, 16), np.float32),
    }
    exec(compile(python_block("from sws_export.runtime import Session"), PAGE.name, "exec"), names)
    assert isinstance(names["session"], Session)
    assert np.isfinite(names["noise"]).all()
    assert not any(values.any() for values in names["session"].state().values())


def test_the_drop_in_of_the_page(
    place: Path, pipeline: Path, random_unet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline

    monkeypatch.chdir(place)
    pipe = DiffusionPipeline.from_pretrained(pipeline, unet=None, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    names: dict[str, Any] = {"pipe": pipe, "prompt": "a cat"}
    exec(compile(python_block("from sws_export.adapters.diffusers import"), PAGE.name, "exec"), names)
    assert pipe.unet is names["unet"]
    assert names["image"].size == (pipe.unet.config.sample_size * pipe.vae_scale_factor,) * 2


@pytest.mark.usefixtures("quick_trace")
def test_the_converters_of_the_page(
    random_unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's float16 converter and dynamic quantization of graphs without branches."""
    import onnx

    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(random_unet)
    (commands,) = [block for block in blocks() if block.startswith("# for the float16 converter")]
    for command in commands.splitlines()[1:]:
        options = ["--no-validate", "--sites", "mid_block.*.attn1"]
        assert main([*shlex.split(command)[1:], *options]) == 0
    exec(compile(python_block("import onnx"), PAGE.name, "exec"), {})
    random = np.random.default_rng(0)
    inputs = {
        "sample": random.standard_normal((2, 4, 8, 6), np.float32),
        "timestep": np.array([500.0, 400.0], np.float32),
        "encoder_hidden_states": random.standard_normal((2, 5, 16), np.float32),
        "sigma": np.array([5.0, 3.0], np.float32),
        "intensity": np.array([1.0, 0.5], np.float32),
    }
    for converted, original, operator, allowed in (
        ("half.onnx", "literal.onnx", "Cast", 1e-2),
        ("int8.onnx", "branchless.onnx", "MatMulInteger", 0.1),
    ):
        kinds = {node.op_type for node in onnx.load(converted).graph.node}
        assert operator in kinds
        assert "If" not in kinds
        sessions = [export_runs.Session(tmp_path / name) for name in (converted, original)]
        (found, state), (expected, wanted) = (list(session.run([inputs] * 3))[-1] for session in sessions)
        assert 0 < export_runs.difference(found, expected) < allowed
        for name, values in wanted.items():
            assert export_runs.difference(state[name], values) < allowed
