"""What SWS does in a model, step by step and site by site, as one HTML page."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sws_export.artefact import publish, staged_directory
from sws_export.contract import size_multiple
from sws_export.errors import OptionError, ValidationError
from sws_export.parameters import SwsParameters
from sws_export.progress import Progress, Silent
from sws_export.runtime.session import RECOMMENDED_INTENSITY, Session
from sws_export.validation.trajectory import Trajectory, TrajectoryStep

Floats = npt.NDArray[np.floating[Any]]

_TOKENS = 8
_GRIDS_PER_SIDE = 4


@dataclasses.dataclass(frozen=True)
class SiteFigures:
    """One site at one step; entropies and KL divergence in nats.

    Attributes:
        alpha_k: Share of the transported keys.
        a_v: Share of the transported values.
        uncertainty: Place of the mean entropy between the lowest and the highest, in [0, 1].
        entropy: Mean entropy of the rows of plain attention.
        kl: KL divergence from plain attention at `alpha_k`.
    """

    alpha_k: float
    a_v: float
    uncertainty: float
    entropy: float
    kl: float


@dataclasses.dataclass(frozen=True)
class StepFigures:
    """One step of the first sample of the batch.

    Attributes:
        sigma: Noise level.
        progress: u in [0, 1].
        kl_cap: Budget of the KL divergence in nats.
        seconds: Wall time of the artefact.
        effect: Root mean square of what SWS changes in the prediction, relative to the prediction's.
        error: Largest difference of the artefact to the reference, relative to the largest value.
        sites: Figures by the path of the attention module.
        states: Transports [145, H, W] by the name of the state.
    """

    sigma: float
    progress: float
    kl_cap: float
    seconds: float
    effect: float
    error: float
    sites: Mapping[str, SiteFigures]
    states: Mapping[str, Floats]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A sampling run looked into.

    Attributes:
        manifest: Of the artefact.
        artefact: Its name.
        intensity: Strength of SWS.
        sizes: batch, height, width (latent) and tokens.
        text: What the text embeddings were, in words.
        steps: First to last.
    """

    manifest: Mapping[str, Any]
    artefact: str
    intensity: float
    sizes: Mapping[str, int]
    text: str
    steps: tuple[StepFigures, ...]


def write_report(
    artefact: Path,
    model: Path,
    out: Path,
    *,
    steps: int = 12,
    intensity: float = RECOMMENDED_INTENSITY,
    encoder_hidden_states: Floats | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Sample with the artefact, look into every site by the eager reference beside it, and write a page.

    The graph does not give out what its sites compute; the reference does, on the same inputs, and the page
    says how far the two are apart.

    Args:
        artefact: What `sws-export` wrote.
        model: The checkpoint that it was exported from.
        out: The HTML file; it needs no other file.
        steps: Steps from sigma 14 to 0.3.
        intensity: Strength of SWS.
        encoder_hidden_states: Text embeddings [1, L, X]; random ones where None.
        height: Of the latent; None takes four tokens a side on the coarsest grid.
        width: Of the latent.
        progress: Hears of the steps.

    Raises:
        SwsExportError: A file cannot be read or written, the checkpoint is another one, or a value is out of
            range.
    """
    from sws_export.runtime.report_page import render

    if steps < 2:
        raise OptionError(f"steps {steps} is out of range; at least 2 are needed")
    if not 0 < intensity <= 1:
        raise OptionError(f"intensity {intensity:g} is out of range; allowed is above 0 to 1")
    session = Session.load(artefact)
    manifest = session.contract.manifest
    if not manifest["sws"]:
        raise OptionError(f"{artefact} was exported with --plain: there is no SWS in it to report on")
    explanation = _explain(
        session, model, steps, intensity, encoder_hidden_states, height, width, progress or Silent()
    )
    with staged_directory(out) as scratch:
        page = scratch / out.name
        page.write_text(render(explanation), "utf-8")
        publish(page, out)
    return explanation


def _explain(
    session: Session,
    model: Path,
    steps: int,
    intensity: float,
    text: Floats | None,
    height: int | None,
    width: int | None,
    progress: Progress,
) -> Explanation:
    unet, config = _load_checked(model, session.contract.manifest, progress)
    side = _GRIDS_PER_SIDE * size_multiple(config)
    sizes = {
        "batch": 1,
        "height": height or side,
        "width": width or side,
        "tokens": _TOKENS if text is None else text.shape[1],
    }
    specs = [spec for spec in session.contract.inputs if spec.name not in ("sigma", "intensity")]
    trajectory = Trajectory(specs, sizes, steps)
    probe = _Probe(session, unet, intensity)
    figures = []
    with progress.stage("report", total=steps) as stage:
        for step in trajectory.steps():
            inputs = trajectory.inputs(step)
            if text is not None:
                inputs["encoder_hidden_states"] = np.asarray(text)
            found, prediction = probe.look(step, inputs)
            figures.append(found)
            trajectory.advance(step, prediction)
            stage.advance()
    return Explanation(
        manifest=session.contract.manifest,
        artefact=session.contract.path.name,
        intensity=intensity,
        sizes=sizes,
        text="random text embeddings" if text is None else "text embeddings of the caller",
        steps=tuple(figures),
    )


def _load_checked(
    model: Path, manifest: Mapping[str, Any], progress: Progress
) -> tuple[Any, Mapping[str, Any]]:
    """The UNet in float32 and its configuration, if it is the one the artefact was made from."""
    import torch

    from sws_export.checkpoint import open_checkpoint, verify_weights
    from sws_export.unet import load_unet

    recorded = manifest["source"]
    if recorded.get("loras"):
        raise OptionError(
            f"{recorded['file']} was exported with LoRA weights fused, which the report cannot do; export it "
            "without --lora for the report"
        )
    checkpoint = open_checkpoint(model)
    if recorded["kind"] == "checkpoint":
        found = verify_weights(checkpoint, progress)
        if found != recorded["sha256"]:
            raise ValidationError(
                f"the artefact was exported from {recorded['file']} with sha256 {recorded['sha256'][:12]}…, "
                f"{model} has {found[:12]}…; give the checkpoint that it was exported from"
            )
    return load_unet(checkpoint, torch.float32), checkpoint.config


class _Probe:
    """The artefact and the reference on the same inputs, each with its own state."""

    def __init__(self, session: Session, unet: Any, intensity: float) -> None:
        from sws_export.reference import ReferenceUNet

        manifest = session.contract.manifest
        settings = dict(manifest["sws"])
        self._parameters = SwsParameters(**settings | {"scales": tuple(settings["scales"])})
        sites = [name for names in manifest["sites"].values() for name in names]
        self._reference = ReferenceUNet(unet, self._parameters, sites)
        self._state: dict[str, Any] | None = None
        self._stream, self._plain = session.stream(), session.stream()
        self._intensity = intensity

    def look(self, step: TrajectoryStep, inputs: Mapping[str, Any]) -> tuple[StepFigures, Any]:
        """Figures of one step, and the artefact's prediction in float64."""
        import torch

        from sws_export.reference import schedule
        from sws_export.unet import unet_arguments

        sigma = torch.from_numpy(step.sigma).float()
        strength = torch.full_like(sigma, self._intensity)
        tensors = {
            name: torch.from_numpy(value).float() if value.dtype.kind == "f" else torch.from_numpy(value)
            for name, value in inputs.items()
        }
        expected, self._state = self._reference.step(
            **unet_arguments(tensors), sigma=sigma, intensity=strength, state=self._state
        )
        begin = time.perf_counter()
        found = self._stream.step(**inputs, sigma=step.sigma, intensity=self._intensity).astype(np.float64)
        seconds = time.perf_counter() - begin
        plain = self._plain.step(**inputs, sigma=step.sigma, intensity=0.0).astype(np.float64)
        now = schedule(sigma, strength, self._parameters)
        figures = StepFigures(
            sigma=float(sigma[0]),
            progress=float(now.u[0]),
            kl_cap=float(now.kappa[0]),
            seconds=seconds,
            effect=float(np.sqrt(np.square(found - plain).mean() / np.square(plain).mean())),
            error=float(np.abs(found - expected.numpy()).max() / np.abs(expected.numpy()).max()),
            sites={path: _site_figures(record) for path, record in self._reference.records.items()},
            states={name: values[0].astype(np.float32) for name, values in self._stream.state().items()},
        )
        return figures, found


def _site_figures(record: Any) -> SiteFigures:
    return SiteFigures(
        alpha_k=float(record.alpha_k[0]),
        a_v=float(record.a_v[0]),
        uncertainty=float(record.hu[0]),
        entropy=float(record.entropy_mean[0]),
        kl=float(record.kl[0]),
    )
