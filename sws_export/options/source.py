"""Options of the model that is exported."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graph_passes.weight_formats import WEIGHT_FORMATS
from sws_export.errors import OptionError
from sws_export.tensors import PRECISIONS, Precision

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "edm", "edm_v_prediction")


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How the checkpoint is read and what is fused into it.

    Attributes:
        precision: Precision of the exported UNet. None: a graph has that of the checkpoint; an engine has
            fp16, or bf16 if the checkpoint has.
        config: A diffusers config.json, if there is none beside the checkpoint.
        ema: Use the EMA weights of a checkpoint that has both.
        variant: Variant of the files in a directory, such as `fp16`.
        attention_head_dim: Number of heads of each level, for a UNet of an unknown family.
        prediction_type: What the UNet predicts, one of `PREDICTION_TYPES`; None for what the checkpoint
            specifies.
        loras: FILE or FILE:SCALE of each LoRA to fuse.
        controlnet: Add inputs for the residuals of a ControlNet.
    """

    precision: Precision | None = None
    config: Path | None = None
    ema: bool = False
    variant: str | None = None
    attention_head_dim: tuple[int, ...] | None = None
    prediction_type: str | None = None
    loras: tuple[str, ...] = field(default=(), metadata={"option": "--lora"})
    controlnet: bool = False

    def __post_init__(self) -> None:
        for option, found, known in (
            ("--precision", self.precision, tuple(PRECISIONS)),
            ("--prediction-type", self.prediction_type, PREDICTION_TYPES),
        ):
            if found not in (None, *known):
                raise OptionError(f"{option}: expected one of {', '.join(known)}, found '{found}'")

    @staticmethod
    def add_reading_arguments(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
        """Add the arguments that select files and weights; returns the argument group."""
        group = parser.add_argument_group("checkpoint")
        group.add_argument("--config", type=Path, metavar="FILE", help="diffusers config.json of the UNet")
        group.add_argument("--ema", action="store_true", help="use the EMA weights of an original checkpoint")
        group.add_argument("--variant", help="variant of the files in a directory, such as fp16")
        group.add_argument(
            "--attention-head-dim",
            type=_integers,
            metavar="N[,N…]",
            help="number of heads of each level, for a UNet of an unknown family",
        )
        group.add_argument(
            "--lora",
            dest="loras",
            action="append",
            default=[],
            metavar="FILE[:SCALE]",
            help="fuse a LoRA; repeatable",
        )
        return group

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add all arguments of the group."""
        group = cls.add_reading_arguments(parser)
        group.add_argument(
            "--precision",
            choices=(*PRECISIONS, *WEIGHT_FORMATS),
            help="int8 and fp8: linear layers and convolutions, the rest has 16 bits; default of a graph: "
            "that of the checkpoint; of an engine: fp16, or bf16 if that is stored",
        )
        group.add_argument(
            "--prediction-type",
            metavar="TYPE",
            help=f"one of {', '.join(PREDICTION_TYPES)}; default: that of the checkpoint",
        )
        group.add_argument(
            "--controlnet", action="store_true", help="add inputs for the residuals of a ControlNet"
        )

    def cache_key(self) -> dict[str, Any]:
        """The options that the graph depends on beside what `Source.identity` covers, as JSON values."""
        return {
            "ema": self.ema,
            "attention_head_dim": self.attention_head_dim,
            "prediction_type": self.prediction_type,
            "controlnet": self.controlnet,
        }


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
