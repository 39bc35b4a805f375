"""SWS parameters as a user writes them: `NAME=VALUE`."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from graph_passes.parameters import STATE_RADIUS, SwsParameters
from sws_export.errors import OptionError

__all__ = ["SwsParameters", "check_parameters", "parse_parameters", "recorded_parameters"]

# Lowest and highest value allowed. Iteration counts of 0 would break what the zero state means.
_RANGES: dict[str, tuple[float, float]] = {
    "sigma_min": (1e-6, 1e6),
    "sigma_max": (1e-6, 1e6),
    "tau": (1e-3, 1e3),
    "sinkhorn_iters": (1, 16),
    "rebalance_iters": (1, 16),
    "beta": (0.0, 0.999),
    "bisection_steps": (1, 16),
    "key_cap": (0.0, 1.0),
    "value_cap": (0.0, 1.0),
    "u_stop": (0.0, 1.0),
    "kl_floor": (0.0, 100.0),
    "kl_slope": (0.0, 100.0),
    "theta": (0.0, 10.0),
}
_SCHEDULES = ("progress", "noise")


def parse_parameters(assignments: Iterable[str]) -> SwsParameters:
    """Parameters from texts like `beta=0.7` or `scales=1,2,4`; what is not named keeps its default.

    Raises:
        OptionError: An unknown name, or a value that is no number of the right kind.
    """
    defaults = dataclasses.asdict(SwsParameters())
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if name not in defaults:
            raise OptionError(f"--sws: unknown parameter '{name}'; known are {', '.join(defaults)}")
        if not equals or not text.strip():
            raise OptionError(f"--sws {name}: a value is missing; write --sws {name}={defaults[name]}")
        values[name] = _parse_value(name, text.strip(), defaults[name])
    return SwsParameters(**values)


def _parse_value(name: str, text: str, default: object) -> object:
    if name == "schedule":
        return text
    try:
        if name == "scales":
            return tuple(int(part) for part in text.split(","))
        return int(text) if isinstance(default, int) else float(text)
    except ValueError:
        kind = {"scales": "three integers as in 2,4,8"}.get(
            name, "an integer" if isinstance(default, int) else "a number"
        )
        raise OptionError(f"--sws {name}: expected {kind}, found '{text}'") from None


def check_parameters(parameters: SwsParameters) -> None:
    """Reject values outside the range in which the mathematics is meaningful.

    Raises:
        OptionError: Names the parameter, the value found and the range allowed.
    """
    for name, (low, high) in _RANGES.items():
        value = getattr(parameters, name)
        if not math.isfinite(value) or not low <= value <= high:
            raise OptionError(f"--sws {name}: {value} is out of range; allowed is {low:g} to {high:g}")
    if parameters.sigma_min >= parameters.sigma_max:
        raise OptionError(
            f"--sws sigma_min: {parameters.sigma_min:g} must be below sigma_max ({parameters.sigma_max:g})"
        )
    if parameters.schedule not in _SCHEDULES:
        raise OptionError(
            f"--sws schedule: '{parameters.schedule}' is unknown; use {' or '.join(_SCHEDULES)}"
        )
    scales = parameters.scales
    if len(scales) != 3 or list(scales) != sorted(scales) or not 1 <= scales[0] <= scales[-1] <= STATE_RADIUS:
        found = ",".join(str(scale) for scale in scales)
        raise OptionError(
            f"--sws scales: expected three integers from 1 to {STATE_RADIUS}, none below the one before, "
            f"found {found}"
        )


def recorded_parameters(described: Mapping[str, Any]) -> SwsParameters:
    """The parameters that a manifest records; those that it does not name have their defaults."""
    values = dict(described)
    if "scales" in values:
        values["scales"] = tuple(values["scales"])
    return SwsParameters(**values)
