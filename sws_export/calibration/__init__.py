"""Calibration: ranges of the activations of a UNet, and the error of each layer with 8-bit activations."""

from sws_export.calibration.calibrate import (
    Calibration,
    CalibrationSteps,
    calibrate,
    recorded_steps,
    trajectory_steps,
)
from sws_export.calibration.pipeline_steps import check_pipeline, record_steps

__all__ = [
    "Calibration",
    "CalibrationSteps",
    "calibrate",
    "check_pipeline",
    "record_steps",
    "recorded_steps",
    "trajectory_steps",
]
