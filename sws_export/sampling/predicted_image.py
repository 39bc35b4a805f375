"""How much the predicted image changes from step to step while a pipeline samples."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from sws_export.errors import OptionError
from sws_export.noise_levels import noise_levels

_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class StepRecord:
    """What the scheduler of a pipeline was given while it drew a batch of images.

    Attributes:
        noise: Initial latents divided by their standard deviation, [B, C, H, W].
        changes: Root mean square change of each predicted image from one step to the next, [B], in the
            units of the latents; one less than there are steps.
    """

    def __init__(self) -> None:
        self.noise: Any = None
        self.changes: list[npt.NDArray[np.float32]] = []
        self._last: Any = None

    def add(self, scheduler: Any, output: Any, timestep: Any, sample: Any) -> None:
        """Record one step; arguments as of the scheduler's `step`."""
        if self.noise is None:
            self.noise = sample.float().cpu() / float(scheduler.init_noise_sigma)
        predicted = predicted_image(scheduler, output, timestep, sample)
        if self._last is not None:
            moved = (predicted - self._last).square().flatten(1).mean(dim=1).sqrt()
            self.changes.append(moved.cpu().numpy())
        self._last = predicted


@contextlib.contextmanager
def recorded_steps(scheduler: Any) -> Iterator[StepRecord]:
    """Record the calls of `scheduler.step` in the block."""
    record, step = StepRecord(), scheduler.step

    # Pipelines inspect the signature for arguments such as `eta`.
    @functools.wraps(step)
    def recording(model_output: Any, timestep: Any, sample: Any, *others: Any, **named: Any) -> Any:
        record.add(scheduler, model_output, timestep, sample)
        return step(model_output, timestep, sample, *others, **named)

    scheduler.step = recording
    try:
        yield record
    finally:
        del scheduler.step


def predicted_image(scheduler: Any, output: Any, timestep: Any, sample: Any) -> Any:
    """The image that the model predicts at a step (x0), in latents, float32 [B, C, H, W].

    With x = x0 + sigma n: x0 = x - sigma output for `epsilon`, x / (sigma² + 1) - sigma / sqrt(sigma² + 1)
    output for `v_prediction` (Salimans and Ho, "Progressive distillation", 2022, appendix D, in the scale of
    x), and output for `sample`.

    Args:
        scheduler: A diffusers scheduler.
        output: Of the model, after guidance.
        timestep: Of the step.
        sample: Latents before the step, as the scheduler keeps them.

    Raises:
        OptionError: The scheduler has another type of prediction.
    """
    check_prediction(scheduler)
    output, sample = output.float(), sample.float()
    sigma = float(noise_levels(scheduler, timestep.cpu() if hasattr(timestep, "cpu") else timestep))
    if hasattr(scheduler, "precondition_outputs"):
        return scheduler.precondition_outputs(sample, output, sigma)
    kind = _prediction_type(scheduler)
    scale = (sigma**2 + 1.0) ** 0.5
    # Schedulers that start at standard deviation 1 keep x / sqrt(sigma² + 1).
    if float(scheduler.init_noise_sigma) == 1.0:
        sample = sample * scale
    if kind == "epsilon":
        return sample - sigma * output
    if kind == "v_prediction":
        return sample / scale**2 - sigma / scale * output
    return output


def check_prediction(scheduler: Any) -> None:
    """Check that `predicted_image` can convert what the model of `scheduler` predicts.

    Raises:
        OptionError: The scheduler has another type of prediction.
    """
    if hasattr(scheduler, "precondition_outputs") or _prediction_type(scheduler) in _PREDICTION_TYPES:
        return
    raise OptionError(
        f"{type(scheduler).__name__}: expected a prediction type of {', '.join(_PREDICTION_TYPES)}, "
        f"found '{_prediction_type(scheduler)}'"
    )


def _prediction_type(scheduler: Any) -> str:
    return str(scheduler.config.get("prediction_type", "epsilon"))
