"""Libraries that imports load. Import-linter (pyproject.toml) checks imports between modules."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "diffusers",
    "tensorrt",
    "tensorrt_rtx",
    "transformers",
    "polygraphy",
)
RUNTIME_LIBRARIES = ("onnxruntime", "tensorrt", "tensorrt_rtx")


def run(code: str) -> str:
    """Standard output of a Python program."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_and_help_load_no_heavy_library() -> None:
    printed = run(
        "import sys, sws_export\n"
        "from sws_export.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print('loaded:', *sorted({{*{HEAVY}}} & sys.modules.keys()))"
    )
    assert "examples:\n  sws-export unet.safetensors --out engine.plan" in printed
    assert printed.splitlines()[-1] == "loaded:"


def sources() -> list[Path]:
    return [file for name in ("graph_passes", "sws_export") for file in (ROOT / name).rglob("*.py")]


def test_runtime_libraries_are_imported_in_functions_only() -> None:
    """Every module imports on a machine without the extras for running."""
    found = []
    for file in sources():
        # Statements of the module itself, without those under `if TYPE_CHECKING`.
        for node in ast.parse(file.read_text("utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(file.name, name) for name in names if name.partition(".")[0] in RUNTIME_LIBRARIES]
    assert found == []


@pytest.mark.slow
def test_every_module_imports_without_runtime_libraries() -> None:
    files = [file.relative_to(ROOT) for file in sources()]
    modules = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    assert len(modules) > 100
    run(
        "import importlib, sys\n"
        f"for name in {RUNTIME_LIBRARIES!r}:\n"
        "    sys.modules[name] = None\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
    )
