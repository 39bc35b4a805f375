"""Options of quantization."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graph_passes.weight_formats import WEIGHT_FORMATS, WeightFormat
from sws_export.errors import OptionError
from sws_export.options.prompts import read_prompts


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """What is stored and computed in 8 bits.

    Attributes:
        weights: Store the weights of linear layers and convolutions in this format; None for the precision of
            the graph.
        activations: Compute these layers in this format: their weights and their inputs; None for inputs in
            the precision of the graph.
        calibration: A diffusers pipeline directory that the ranges of the inputs are measured with; None for
            the trajectory of the validation.
        prompts: Text file with one prompt per line, for `calibration`.
        trust_code: Import `pipeline.py` of the pipeline if diffusers does not have its class.
    """

    weights: WeightFormat | None = None
    activations: WeightFormat | None = None
    calibration: Path | None = None
    prompts: Path | None = None
    trust_code: bool = False

    def __post_init__(self) -> None:
        for option, found in (("--weights", self.weights), ("--precision", self.activations)):
            if found not in (None, *WEIGHT_FORMATS):
                raise OptionError(f"{option}: expected one of {', '.join(WEIGHT_FORMATS)}, found '{found}'")
        if self.weights is not None and self.activations not in (None, self.weights):
            raise OptionError(
                f"--precision {self.activations} has weights of the same format; leave out "
                f"--weights {self.weights}"
            )
        if (self.calibration is None) != (self.prompts is None):
            raise OptionError("--calibration PIPELINE and --prompts FILE belong together; give both or none")
        if self.calibration is not None and self.activations is None:
            raise OptionError(
                "--calibration has no meaning without 8-bit activations; add --precision int8 or fp8, "
                "or leave it out"
            )
        if self.trust_code and self.calibration is None:
            raise OptionError("--trust-code has no meaning without --calibration PIPELINE; leave it out")

    @property
    def weight_format(self) -> WeightFormat | None:
        """Format of the weights; None if they have the precision of the graph."""
        return self.weights or self.activations

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add all arguments of the group."""
        group = parser.add_argument_group("quantization")
        group.add_argument(
            "--weights",
            choices=WEIGHT_FORMATS,
            help="store the weights of linear layers and convolutions in 8 bits; fp8 needs GPUs of compute "
            "capability 8.9 or later",
        )
        group.add_argument(
            "--calibration",
            type=Path,
            metavar="PIPELINE",
            help="diffusers pipeline directory to calibrate --precision int8 or fp8 with; default: the "
            "trajectory of the validation",
        )
        group.add_argument(
            "--prompts", type=Path, metavar="FILE", help="prompts for --calibration, one per line"
        )
        group.add_argument(
            "--trust-code",
            action="store_true",
            help="allow the pipeline.py of the pipeline directory, if any, to be executed",
        )

    def read_prompts(self) -> list[str]:
        """The prompts of the file, without empty lines.

        Raises:
            OptionError: The file cannot be read, or has none.
        """
        assert self.prompts is not None
        return read_prompts(self.prompts)

    def cache_key(self) -> dict[str, Any]:
        """The options that the graph depends on, as JSON values."""
        return {"weights": self.weight_format, "activations": self.activations} | self._calibration_key()

    def _calibration_key(self) -> dict[str, Any]:
        """The prompts, and the files of the pipeline by size and time."""
        if self.calibration is None:
            return {}
        files = sorted(file for file in self.calibration.rglob("*") if file.is_file())
        stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return {"prompts": self.read_prompts(), "pipeline": stamps}
