"""The graphs of benchmarks/step.py; all forms of a model share one file of weights."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from step_cases import FORMS, MODELS, Model

ROOT = Path(__file__).resolve().parent.parent
_SDXL_FORMS = ("plain", "sws", "sws-rows-1/8")


def checkpoint_path(model: Model, folder: Path) -> Path:
    """Path of the checkpoint; creates it if it is missing."""
    if model.family is None:
        return ROOT / "examples" / "shapes" / "unet"
    path = folder / f"{model.family}-{model.dtype}"
    if not path.exists():
        command = [sys.executable, str(ROOT / "examples" / "make_checkpoint.py"), "--family", model.family]
        staged = path.with_name(f".{path.name}")
        subprocess.run(
            [*command, "--dtype", model.dtype, "--out", str(staged)], check=True, stdout=sys.stderr, cwd=ROOT
        )
        staged.rename(path)
    return path


def graph_path(folder: Path, model: str, form: str) -> Path:
    """Path of a graph."""
    return folder / model / f"{form.replace('/', '-')}.onnx"


def write_graphs(name: str, folder: Path, forms: list[str]) -> None:
    """Write the missing forms of a model, the plain one first."""
    from graph_passes.guard import GuardOptions
    from graph_passes.parameters import SwsParameters
    from graph_passes.pipeline import plain_passes
    from graph_passes.target import TARGETS
    from sws_export.checkpoint import open_checkpoint
    from sws_export.onnx_files import save_onnx, save_sharing_weights
    from sws_export.pipeline.rewrite import rewrite
    from sws_export.progress import SilentProgress
    from sws_export.tracing.export_unet import export_plain

    model = MODELS[name]
    (folder / name).mkdir(parents=True, exist_ok=True)
    exported: Any = export_plain(open_checkpoint(checkpoint_path(model, folder)), model.precision)
    scale_logits(exported, model.logits)
    sizes = {"height": model.side, "width": model.side, "tokens": 77}
    plain = exported.clone()
    plain_passes(sizes)(plain)
    plain_path = graph_path(folder, name, "plain")
    if not plain_path.exists():
        save_onnx(plain, plain_path, SilentProgress())
    for form in forms:
        path, made = graph_path(folder, name, form), FORMS[form]
        if path.exists() or made.guard is None:
            continue
        graph = exported.clone()
        parameters, guard = SwsParameters(**made.parameters), GuardOptions(made.guard, made.rows)
        rewrite(graph, parameters, (), guard, TARGETS[model.target], SilentProgress(), sizes=sizes)
        save_sharing_weights(graph, path, plain, plain_path, SilentProgress())


def scale_logits(model: Any, factor: float) -> None:
    """Multiply the logits of all attention nodes by `factor`."""
    import onnx_ir as ir

    for node in model.graph:
        if node.op_type == "Attention":
            scale = node.attributes.get_float("scale") or node.inputs[0].shape[3] ** -0.5
            node.attributes["scale"] = ir.AttrFloat32("scale", factor * scale)


def describe_graph(path: Path) -> dict[str, int]:
    """Number of nodes (bodies of `If` included) and initializers, and bytes of the initializers."""
    import onnx_ir as ir

    graph = ir.load(path).graph
    sizes = [value.const_value.nbytes for value in graph.initializers.values() if value.const_value]
    return {
        "nodes": sum(1 for _ in graph.all_nodes()),
        "initializers": len(graph.initializers),
        "initializer_bytes": sum(sizes),
    }
