"""The effect of SWS at each step and site of a model, as one HTML page."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sws_export.errors import OptionError
from sws_export.extras import missing_extras_as_errors
from sws_export.files import publish, staged_directory
from sws_export.progress import Progress, SilentProgress
from sws_export.runtime.contract import Contract
from sws_export.runtime.session import RECOMMENDED_INTENSITY, Session

with missing_extras_as_errors():
    from sws_export.checkpoint.unet_io import size_multiple
    from sws_export.report.explanation import Explanation, Floats, StepMetrics
    from sws_export.report.page import render
    from sws_export.report.probe import Probe, Reference, method_of
    from sws_export.validation.trajectory import Trajectory

TOKENS = {"centre": (0.5, 0.5), "edge": (0.0, 0.5), "corner": (0.0, 0.0)}
"""Default positions of tokens whose transport is drawn: (down, right), as fractions of the image."""

_TEXT_TOKENS = 8
_GRIDS_PER_SIDE = 4
_LARGEST_SIDE = 32
# Every Stable Diffusion UNet halves the latent three times or fewer.
_MULTIPLE = 8


def write_report(
    artefact: Path | Session,
    model: Path | None,
    out: Path,
    *,
    steps: int = 12,
    intensity: float = RECOMMENDED_INTENSITY,
    encoder_hidden_states: Floats | None = None,
    height: int | None = None,
    width: int | None = None,
    tokens: Mapping[str, tuple[float, float]] = TOKENS,
    progress: Progress | None = None,
) -> Explanation:
    """Sample with the artefact, collect the metrics of every site, and write a page.

    The metrics are debug outputs of the artefact if it was exported with `--debug-outputs`, otherwise those
    of the eager reference for the same inputs.

    Args:
        artefact: `.onnx`, `.plan` or `.engine`, or a session that loaded it.
        model: The checkpoint that it was exported from, for the comparison with the reference; may be None if
            the artefact has debug outputs.
        out: The HTML file, which is self-contained.
        steps: Number of steps, from sigma 14 to 0.3.
        intensity: Strength of SWS.
        encoder_hidden_states: Text embeddings [1, L, X]; random if None.
        height: Height of the latent; None is the optimum of an engine's first profile, otherwise at most 32.
        width: Width of the latent, as `height`.
        tokens: Positions of the tokens whose transport is drawn, by their labels.
        progress: Receives the steps.

    Raises:
        SwsExportError: A file cannot be read or written, the artefact was exported from another checkpoint,
            or a value is out of range.
    """
    if steps < 2:
        raise OptionError(f"steps {steps} is out of range; at least 2 are needed")
    if not 0 < intensity <= 1:
        raise OptionError(f"intensity {intensity:g} is out of range; allowed is above 0 to 1")
    for down, right in tokens.values():
        if not (0 <= down <= 1 and 0 <= right <= 1):
            raise OptionError(f"token {down:g},{right:g} is out of range; both are 0 to 1")
    progress = progress or SilentProgress()
    session = artefact if isinstance(artefact, Session) else Session.load(artefact)
    contract = session.contract
    method_of(contract)
    if model is None and not contract.metrics:
        raise OptionError(
            f"{contract.path} has no site metrics among its outputs: give the checkpoint that it was "
            "exported from, or export it again with --debug-outputs"
        )
    reference = Reference(model, contract, intensity, progress) if model is not None else None
    sizes = _sizes(contract, height, width, encoder_hidden_states)
    measured = _sample(session, reference, sizes, steps, intensity, encoder_hidden_states, progress)
    explanation = Explanation(
        manifest=contract.manifest,
        artefact=contract.path.name,
        intensity=intensity,
        sizes=sizes,
        text="random text embeddings" if encoder_hidden_states is None else "given text embeddings",
        metrics_source="artefact" if contract.metrics else "reference",
        tokens=tokens,
        steps=measured,
    )
    with staged_directory(out) as scratch:
        page = scratch / out.name
        page.write_text(render(explanation), "utf-8")
        publish(page, out)
    return explanation


def _sizes(contract: Contract, height: int | None, width: int | None, text: Floats | None) -> dict[str, int]:
    """The sizes to sample at: static ones, then those of the arguments, then defaults."""
    return _dynamic_sizes(contract, height, width, text) | contract.static_sizes


def _dynamic_sizes(
    contract: Contract, height: int | None, width: int | None, text: Floats | None
) -> dict[str, int]:
    tokens = _TEXT_TOKENS if text is None else text.shape[1]
    if contract.profiles:
        _, best, _ = contract.profiles[0]["sample"]
        low, _, high = contract.profiles[0]["encoder_hidden_states"]
        tokens = int(np.clip(tokens, low[1], high[1])) if text is None else tokens
        return {"batch": 1, "height": height or best[2], "width": width or best[3], "tokens": tokens}
    config = contract.manifest["source"].get("config")
    multiple = size_multiple(config) if config else _MULTIPLE
    trained = (config or {}).get("sample_size")
    side = min(trained if isinstance(trained, int) else _LARGEST_SIDE, _LARGEST_SIDE)
    side = max(_GRIDS_PER_SIDE * multiple, side // multiple * multiple)
    return {"batch": 1, "height": height or side, "width": width or side, "tokens": tokens}


def _sample(
    session: Session,
    reference: Reference | None,
    sizes: Mapping[str, int],
    steps: int,
    intensity: float,
    text: Floats | None,
    progress: Progress,
) -> tuple[StepMetrics, ...]:
    specs = [spec for spec in session.contract.inputs if spec.name not in ("sigma", "intensity")]
    trajectory = Trajectory(specs, sizes, steps)
    probe = Probe(session, reference, intensity)
    measured = []
    with progress.stage("report", total=steps) as stage:
        for step in trajectory.steps():
            inputs = trajectory.inputs(step)
            if text is not None:
                inputs["encoder_hidden_states"] = np.asarray(text)
            found, prediction = probe.measure(step, inputs)
            measured.append(found)
            trajectory.advance(step, prediction)
            stage.advance()
    return tuple(measured)
