"""What an import loads. The import-linter contracts in pyproject.toml check who imports whom."""

import subprocess
import sys
from pathlib import Path

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


def test_every_module_imports_without_runtime_libraries() -> None:
    """As on a machine without the extras: engine libraries and ONNX Runtime cannot be imported."""
    files = [
        file.relative_to(ROOT)
        for name in ("graph_passes", "sws_export")
        for file in (ROOT / name).rglob("*.py")
    ]
    modules = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    assert len(modules) > 100
    run(
        "import importlib, sys\n"
        "for name in ('onnxruntime', 'tensorrt', 'tensorrt_rtx'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
    )
