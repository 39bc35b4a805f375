"""Draw pairs, measure them, and write the results."""

import contextlib
import dataclasses
import gc
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sws_export.errors import OptionError, OutputError
from sws_export.extras import missing_extras_as_errors
from sws_export.files import output_errors, publish_together, staged_directory
from sws_export.progress import Progress, SilentProgress
from sws_export.runtime.contract import Contract, read_contract

with missing_extras_as_errors():
    from sws_export.calibration.pipeline_class import pipeline_class
    from sws_export.evaluation.adherence import Scorer, check_clip, clip_scorer, pipeline_checker
    from sws_export.evaluation.measure import METRICS, PairMetrics, Summary, measure_pair, summarize
    from sws_export.evaluation.options import INTENSITIES, EvaluationOptions
    from sws_export.evaluation.page import Extreme, render
    from sws_export.evaluation.pairs import PairImages, PairStore, basis_of, check_walk, draw_pair
    from sws_export.evaluation.statistics import CONFIDENCE, RESAMPLES
    from sws_export.sampling.draw import attach_artefact, check_pixels, load_pipeline
    from sws_export.sampling.sample import is_plain_at_zero

DOCUMENT, PAGE, PAIRS = "evaluation.json", "evaluation.html", "pairs"

_SHOWN = 3


def evaluate(
    artefact: Path,
    pipeline: Path,
    out: Path,
    options: EvaluationOptions,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Summary]:
    """Draw every pair at all intensities, and write `evaluation.json` and `evaluation.html`.

    The images of each pair are kept in `pairs/`, so that a later run reads back the pairs that are
    finished. At any time one pair is in memory; CLIP is loaded after the pipeline was released.

    Args:
        artefact: Exported from the UNet of `pipeline`, with SWS.
        pipeline: A diffusers pipeline directory; its UNet is not loaded, and nothing is downloaded.
        out: Directory of the results; created if its parent exists.
        options: What to draw and measure.
        progress: Receives each image.

    Returns:
        The content of `evaluation.json`, and its figures.

    Raises:
        SwsExportError: A file is missing, the artefact does not fit the pipeline or has no SWS, or the
            results cannot be written.
        KeyboardInterrupt: With a message that states how much is finished.
    """
    progress = progress or SilentProgress()
    contract = read_contract(artefact, verify=True)
    if not contract.takes_intensity:
        raise OptionError(f"{artefact} was exported without SWS: there is nothing to evaluate")
    if options.clip is not None:
        check_clip(options.clip)
    pipeline_class(pipeline, trust_code=options.trust_code)
    store = PairStore(out / PAIRS, basis_of(contract, pipeline, options))
    with output_errors(out):
        out.mkdir(exist_ok=True)
    try:
        if not os.access(out, os.W_OK):
            raise OutputError(f"cannot write {out}: no permission; choose another --out")
        _draw_missing(artefact, pipeline, store, options, progress)
        gc.collect()
        return _evaluated(contract, pipeline, out, store, options, progress)
    except KeyboardInterrupt:
        finished = sum(map(store.has, options.pairs))
        raise KeyboardInterrupt(
            f"interrupted; {finished} of {len(options.pairs)} pairs are finished: the same command continues"
        ) from None
    finally:
        # Nothing is left of a run that drew nothing.
        with contextlib.suppress(OSError):
            out.rmdir()


def _evaluated(
    contract: Contract,
    pipeline: Path,
    out: Path,
    store: PairStore,
    options: EvaluationOptions,
    progress: Progress,
) -> tuple[dict[str, Any], Summary]:
    """Measure the pairs, which are all drawn, and write document and page."""
    checker = pipeline_checker(pipeline, trust_code=options.trust_code)
    scorers: dict[str, Scorer] = {} if checker is None else {"check": checker}
    if options.clip is not None:
        scorers["clip_score"] = clip_scorer(options.clip)
    measured = _measure(store, options, scorers, progress)
    with progress.stage("summarize"):
        summary = summarize(measured)
    document = _document(contract, pipeline, options, measured, summary)
    page = render(document, summary, _extremes(store, options, measured))
    with staged_directory(out / DOCUMENT) as scratch:
        (scratch / DOCUMENT).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", "utf-8")
        (scratch / PAGE).write_text(page, "utf-8")
        publish_together({scratch / name: out / name for name in (PAGE, DOCUMENT)})
    return document, summary


def _draw_missing(
    artefact: Path, pipeline: Path, store: PairStore, options: EvaluationOptions, progress: Progress
) -> None:
    """Draw the pairs that the store does not have."""
    pairs = options.pairs
    missing = [pair for pair in pairs if store.load(pair) is None]
    finished = len(pairs) - len(missing)
    if finished:
        progress.log(f"{finished} of {len(pairs)} pairs are read back from {PAIRS}")
    if not missing:
        return
    pipe = load_pipeline(pipeline, trust_code=options.trust_code)
    check_pixels(pipe, options.drawing)
    if options.frames > 1:
        check_walk(pipe)
    unet = attach_artefact(
        pipe,
        artefact,
        pipeline,
        progress,
        pad=options.pad,
        verify=False,
        engine_host_code_allowed=options.engine_host_code_allowed,
    )
    images = len(INTENSITIES) * options.frames
    with progress.stage("evaluate", total=len(pairs) * images) as stage:
        stage.advance(finished * images)
        for pair in missing:
            start = time.monotonic()
            store.save(pair, draw_pair(pipe, unet, pair, options, stage))
            finished += 1
            seconds = time.monotonic() - start
            progress.log(f"pair {finished} of {len(pairs)}, {seconds:.1f} s: {pair.prompt}, seed {pair.seed}")


def _measure(
    store: PairStore, options: EvaluationOptions, scorers: Mapping[str, Scorer], progress: Progress
) -> list[PairMetrics]:
    measured = []
    with progress.stage("measure", total=len(options.pairs)) as stage:
        for pair in options.pairs:
            stage.describe(pair.prompt)
            measured.append(measure_pair(_stored(store, pair), pair.prompt, scorers))
            stage.advance()
    return measured


def _stored(store: PairStore, pair: Any) -> PairImages:
    found = store.load(pair)
    if found is None:
        raise OutputError(
            f"the images of '{pair.prompt}', seed {pair.seed}, were removed while they were evaluated; run "
            "the command again"
        )
    return found


def _extremes(
    store: PairStore, options: EvaluationOptions, measured: list[PairMetrics]
) -> tuple[list[Extreme], list[Extreme]]:
    """The pairs whose images differ most from the plain ones at intensity 1, and the least."""
    moved = np.array([pair.values["difference"][-1] for pair in measured])
    order = np.argsort(-moved, kind="stable")
    # With few pairs none is in both lists.
    count = min(_SHOWN, max(1, len(order) // 2))

    def extreme(index: int) -> Extreme:
        pair = options.pairs[index]
        images = _stored(store, pair).images[:, 0]
        return Extreme(pair.prompt, pair.seed, float(moved[index]), images)

    most = [extreme(index) for index in order[:count]]
    return most, [extreme(index) for index in order[count:][-count:][::-1]]


def _document(
    contract: Contract,
    pipeline: Path,
    options: EvaluationOptions,
    measured: list[PairMetrics],
    summary: Summary,
) -> dict[str, Any]:
    """The content of `evaluation.json`."""
    manifest = contract.manifest
    return {
        "artefact": contract.path.name,
        "sha256": {file["name"]: file["sha256"] for file in manifest["files"]},
        "pipeline": pipeline.name,
        "preset": manifest["preset"],
        "precision": manifest["precision"],
        "sws": manifest["sws"],
        "plain_at_zero": is_plain_at_zero(contract),
        "steps": options.drawing.steps,
        "guidance": options.drawing.guidance,
        "prompts": list(options.prompts),
        "seeds": options.seeds,
        "frames": options.frames,
        "intensities": list(INTENSITIES),
        "pairs": len(measured),
        "interval": f"{CONFIDENCE:.0%}, bootstrap (BCa) over pairs, {RESAMPLES} resamples",
        "metrics": {
            name: dataclasses.asdict(METRICS[name]) | dataclasses.asdict(figures)
            for name, figures in summary.metrics.items()
        },
        "spectrum": [[dataclasses.asdict(figure) for figure in rings] for rings in summary.spectrum],
        "step_changes": [[dataclasses.asdict(figure) for figure in steps] for steps in summary.steps],
        "of_each_pair": [
            {"prompt": pair.prompt, "seed": pair.seed}
            | {
                name: [None if np.isnan(value) else float(value) for value in values]
                for name, values in found.values.items()
            }
            for pair, found in zip(options.pairs, measured, strict=True)
        ],
    }
