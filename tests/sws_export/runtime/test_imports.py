"""Imports and requirements of a machine that runs artefacts."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import pytest

from sws_export.extras import EXTRAS
from tests.export_runs import error_line

NOT_LOADED = {*EXTRAS["export"], *EXTRAS["sample"], *EXTRAS["gpu"], *EXTRAS["rtx"]}
BUDGET = 36
"""Modules of sws-export that an entry point may load, packages included."""

STEP = """
import sys
import numpy as np
from sws_export.runtime import Session

session = Session.load(sys.argv[1], threads=1)
print(session.step(
    np.zeros((1, 4, 8, 6), np.float32), 900, np.zeros((1, 5, 16), np.float32), sigma=9.0
).shape)
"""
LOADED = """
import sys
names = {name.partition(".")[0] for name in sys.modules}
own = [name for name in sys.modules if name.partition(".")[0] in ("sws_export", "graph_passes")]
print(len(own), *sorted(names))
"""


def run(python: Path | str, program: str, *arguments: object) -> str:
    done = subprocess.run(
        [python, "-c", program, *map(str, arguments)],
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "program",
    [
        "import sws_export.adapters.comfyui",
        "import sws_export.adapters.triton.model",
        "import sws_export.adapters.triton.repository",
        "import sws_export.adapters.polygraphy_data",
        "from sws_export.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
    ids=["comfyui", "triton-model", "triton-repository", "polygraphy", "help"],
)
def test_modules_of_an_import(program: str) -> None:
    check_loaded(run(sys.executable, program + LOADED))


def test_modules_of_a_step(sws_graph: Path) -> None:
    check_loaded(run(sys.executable, STEP + LOADED, sws_graph))


def check_loaded(printed: str) -> None:
    own, *names = printed.splitlines()[-1].split()
    assert NOT_LOADED.isdisjoint(names)
    assert int(own) <= BUDGET


def closure(requirements: list[str]) -> set[str]:
    """Names of the distributions that pip would install for `requirements`, without those of extras."""
    found: set[str] = set()
    waiting = [re.split(r"[^\w.-]", text)[0] for text in requirements if "extra ==" not in text]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            more = importlib.metadata.requires(name) or ()
            waiting += [re.split(r"[^\w.-]", text)[0] for text in more if "extra ==" not in text]
    return found


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel, its own requirements and ONNX Runtime, and nothing else.

    The requirements are links to the packages of this environment, which saves the installation.
    """
    folder = tmp_path_factory.mktemp("base")
    venv.create(folder / "environment", with_pip=False)
    python = folder / "environment" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install"]
    subprocess.run([*install, "--quiet", "--no-deps", "--no-index", wheel], check=True, timeout=300)
    (site,) = (folder / "environment" / "lib").glob("python3.*/site-packages")
    (metadata,) = site.glob("sws_export-*.dist-info")
    required = importlib.metadata.Distribution.at(metadata).requires or []
    for name in closure([*required, "onnxruntime"]):
        files = importlib.metadata.files(name) or ()
        for top in {Path(file).parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(importlib.metadata.distribution(name).locate_file(top))))
    return python


def test_the_base_installation_runs_a_graph(base: Path, sws_graph: Path) -> None:
    assert run(base, STEP, sws_graph) == "(1, 4, 8, 6)\n"
    assert run(base, "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('onnx'))") == (
        "None None\n"
    )
    run(base, "import sws_export.adapters.comfyui, sws_export.adapters.triton.model")


def test_verbs_of_the_base_installation(base: Path, sws_graph: Path, tmp_path: Path) -> None:
    command = base.with_name("sws-export")
    shown = subprocess.run(
        [command, "inspect", f"{sws_graph}.json", "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert json.loads(shown.stdout)["kind"] == "manifest"
    repository = ["--repository", tmp_path / "models", "--height", "8", "--width", "8"]
    subprocess.run([command, "triton", sws_graph, *repository], capture_output=True, check=True, cwd=tmp_path)
    assert (tmp_path / "models" / "sws" / "config.pbtxt").is_file()


@pytest.mark.parametrize("verb", ["inspect", "export", "validate", "report", "sample", "cache"])
def test_a_missing_extra_is_one_line(verb: str, base: Path, sws_graph: Path, tmp_path: Path) -> None:
    arguments = {
        "inspect": ["inspect", sws_graph],
        "export": [sws_graph, "--out", tmp_path / "out.onnx"],
        "validate": ["validate", sws_graph, sws_graph],
        "report": ["report", sws_graph, "--out", tmp_path / "out.html"],
        "sample": ["sample", sws_graph, tmp_path, "--prompt", "x", "--out", tmp_path / "out.png"],
        "cache": ["cache", "list"],
    }[verb]
    done = subprocess.run(
        [base.with_name("sws-export"), *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"the Python package \w+ is not installed; install it with: pip install 'sws-export\[export\]'",
        error_line(done.stderr),
    )
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_in_python(base: Path) -> None:
    program = """
import importlib
import sws_export
modules = ["adapters.diffusers", "sampling.sample", "report.report", "evaluation.evaluate"]
for use in [lambda: sws_export.export] + [
    lambda name=name: importlib.import_module("sws_export." + name) for name in modules
]:
    try:
        use()
    except sws_export.SwsExportError as error:
        print(error)
"""
    lines = run(base, program).splitlines()
    assert len(lines) == 5
    for line in lines:
        assert line.endswith(" is not installed; install it with: pip install 'sws-export[export]'")
