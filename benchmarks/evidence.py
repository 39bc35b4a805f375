"""Which ingredient of SWS does what, on the trained examples: ablations with the same prompts and noise.

    python -m benchmarks.evidence
    python -m benchmarks.evidence --examples examples/shapes --pairs 24

Each variant is an export of an example's UNet, run in ONNX Runtime in batches of images. Finished variants
are kept in `--scratch`, so that the command continues where it was interrupted. It writes
`benchmarks/results/evidence.json`, and the table and figure of `docs/evidence.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.export import RESULTS, machine, versions
from sws_export import ExportOptions, SizeOptions, SwsOptions, SwsParameters, export
from sws_export.calibration.pipeline_class import import_code
from sws_export.evaluation.adherence import pipeline_checker
from sws_export.evaluation.measure import METRICS, measure_pair, summarize_metric
from sws_export.evaluation.page import number, percent
from sws_export.evaluation.pairs import PairImages, walk
from sws_export.evaluation.statistics import Figure
from sws_export.files import file_digest, publish, staged_directory
from sws_export.progress import SilentProgress
from sws_export.sampling.draw import attach_artefact, load_pipeline
from sws_export.sampling.predicted_image import recorded_steps

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = tuple(ROOT / "examples" / name for name in ("shapes", "textures"))
PAGE, FIGURE = ROOT / "docs" / "evidence.md", ROOT / "docs" / "images" / "evidence.png"
START, END = "<!-- ablations: written by benchmarks/evidence.py -->\n", "<!-- end of ablations -->\n"

BATCH = 32
"""Images of a batch; twice as many samples with guidance."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is exported, and how strong SWS is."""

    name: str
    sws: SwsOptions = dataclasses.field(default_factory=SwsOptions)
    intensity: float = 1.0


def parameters(**changes: Any) -> SwsOptions:
    return SwsOptions(parameters=SwsParameters(**changes))


PLAIN = Variant("plain", intensity=0.0)
VARIANTS = (
    Variant("SWS 0.5", intensity=0.5),
    Variant("SWS 1"),
    *(Variant(f"scale {scale} only", parameters(scales=(scale,) * 3)) for scale in (2, 4, 8)),
    Variant("no EMA (beta=0)", parameters(beta=0.0)),
    Variant("no budget (kl_floor=100)", parameters(kl_floor=100.0)),
    Variant("no late anneal (u_stop=1)", parameters(u_stop=1.0)),
    Variant("keys only (value_cap=0)", parameters(value_cap=0.0)),
    Variant("values only (key_cap=0)", parameters(key_cap=0.0)),
    Variant("query temperature only (key_cap=0, value_cap=0)", parameters(key_cap=0.0, value_cap=0.0)),
    Variant("no query temperature (theta=0)", parameters(theta=0.0)),
    Variant("cross-attention", SwsOptions(sites=("*.attn2",))),
    Variant("comfyui-node", SwsOptions(preset="comfyui-node")),
)
SHOWN = (
    "laplacian_variance",
    "gradient_energy",
    "structure",
    "difference",
    "step_change",
    "flicker",
    "check",
)


def main() -> None:
    arguments = parse_arguments()
    out = arguments.out
    report = json.loads(out.read_text()) if out.exists() else {"examples": {}}
    for folder in arguments.examples:
        if not list((folder / "unet").glob("*.safetensors")):
            print(f"{folder}: no weights in unet/, left out", flush=True)
            continue
        report["examples"][folder.name] = run_example(folder.resolve(), arguments)
        report |= {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(sys.executable),
        }
        out.write_text(json.dumps(report, indent=1) + "\n")
    write_page(report, arguments.page)
    draw_figure(report, arguments.figure)
    print(f"wrote {out}, {arguments.page} and {arguments.figure}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=Path, nargs="+", default=EXAMPLES, help="default: both")
    parser.add_argument("--pairs", type=int, default=16, help="random prompts, each with its own noise")
    parser.add_argument("--frames", type=int, default=2, help="frames of the walk; default: %(default)s")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--scratch", type=Path, default=ROOT / "out" / "evidence")
    parser.add_argument("--out", type=Path, default=RESULTS / "evidence.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    return parser.parse_args()


def run_example(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of all variants of one example."""
    check = import_code(folder, "check.py")
    prompts = [check.prompts.describe(scene) for scene in check.random_scenes(arguments.pairs, 0)]
    checker = pipeline_checker(folder, trust_code=True)
    assert checker is not None
    plain = images_of(PLAIN, folder, prompts, arguments)
    rows: dict[str, dict[str, Any]] = {"plain": {}}
    for variant in VARIANTS:
        found = images_of(variant, folder, prompts, arguments)
        # Each pair as the two intensities of an evaluation: plain, and this variant.
        measured = [
            measure_pair(
                PairImages(*(np.stack(both) for both in zip(one, other, strict=True))),
                prompt,
                {"check": checker},
            )
            for prompt, one, other in zip(prompts, plain, found, strict=True)
        ]
        rows[variant.name] = {}
        for name in SHOWN:
            summary = summarize_metric(
                np.stack([pair.values[name] for pair in measured]), METRICS[name].comparison
            )
            figure = (summary.changes or summary.values)[1]
            rows[variant.name][name] = dataclasses.asdict(figure)
            rows["plain"][name] = dataclasses.asdict(summary.values[0])
    settings = {name: getattr(arguments, name) for name in ("pairs", "frames", "steps", "guidance")}
    return settings | {"variants": rows}


Drawn = list[tuple[np.ndarray, np.ndarray]]


def images_of(variant: Variant, folder: Path, prompts: list[str], arguments: argparse.Namespace) -> Drawn:
    """Images [frames, H, W, C] and changes of the predicted image [steps - 1] of each prompt."""
    weights = [file_digest(file).sha256 for file in sorted((folder / "unet").glob("*.safetensors"))]
    basis = [prompts, weights, arguments.frames, arguments.steps, arguments.guidance]
    key = hashlib.sha256(json.dumps([basis, repr(variant)]).encode()).hexdigest()[:16]
    scratch = arguments.scratch / folder.name
    scratch.mkdir(parents=True, exist_ok=True)
    kept = scratch / f"{key}.npz"
    if not kept.exists():
        start = time.monotonic()
        graph = exported(variant, folder, scratch, weights)
        images, changes = draw_all(graph, folder, prompts, variant.intensity, arguments)
        with staged_directory(kept) as staging:
            np.savez_compressed(staging / kept.name, images=images, changes=changes)
            publish(staging / kept.name, kept)
        print(f"{folder.name}: {variant.name}, {time.monotonic() - start:.0f} s", flush=True)
    with np.load(kept) as stored:
        return list(zip(stored["images"], stored["changes"], strict=True))


def exported(variant: Variant, folder: Path, scratch: Path, weights: list[str]) -> Path:
    """The graph of a variant for the training size, made once."""
    key = hashlib.sha256(json.dumps([weights, repr(variant.sws)]).encode()).hexdigest()[:16]
    graph = scratch / f"{key}.onnx"
    if not graph.exists():
        config = json.loads((folder / "unet" / "config.json").read_text())
        side = str(config["sample_size"])
        sizes = SizeOptions(height=side, width=side, vae_scale=1)
        export(
            folder / "unet", graph, ExportOptions(sws=variant.sws, sizes=sizes, validate=False, cache=False)
        )
    return graph


def draw_all(
    graph: Path, folder: Path, prompts: list[str], intensity: float, arguments: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [prompts, frames, H, W, C], changes float32 [prompts, steps - 1]."""
    import torch

    pipe = load_pipeline(folder, trust_code=True)
    unet = attach_artefact(pipe, graph, folder, SilentProgress(), verify=False)
    config = unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    noises = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(len(prompts))
    ]
    # A state that the batch shares would mix the images.
    batch = BATCH if unet.session.contract.resets_per_image else 1
    jobs = [(seed, frame) for seed in range(len(prompts)) for frame in range(arguments.frames)]
    parts, changes = [], []
    for start in range(0, len(jobs), batch):
        some = jobs[start : start + batch]
        unet.reset()
        with recorded_steps(pipe.scheduler) as record:
            images = pipe(
                [prompts[seed] for seed, _ in some],
                num_inference_steps=arguments.steps,
                guidance_scale=arguments.guidance,
                latents=torch.cat([walk(noises[seed], seed, frame) for seed, frame in some]),
                cross_attention_kwargs={"intensity": intensity},
                output_type="np",
            ).images
        parts.append(np.clip(images * 255, 0, 255).round().astype(np.uint8))
        changes.append(np.stack(record.changes, axis=1))
    by_pair = (len(prompts), arguments.frames)
    drawn, moved = np.concatenate(parts), np.concatenate(changes)
    return drawn.reshape(*by_pair, *drawn.shape[1:]), moved.reshape(*by_pair, -1)[:, 0]


def write_page(report: dict[str, Any], page: Path) -> None:
    """Replace the section between the marks with the tables."""
    text = page.read_text("utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    page.write_text(f"{before}{START}\n{tables(report)}\n{END}{after}", "utf-8")


def tables(report: dict[str, Any]) -> str:
    """One table for each example, in Markdown."""
    head = [
        "variant",
        "Laplacian",
        "gradient",
        "structure",
        "difference",
        "step-to-step",
        "flicker",
        "check.py",
    ]
    parts = []
    for name, example in report["examples"].items():
        lines = [
            f"**{name}**: {example['pairs']} pairs, {example['frames']} frames, {example['steps']} steps, "
            f"guidance {example['guidance']:g}.\n",
            f"| {' | '.join(head)} |",
            "|---" * len(head) + "|",
        ]
        for variant, figures in example["variants"].items():
            cells = [cell(variant, metric, Figure(**figures[metric])) for metric in SHOWN]
            lines.append(f"| {' | '.join([variant, *cells])} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def cell(variant: str, metric: str, figure: Figure) -> str:
    """A figure in the table; bold where its interval has no 0."""
    relative = METRICS[metric].comparison == "relative" and variant != "plain"
    text = percent(figure) if relative else number(figure)
    changed = METRICS[metric].comparison != "none" and variant != "plain" and figure.is_nonzero
    return f"**{text}**" if changed else text


def draw_figure(report: dict[str, Any], file: Path) -> None:
    """Changes of all variants with their intervals, a column for each metric."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    metrics = ("laplacian_variance", "gradient_energy", "step_change", "flicker")
    names = [variant.name for variant in VARIANTS]
    plot, axes = pyplot.subplots(1, len(metrics), figsize=(12.5, 4.6), sharey=True)
    colours = ("#4a1840", "#c95c3e")
    for axis, metric in zip(axes, metrics, strict=True):
        for offset, (colour, (example, results)) in enumerate(
            zip(colours, report["examples"].items(), strict=False)
        ):
            figures = [Figure(**results["variants"][name][metric]) for name in names]
            values = np.array([[f.value, f.low, f.high] for f in figures], np.float64) * 100
            places = np.arange(len(names)) + 0.18 * (2 * offset - 1)
            errors = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
            axis.errorbar(values[:, 0], places, xerr=errors, fmt="o", ms=4, color=colour, label=example)
        axis.axvline(0, color="#999", lw=0.8)
        title = METRICS[metric].title.removeprefix("Sharpness: ")
        axis.set_title(title[0].upper() + title[1:], fontsize=10)
        axis.set_xlabel("change, %")
        axis.grid(axis="x", color="#eee")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    plot.legend(*axes[0].get_legend_handles_labels(), loc="lower left", fontsize=8)
    plot.tight_layout()
    with staged_directory(file) as scratch:
        plot.savefig(scratch / file.name, dpi=110)
        publish(scratch / file.name, file)


if __name__ == "__main__":
    main()
