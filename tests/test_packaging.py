"""The wheel: its contents, and the installed command."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: object, **variables: str) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=os.environ | variables
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and nothing else."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=False)
    run(
        *(sys.executable, "-m", "pip", "--python", directory / "bin" / "python"),
        *("install", "--quiet", "--no-deps", "--no-index", wheel),
    )
    return directory


def test_the_wheel_is_for_every_machine(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


def test_its_top_level_names_are_two_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"sws_export", "graph_passes"}
    assert {"sws_export/cli.py", "sws_export/__init__.py", "graph_passes/__init__.py"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".so")]
    assert "sws_export/plugins/CMakeLists.txt" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_every_module_is_in_the_wheel(wheel: Path) -> None:
    tracked = run("git", "-C", ROOT, "ls-files", "--", "sws_export/**.py", "graph_passes/**.py").split()
    assert set(tracked) <= set(zipfile.ZipFile(wheel).namelist())


def test_the_command_runs_in_a_clean_environment(environment: Path) -> None:
    assert "usage: sws-export" in run(environment / "bin" / "sws-export", "--help")


def test_the_package_imports_without_its_dependencies(environment: Path) -> None:
    program = "import sws_export, sws_export.cli; print(sws_export.cli.__file__)"
    printed = run(environment / "bin" / "python", "-I", "-c", program)
    assert Path(printed.strip()).parent.name == "sws_export"
    assert environment in Path(printed.strip()).parents


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
def test_the_plugins_are_built_into_the_package(wheel: Path, tmp_path: Path) -> None:
    """With pip's own build isolation, which hides pip from the build."""
    venv.create(tmp_path / "environment", with_pip=True)
    python = tmp_path / "environment" / "bin" / "python"
    options = ("--quiet", "-C", "cmake.define.SWS_ARCHITECTURES=90")
    run(python, "-m", "pip", "install", *options, wheel.parent / "source", SWS_BUILD_PLUGINS="1")

    program = (
        "from sws_export.engines.plugin_library import plugin_info as i; "
        "print(i().architectures, i().is_current)"
    )
    assert run(python, "-I", "-c", program) == "('90',) True\n"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_lower_bounds_of_the_requirements(wheel: Path, tmp_path: Path) -> None:
    """The oldest versions that the package declares export the example, and its validation passes.

    It downloads several GB: PyPI has torch with CUDA libraries only.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    bounds = [*project["dependencies"], *extras["export"], *extras["cpu"]]
    oldest = [requirement.replace(">=", "==") for requirement in bounds]
    venv.create(tmp_path / "environment", with_pip=True)
    bin_ = tmp_path / "environment" / "bin"
    # A constraint of the machine's pip would choose newer versions.
    run(bin_ / "python", "-m", "pip", "install", "--quiet", wheel, *oldest, PIP_CONSTRAINT=os.devnull)

    out = tmp_path / "graph.onnx"
    run(bin_ / "sws-export", ROOT / "examples" / "shapes", "--out", out, SWS_EXPORT_CACHE_SIZE="0")
    manifest = json.loads(out.with_name("graph.onnx.json").read_text("utf-8"))
    assert manifest["validation"]["passed"]
    torch = next(requirement for requirement in oldest if requirement.startswith("torch=="))
    assert manifest["versions"]["torch"].startswith(torch.removeprefix("torch=="))
