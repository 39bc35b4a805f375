"""A checkpoint as the source of an export."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir

from sws_export.checkpoint import (
    Checkpoint,
    WeightShapes,
    check_tensors,
    expected_shapes,
    open_checkpoint,
    verify_weights,
)
from sws_export.checkpoint.unet_io import size_multiple, unet_inputs
from sws_export.errors import CheckpointError
from sws_export.files import HashedCopy, file_places
from sws_export.lora.fuse import Lora, fuse, open_lora, parse_lora
from sws_export.manifest import SamplingEntry, SourceEntry
from sws_export.options import SourceOptions
from sws_export.progress import Progress
from sws_export.sources.hub import HubModel, fetch_hub_model, is_hub_id
from sws_export.tensors import PRECISIONS, Precision, TensorSpec
from sws_export.tracing.export_unet import export_plain, plain_weights
from sws_export.validation import SwsSpec, ValidationReport, validate_against_reference

_WHOLE = 0.99
"""Share of the bytes of weight files from which on external data begins with a copy of them."""

# Double precision is exported as float32.
_STORED_PRECISIONS: dict[str, Precision] = {"F64": "fp32"}
_STORED_PRECISIONS |= {found.safetensors: precision for precision, found in PRECISIONS.items()}


@dataclasses.dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint, exported in `precision` with `loras` fused, and inputs for a ControlNet if asked for.

    `hub` is the repository that the checkpoint is from; None for files of the user.
    """

    checkpoint: Checkpoint
    precision: Precision
    precision_reason: str
    loras: tuple[Lora, ...] = ()
    controlnet: bool = False
    hub: HubModel | None = None

    @property
    def path(self) -> Path:
        """The path that the user gave."""
        return self.checkpoint.path

    @property
    def name(self) -> str:
        """Name of the file, directory or repository."""
        return self.hub.repo if self.hub else self.checkpoint.path.name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The UNet's inputs, from its configuration."""
        return unet_inputs(
            self.checkpoint.config, PRECISIONS[self.precision].dtype, controlnet=self.controlnet
        )

    @property
    def config(self) -> dict[str, Any]:
        """The UNet's configuration."""
        return self.checkpoint.config

    @property
    def size_multiple(self) -> int:
        """Required divisor of the latent's height and width."""
        return size_multiple(self.checkpoint.config)

    @property
    def vae_scale(self) -> int | None:
        """Pixels per element of the latent, from the VAE or the family; None if unknown."""
        return self.checkpoint.vae_scale

    @property
    def parameter_count(self) -> int:
        """Number of parameters of the UNet."""
        return self.checkpoint.parameter_count

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files."""
        return self.checkpoint.files

    @property
    def files_read(self) -> tuple[Path, ...]:
        """The weight files, and those of the LoRAs with their configurations."""
        configs = [lora.peft.file for lora in self.loras if lora.peft is not None]
        return (*self.files, *(lora.file for lora in self.loras), *filter(None, configs))

    @property
    def whole_files(self) -> tuple[Path, ...]:
        """The weight files of a UNet alone that is neither converted nor has LoRAs.

        In a copy of the files, one after another, its weights must be aligned to their elements.
        """
        tensors = self.checkpoint.stored.values()
        places = file_places(self.files)
        element = PRECISIONS[self.precision].itemsize
        aligned = all((places[tensor.file] + tensor.offset) % element == 0 for tensor in tensors)
        size = sum(file.stat().st_size for file in self.files)
        used = sum(tensor.nbytes for tensor in tensors)
        return () if self.converts or not aligned or used < _WHOLE * size else self.files

    @property
    def converts(self) -> bool:
        """Whether weights are converted to another precision or have LoRAs added."""
        stored = {_STORED_PRECISIONS.get(dtype) for dtype in self.checkpoint.dtypes}
        return bool(self.loras) or stored != {self.precision}

    @property
    def quantization(self) -> None:
        """None: a checkpoint has no 8-bit weights that are kept."""
        return

    def identity(self, sha256: str) -> dict[str, Any]:
        """Its entry in the manifest, which tensors of the files are used, and its inputs."""
        tensors = {
            name: [tensor.file.name, tensor.dtype, tensor.offset, *tensor.shape]
            for name, tensor in self.checkpoint.stored.items()
        }
        return {"manifest": self.entry(sha256), "tensors": tensors, "controlnet": self.controlnet}

    def trace_identity(self) -> dict[str, Any]:
        """The configuration, the precision, and whether there are inputs for a ControlNet."""
        return {"config": self.config, "precision": self.precision, "controlnet": self.controlnet}

    def weights(self) -> Mapping[str, ir.TensorProtocol]:
        """The initializers of `plain_model` by name, not read yet."""
        return plain_weights(self.checkpoint, self.precision, fuse(self.checkpoint, self.loras))

    def describe(self) -> list[str]:
        """Family, layout, size, and where the configuration comes from: a line each."""
        found = self.checkpoint
        ignored = [f"ignored {count} tensors: {reason}" for reason, count in found.ignored.items()]
        return [
            f"{found.family or 'UNet2DConditionModel'}, {found.layout} layout, "
            f"{found.parameter_count / 1e6:.1f} M parameters, {'/'.join(found.dtypes)} -> {self.precision}",
            f"precision: {self.precision}, {self.precision_reason}",
            f"configuration: {found.config_source}",
            *(line for lora in self.loras for line in lora.describe()),
            *ignored,
            *(self.hub.remarks if self.hub else ()),
            *found.remarks,
        ]

    def check(self, progress: Progress, shapes: WeightShapes | None = None) -> WeightShapes:
        """Compare names and shapes of the weights with the architecture.

        Raises:
            CheckpointError: A tensor is missing or misshapen.
        """
        with progress.stage("check tensors") as stage:
            stage.describe("comparing names and shapes with the architecture")
            shapes = expected_shapes(self.config) if shapes is None else shapes
            unused = check_tensors(self.checkpoint, shapes)
        if unused:
            progress.warn(f"{unused} tensors of the checkpoint have no place in this UNet and are ignored")
        return shapes

    def read_weights(self, progress: Progress, copy: HashedCopy | None = None) -> str:
        """Read all weights, check them for NaN and Inf, and return the SHA-256 of the files.

        Raises:
            CheckpointError: A tensor holds NaN or Inf.
        """
        return verify_weights(self.checkpoint, progress, copy)

    def entry(self, sha256: str) -> SourceEntry:
        """The manifest's entry of the checkpoint."""
        found = self.checkpoint
        entry: SourceEntry = {
            "kind": "checkpoint",
            "file": self.name,
            "sha256": sha256,
            "layout": found.layout,
            "family": found.family,
            "parameters": found.parameter_count,
            "size_multiple": self.size_multiple,
            "prediction_type": found.prediction.type,
            "sampling": cast(SamplingEntry, found.prediction.sampling()),
            "vae_scale": found.vae_scale,
            "config": found.config,
            "loras": [lora.record() for lora in self.loras],
        }
        if self.hub:
            entry["revision"] = self.hub.commit
        return entry

    def plain_model(self, progress: Progress) -> ir.Model:
        """The UNet, traced as a plain graph; the weights stay on disk."""
        fused = fuse(self.checkpoint, self.loras)
        return export_plain(self.checkpoint, self.precision, progress, fused, controlnet=self.controlnet)

    def validate(
        self,
        onnx_path: Path,
        sws_spec: SwsSpec,
        progress: Progress,
        unquantized: ir.Model | None = None,
    ) -> ValidationReport:
        """Compare the graph with the eager reference on the checkpoint's weights."""
        return validate_against_reference(
            onnx_path,
            self.checkpoint,
            self.inputs,
            sws_spec,
            self.precision,
            progress,
            fuse(self.checkpoint, self.loras),
            unquantized,
        )


def open_checkpoint_source(
    model: Path, options: SourceOptions, progress: Progress, *, engine: bool
) -> CheckpointSource:
    """Read the headers of a checkpoint and of the LoRAs to be fused; a repository is downloaded first.

    Args:
        model: The checkpoint.
        options: How it is read.
        progress: Receives the stage and warnings.
        engine: Whether an engine is built; the default precision depends on it.

    Raises:
        CheckpointError: There is no UNet at `model`, or a LoRA belongs to another.
        OptionError: A LoRA is named in a wrong way.
    """
    hub = None
    if is_hub_id(model):
        hub = fetch_hub_model(model, options.variant, ema=options.ema, progress=progress)
    with progress.stage("open") as stage:
        stage.describe("reading headers")
        checkpoint = open_checkpoint(
            hub.directory if hub else model,
            options.config,
            ema=options.ema,
            variant=options.variant,
            attention_head_dim=options.attention_head_dim,
            prediction_type=options.prediction_type,
        )
    loras = tuple(open_lora(file, checkpoint, scale) for file, scale in map(parse_lora, options.loras))
    for lora in loras:
        for warning in lora.warnings():
            progress.warn(warning)
    precision, reason = _choose_precision(checkpoint, options.precision, engine=engine)
    return CheckpointSource(checkpoint, precision, reason, loras, options.controlnet, hub)


def _choose_precision(
    checkpoint: Checkpoint, given: Precision | None, *, engine: bool
) -> tuple[Precision, str]:
    """The precision of the export, and the reason in words."""
    if given is not None:
        return given, "as given by --precision"
    stored = _stored_precision(checkpoint)
    if engine and stored == "fp32":
        return "fp16", "the default of an engine; --precision fp32 keeps that of the checkpoint"
    return stored, "that of the checkpoint"


def _stored_precision(checkpoint: Checkpoint) -> Precision:
    if any(dtype.startswith("F8") for dtype in checkpoint.dtypes):
        # Both represent all values of float8; bfloat16 is needed for the range of the other tensors.
        return "bf16" if "BF16" in checkpoint.dtypes else "fp16"
    stored = next(iter(checkpoint.dtypes))
    if stored not in _STORED_PRECISIONS:
        raise CheckpointError(
            f"{checkpoint.path} holds {stored} weights; choose --precision fp32, fp16 or bf16"
        )
    return _STORED_PRECISIONS[stored]
