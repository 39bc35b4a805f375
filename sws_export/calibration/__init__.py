"""Calibration: ranges of the activations of a UNet, and the error of each layer with 8-bit activations."""

from sws_export.calibration.calibrate import (
    Calibration,
    calibrate,
    recorded_steps,
    trajectory_steps,
)
from sws_export.calibration.pipeline_steps import record_steps

__all__ = ["Calibration", "calibrate", "record_steps", "recorded_steps", "trajectory_steps"]
