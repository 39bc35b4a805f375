"""TensorRT for RTX engines with and without SWS: layers, build time, plan and GPU memory; no GPU is needed.

    python benchmarks/rtx.py --work bench --out benchmarks/results/rtx.json
    python benchmarks/rtx.py --work bench --out benchmarks/results/rtx.json --only sdxl --forms plain sws
    python benchmarks/rtx.py --table benchmarks/results/rtx.json

Measured by the builder for compute capability 8.9, at static shapes and batch 2: number of layers after
parsing, seconds of the build, size of the plan, and the activation memory of the builder's own log. Modelled:
the time of a step on two GPUs (rtx_model.py). The checkpoints have random weights of full size; `--work`
needs 4 GB for SD1.5 and 11 GB for SDXL, and a build of SDXL needs 17 GB of memory. Each row is stored when
it is measured.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from rtx_model import GPUS, added_time, added_work, network_layers, network_work  # noqa: E402

_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Model:
    """A UNet and its static sizes.

    Attributes:
        title: In tables.
        family: `--family` of examples/make_checkpoint.py.
        side: Height and width of the latent.
    """

    title: str
    family: str
    side: int


MODELS = {"sd15": Model("SD1.5, 512²", "sd15", 64), "sdxl": Model("SDXL, 1024²", "sdxl", 128)}
FORMS = {"plain": None, "sws": "1", "sws-rows-1/8": "1/8", "sws-kl-rows-1/8": "kl:1/8"}
"""Query rows of the guard of each form, as for `--guard-rows`."""
GOALS = {"activations": 1.3, "layers": 1.6, "seconds": 1.5, "plan_bytes": 1.02}
STEP_GOALS = {"sws": 1.45, "sws-rows-1/8": 1.10}


def write_graphs(
    name: str, folder: Path, checkpoint: Path | None, forms: Sequence[str] = tuple(FORMS)
) -> dict[str, Path]:
    """The graphs of a model by form, all with the weights of the plain one; existing files are kept."""
    from step_cases import Model as StepModel
    from step_graphs import checkpoint_path

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
    paths = {
        form: folder / name / f"{form.replace('/', '-')}.onnx" for form in FORMS if form in ("plain", *forms)
    }
    if all(path.exists() for path in paths.values()):
        return paths
    (folder / name).mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        random = StepModel(model.family, "fp16", "fp16", "tensorrt-rtx", model.side)
        checkpoint = checkpoint_path(random, folder)
    exported: Any = export_plain(open_checkpoint(checkpoint), "fp16")
    sizes = {"batch": 2, "height": model.side, "width": model.side, "tokens": 77}
    plain = exported.clone()
    plain_passes(sizes)(plain)
    if not paths["plain"].exists():
        save_onnx(plain, paths["plain"], SilentProgress())
    for form, path in paths.items():
        rows = FORMS[form]
        if rows is None or path.exists():
            continue
        graph = exported.clone()
        guard, target = GuardOptions.parse("fused", rows), TARGETS["tensorrt-rtx"]
        rewrite(graph, SwsParameters(), (), guard, target, SilentProgress(), sizes=sizes)
        save_sharing_weights(graph, path, plain, paths["plain"], SilentProgress())
    return paths


def build(path: Path) -> dict[str, Any]:
    """Build an engine and return the figures of the builder; the plan is deleted."""
    import onnx

    from sws_export.engines.backend import BuildOptions
    from sws_export.engines.build import build_engine
    from sws_export.engines.tensorrt_rtx import BACKEND

    inputs = onnx.load(path, load_external_data=False).graph.input
    shapes = {
        value.name: (tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim),) * 3
        for value in inputs
    }
    options = BuildOptions(BACKEND, compute_capabilities=("8.9",))
    folder = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        report = build_engine(path, folder / "plan", [shapes], options)
    finally:
        shutil.rmtree(folder)
    assert report.gpu_memory is not None
    (profile,) = report.gpu_memory.profiles
    return {
        "seconds": report.build_seconds,
        "plan_bytes": report.size,
        "activations": profile.activations,
        "scratch": profile.scratch,
        "weights": report.gpu_memory.weights,
        "decomposed_attentions": report.decomposed_attentions,
        "peak_bytes": report.peak_memory,
        "library": report.library_version,
    }


def measure(
    name: str, arguments: argparse.Namespace, known: dict[str, Any]
) -> Iterable[tuple[str, dict[str, Any]]]:
    """All figures of each form of a model; without builds those of the builder are the `known` ones."""
    paths = write_graphs(name, arguments.work, arguments.checkpoint, arguments.forms)
    works = {form: network_work(path) for form, path in paths.items()}
    for form in arguments.forms:
        row: dict[str, Any] = dict(known.get(form, {})) if arguments.no_build else build(paths[form])
        row["layers"] = network_layers(paths[form])
        for key, kinds in (("modelled", ""), ("modelled_attention", "Attention")):
            plain, sws = (
                [work for work in works[which] if work.kind.startswith(kinds)] for which in ("plain", form)
            )
            row[key] = {
                gpu_name: added_time(plain, sws, gpu) / gpu.steps[name]
                for gpu_name, gpu in GPUS.items()
                if name in gpu.steps
            }
        if form != "plain":
            row["added"] = added_work(works["plain"], works[form])[:_ROWS]
        print(name, form, {key: value for key, value in row.items() if key != "added"}, flush=True)
        yield form, row


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| model, batch 2 | form | layers | build | plan | activations | modelled step | attention alone |",
        "|" + "---|" * 8,
    ]
    for name, rows in results.items():
        plain = rows["plain"]
        for form, row in rows.items():
            cells = [
                f"{row[key] / unit:.{digits}f}{text}"
                + ("" if row is plain else f" ({row[key] / plain[key]:.2f} ×)")
                if key in row
                else ""
                for key, unit, digits, text in (
                    ("layers", 1, 0, ""),
                    ("seconds", 1, 0, " s"),
                    ("plan_bytes", 1e6, 0, " MB"),
                    ("activations", 1e6, 1, " MB"),
                )
            ]
            cells += [
                ", ".join(f"{1 + share:.2f} × {gpu}" for gpu, share in row[key].items())
                for key in ("modelled", "modelled_attention")
            ]
            lines.append(f"| {MODELS[name].title} | {form} | {' | '.join(cells)} |")
    lines += [
        "",
        "| added by SWS, modelled | layers | GFLOP | MB | " + " | ".join(GPUS) + " |",
        "|" + "---|" * 6,
    ]
    for name, rows in results.items():
        for row in rows["sws"]["added"]:
            times = " | ".join(f"{1e3 * row[gpu]:.2f} ms" for gpu in GPUS)
            work = f"{row['count']} | {row['operations'] / 1e9:.1f} | {row['bytes'] / 1e6:.0f}"
            lines.append(f"| {MODELS[name].title}: {row['kind']} | {work} | {times} |")
    return "\n".join(lines)


def missed_goals(results: dict[str, Any]) -> list[str]:
    """The goals of issue 13 that the results miss, in words."""
    missed = []
    for name, rows in results.items():
        for form, row in rows.items():
            for key, goal in GOALS.items():
                ratio = row.get(key, 0) / rows["plain"].get(key, 1)
                if ratio > goal:
                    missed.append(f"{name}, {form}: {key} {ratio:.2f} × plain, goal {goal} ×")
            for gpu, share in row["modelled"].items():
                if 1 + share > STEP_GOALS.get(form, 2):
                    missed.append(
                        f"{name}, {form}: modelled step {1 + share:.2f} × on {gpu}, goal {STEP_GOALS[form]} ×"
                    )
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description="TensorRT for RTX engines with and without SWS.")
    parser.add_argument("--work", type=Path, help="directory for checkpoints and graphs, reused between runs")
    parser.add_argument("--out", type=Path, help="JSON file with the results; other rows in it are kept")
    parser.add_argument("--only", choices=MODELS, help="one model")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="some of the rows")
    parser.add_argument("--checkpoint", type=Path, help="use this checkpoint, with --only")
    parser.add_argument(
        "--no-build",
        action="store_true",
        help="only layers and modelled times; figures of builds in --out are kept",
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="print results as tables and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text("utf-8"))))
        return
    if arguments.work is None or arguments.out is None:
        parser.error("--work and --out are required")
    if arguments.checkpoint and not arguments.only:
        parser.error("--checkpoint needs --only")
    results = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    for name in [arguments.only] if arguments.only else MODELS:
        rows = results.setdefault(name, {})
        for form, row in measure(name, arguments, rows):
            rows[form] = row
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    for line in missed_goals(results):
        print("missed:", line)


if __name__ == "__main__":
    main()
