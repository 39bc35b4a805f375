"""Measurement of the steps of an artefact, and of the eager reference for the same inputs."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graph_passes.guard import GuardOptions
from sws_export.errors import OptionError, ValidationError
from sws_export.manifest import SourceEntry
from sws_export.parameters import SwsParameters, recorded_parameters
from sws_export.presets import Preset, recorded_preset
from sws_export.progress import Progress
from sws_export.report.explanation import Floats, SiteMetrics, StepMetrics
from sws_export.runtime.contract import Contract
from sws_export.runtime.session import Session
from sws_export.validation.trajectory import TrajectoryStep


class Probe:
    """Runs the artefact with and without SWS, and the reference if there is one, on the same inputs."""

    def __init__(self, session: Session, reference: "Reference | None", intensity: float) -> None:
        self._stream, self._plain = session.stream(), session.stream()
        self._contract = session.contract
        self._preset, self._parameters = method_of(session.contract)
        self._without_grid = [pair.input for pair in self._preset.extra_states()]
        self._bypass_sigma = self._preset.bypass_sigma(self._parameters)
        self._reference = reference
        self._intensity = intensity

    def measure(
        self, step: TrajectoryStep, inputs: Mapping[str, Any]
    ) -> tuple[StepMetrics, npt.NDArray[np.float64]]:
        """Metrics of one step, and the artefact's prediction in float64."""
        before = self._stream.state()
        begin = time.perf_counter()
        found = self._stream.step(**inputs, sigma=step.sigma, intensity=self._intensity).astype(np.float64)
        seconds = time.perf_counter() - begin
        sigma = step.sigma if self._bypass_sigma is None else self._bypass_sigma
        plain = self._plain.step(**inputs, sigma=sigma, intensity=0.0).astype(np.float64)
        error: float | None = None
        sites: dict[str, SiteMetrics] = {}
        if self._reference is not None:
            expected, sites = self._reference.step(step, inputs)
            error = float(np.abs(found - expected).max() / np.abs(expected).max())
        u, kappa = self._preset.schedule(step.sigma, self._intensity, self._parameters, before)
        metrics = StepMetrics(
            sigma=float(step.sigma[0]),
            progress=u,
            kl_cap=kappa,
            seconds=seconds,
            effect=float(np.sqrt(np.square(found - plain).mean() / np.square(plain).mean())),
            error=error,
            sites=self._site_metrics() if self._contract.metrics else sites,
            states={
                name: self._preset.banded_state(values)
                for name, values in self._stream.state().items()
                if name not in self._without_grid
            },
        )
        return metrics, found

    def _site_metrics(self) -> dict[str, SiteMetrics]:
        """The debug outputs of the artefact by site."""
        columns = self._stream.metrics()
        del columns["kl_cap"]
        return {
            site: SiteMetrics(**{name: float(values[0, column]) for name, values in columns.items()})
            for column, site in enumerate(self._contract.metric_sites)
        }


def method_of(contract: Contract) -> tuple[Preset, SwsParameters]:
    """Preset and parameters of the SWS in an artefact.

    Raises:
        OptionError: It was exported with --plain.
    """
    preset, sws = recorded_preset(contract.manifest), contract.manifest["sws"]
    if preset is None or sws is None:
        raise OptionError(f"{contract.path} was exported with --plain: it contains no SWS to report on")
    return preset, recorded_parameters(sws)


class Reference:
    """The eager reference with its own state."""

    def __init__(self, model: Path, contract: Contract, intensity: float, progress: Progress) -> None:
        preset, parameters = method_of(contract)
        sites = [name for names in contract.manifest["sites"].values() for name in names]
        unet = _load_checked(model, contract.manifest["source"], progress)
        recorded = contract.manifest["guard"]
        guard = GuardOptions.parse(recorded["form"], recorded["rows"]) if recorded else GuardOptions()
        self._unet = preset.reference_unet(unet, parameters, sites, guard.kl_strides)
        self._intensity = intensity
        self._state: dict[str, Any] | None = None

    def step(self, step: TrajectoryStep, inputs: Mapping[str, Any]) -> tuple[Floats, dict[str, SiteMetrics]]:
        """The prediction of one step, and the metrics of all sites."""
        import torch

        from sws_export.checkpoint.unet_module import unet_arguments

        sigma = torch.from_numpy(step.sigma).float()
        tensors = {
            name: torch.from_numpy(value).float() if value.dtype.kind == "f" else torch.from_numpy(value)
            for name, value in inputs.items()
        }
        prediction, self._state = self._unet.step(
            **unet_arguments(tensors),
            sigma=sigma,
            intensity=torch.full_like(sigma, self._intensity),
            state=self._state,
        )
        sites = {path: _site_metrics(record) for path, record in self._unet.records.items()}
        return prediction.numpy(), sites


def _site_metrics(record: Any) -> SiteMetrics:
    names = SiteMetrics.__dataclass_fields__
    return SiteMetrics(**{name: float(getattr(record, name)[0]) for name in names})


def _load_checked(model: Path, recorded: SourceEntry, progress: Progress) -> Any:
    """The UNet in float32, after a check that the artefact was exported from it."""
    import torch

    from sws_export.checkpoint import open_checkpoint, verify_weights
    from sws_export.checkpoint.unet_module import load_unet

    if recorded.get("loras"):
        raise OptionError(
            f"{recorded['file']} was exported with fused LoRA weights, which the reference of the report "
            "lacks; leave out the checkpoint and export with --debug-outputs, or export without --lora"
        )
    checkpoint = open_checkpoint(model)
    if recorded["kind"] == "checkpoint":
        found = verify_weights(checkpoint, progress)
        if found != recorded["sha256"]:
            raise ValidationError(
                f"the artefact was exported from {recorded['file']} with sha256 {recorded['sha256'][:12]}…, "
                f"{model} has {found[:12]}…; give the checkpoint that it was exported from"
            )
    return load_unet(checkpoint, torch.float32)
