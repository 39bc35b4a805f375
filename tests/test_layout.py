"""Who may import whom, and what a bare import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "onnxruntime", "diffusers", "tensorrt", "tensorrt_rtx", "transformers", "polygraphy")
PASSES = sorted(ROOT.glob("graph_passes/**/*.py"))
LIBRARY = sorted(ROOT.glob("sws_export/**/*.py"))
# What the command line imports at its start, by way of `--help` and of refusing options.
CHEAP = (
    "sws_export",
    "sws_export.files",
    "sws_export.contract",
    "sws_export.engines",
    "sws_export.errors",
    "sws_export.parameters",
    "sws_export.profile",
    "sws_export.progress",
    "graph_passes.parameters",
)


def _label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(tree: ast.AST) -> set[str]:
    """Top-level names of everything imported below `tree`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else str(node.module).partition(".")[0])
    return names


def _modules() -> list[str]:
    """Every module of the library as an import statement names it."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in (*PASSES, *LIBRARY)]
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


def _run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_there_is_something_to_look_at() -> None:
    assert len(PASSES) > 10
    assert len(LIBRARY) > 20
    assert _imports(ast.parse("import a.b\nif x:\n    from c.d import e\nfrom . import f")) == {"a", "c", "."}


@pytest.mark.parametrize("path", PASSES, ids=_label)
def test_passes_import_onnx_ir_onnxscript_and_numpy_only(path: Path) -> None:
    allowed = {*sys.stdlib_module_names, "graph_passes", "onnx_ir", "onnxscript", "numpy"}
    assert _imports(ast.parse(path.read_text(encoding="utf-8"))) <= allowed


@pytest.mark.parametrize("path", LIBRARY, ids=_label)
def test_the_library_imports_neither_the_command_line_nor_tests_nor_siblings(path: Path) -> None:
    found = _imports(ast.parse(path.read_text(encoding="utf-8")))
    assert found.isdisjoint({"cli", "tests", "benchmarks", "examples", "plugins", "."})


@pytest.mark.parametrize("path", [*PASSES, *LIBRARY], ids=_label)
def test_a_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def test_a_bare_import_loads_nothing_heavy() -> None:
    modules = ", ".join(CHEAP)
    assert _run(f"import {modules}, sys; print(*sorted({{*{HEAVY}}} & sys.modules.keys()))") == ""


def test_every_module_imports_without_engines() -> None:
    """As on a machine without the extras: engine libraries and ONNX Runtime cannot be imported."""
    _run(
        "import importlib, sys\n"
        "for name in ('onnxruntime', 'tensorrt', 'tensorrt_rtx'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {_modules()!r}:\n"
        "    importlib.import_module(name)\n"
    )
