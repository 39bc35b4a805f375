"""Fuses LoRAs and related adaptations into the parameters of a checkpoint's UNet, tensor by tensor.

Opening a LoRA reads its header, configuration and scalars; other tensors are read when a parameter is fused.
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sws_export.checkpoint import Checkpoint, StoredTensor, read_tensor
from sws_export.checkpoint.header import read_header
from sws_export.errors import CheckpointError, OptionError, first_items
from sws_export.lora.layer import LoraLayer, read_shape
from sws_export.lora.names import LoraNames, read_names
from sws_export.lora.peft_config import PeftConfig, read_peft_config

if TYPE_CHECKING:
    import torch

_DIRECTORY_FILES = (
    "adapter_model.safetensors",
    "unet/adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Lora:
    """A LoRA file matched with a UNet.

    Attributes:
        path: The path that the user gave: a file or a directory.
        file: The file with the tensors.
        scale: Strength given by the user.
        changes: The tensors that change a parameter, by diffusers' name of the parameter.
        unmatched: Layers of the LoRA that the UNet does not have.
        text_encoder: Stored names of tensors for the text encoder.
        unknown: Stored names of tensors whose role is not known.
        peft: PEFT's configuration of the adapter, or None.
    """

    path: Path
    file: Path
    scale: float
    changes: dict[str, LoraLayer]
    unmatched: tuple[str, ...]
    text_encoder: tuple[str, ...]
    unknown: tuple[str, ...]
    peft: PeftConfig | None = None

    def describe(self) -> list[str]:
        """The number of parameters that change and of tensors for other models, for the log."""
        config = f", {self.peft.file.name}" if self.peft is not None and self.peft.file is not None else ""
        lines = [f"LoRA {self.path.name} at {self.scale:g}: {len(self.changes)} parameters{config}"]
        if self.text_encoder:
            lines.append(
                f"LoRA {self.path.name}: ignored {len(self.text_encoder)} tensors of the text encoder "
                f"({first_items(self.text_encoder)})"
            )
        return lines

    def warnings(self) -> list[str]:
        """One line for each kind of tensor that could have been meant for the UNet and is not used."""
        warnings = []
        if self.unmatched:
            warnings.append(
                f"{self.path}: ignored {len(self.unmatched)} layers that this UNet does not have "
                f"({first_items(self.unmatched)})"
            )
        if self.unknown:
            warnings.append(
                f"{self.path}: ignored {len(self.unknown)} tensors without a known role "
                f"({first_items(self.unknown)})"
            )
        return warnings

    def record(self) -> dict[str, Any]:
        """The manifest's entry: everything that the fused weights depend on besides the checkpoint."""
        entry = {"file": self.path.name, "scale": self.scale, "sha256": _sha256(self.file)}
        if self.peft is not None and self.peft.file is not None:
            entry["config_sha256"] = _sha256(self.peft.file)
        return entry


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def parse_lora(text: str) -> tuple[Path, float]:
    """Split `FILE[:SCALE]`; the default scale is 1.

    Raises:
        OptionError: The scale is not a finite number.
    """
    # A colon after the letter of a drive is part of the path.
    start = 2 if re.match(r"[A-Za-z]:[\\/]", text) else 0
    file, colon, scale = text[start:].rpartition(":")
    if not colon or Path(text).exists() or scale.endswith(".safetensors"):
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise OptionError(f"--lora {text}: expected FILE or FILE:SCALE with a number, found '{scale}'")
    return Path(text[:start] + file), value


def open_lora(path: Path, checkpoint: Checkpoint, scale: float = 1.0) -> Lora:
    """Match the LoRA at `path` with the UNet of `checkpoint`.

    Args:
        path: A .safetensors file, or a directory that PEFT or diffusers saved.
        checkpoint: The checkpoint.
        scale: Strength of the LoRA.

    Raises:
        CheckpointError: The file is not a supported LoRA, or belongs to a model of another family.
    """
    file = _find_file(path)
    header = read_header(file)
    parameters = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    layers = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    names = read_names(file, header.tensors, layers, checkpoint.config["layers_per_block"])
    peft = read_peft_config(file, header.metadata)
    changes: dict[str, LoraLayer] = {}
    unknown = list(names.unknown)
    for name, roles in names.layers.items():
        layer = LoraLayer(name, {role: header.tensors[stored] for role, stored in roles.items()}, peft)
        changed, used = _changes(file, layer, parameters)
        changes |= dict.fromkeys(changed, layer)
        # A LoKr of full rank and LyCORIS' (IA)³ have an alpha without a meaning.
        unknown += [stored for role, stored in roles.items() if role not in used | {"alpha"} or not changed]
    if not changes:
        raise CheckpointError(_no_match_message(path, checkpoint, names))
    return Lora(path, file, scale, changes, names.unmatched, names.text_encoder, tuple(unknown), peft)


def _find_file(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in _DIRECTORY_FILES if (path / name).is_file()), None)
        if found is not None:
            return found
        files = sorted(path.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        problem = "several" if files else "no"
        raise CheckpointError(
            f"{path} contains {problem} .safetensors files; expected a LoRA file or a directory with one of "
            f"{', '.join(_DIRECTORY_FILES)}"
        )
    if path.suffix.lower() in _PICKLES:
        raise CheckpointError(
            f"{path}: only .safetensors LoRAs are supported (loading a pickle executes code); convert it"
        )
    return path


def _no_match_message(path: Path, checkpoint: Checkpoint, names: LoraNames) -> str:
    return (
        f"{path} changes no layer of {checkpoint.path} ({checkpoint.family or 'unknown family'}): its "
        f"{len(names.unmatched)} layers have other names ({first_items(names.unmatched)}); "
        "use a LoRA for this family"
    )


def _changes(
    file: Path, layer: LoraLayer, parameters: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], set[str]]:
    """The parameters that `layer` changes and the roles of the tensors that are used, after a shape check."""
    import torch

    from sws_export.lora.formulas import adapted_bias, adapted_weight, changes_bias, changes_weight

    used: set[StoredTensor] = set()

    def read(stored: StoredTensor) -> torch.Tensor:
        used.add(stored)
        return read_shape(stored)

    weight, bias = f"{layer.name}.weight", f"{layer.name}.bias"
    changed = [weight] if changes_weight(layer) else []
    # PEFT's (IA)³ scales the bias of layers that have one.
    if changes_bias(layer) and (bias in parameters or "ia3_l" not in layer):
        changed.append(bias)
    for name in changed:
        if name not in parameters:
            raise CheckpointError(f"{file} changes '{name}', which the UNet does not have")
        adapted = adapted_weight if name == weight else adapted_bias
        parameter = torch.empty(parameters[name], device="meta")
        try:
            found = tuple(adapted(parameter, dataclasses.replace(layer, read=read), 1.0).shape)
        except KeyError as error:
            raise CheckpointError(
                f"{file} is damaged: layer '{layer.name}' has {', '.join(layer.stored)}, but no "
                f"{error.args[0]}"
            ) from error
        except (RuntimeError, IndexError, ValueError):
            found = None
        if found != parameters[name]:
            shapes = ", ".join(f"{role} {list(stored.shape)}" for role, stored in layer.stored.items())
            raise CheckpointError(
                f"{file} belongs to another family: '{name}' has shape {list(parameters[name])} in the UNet, "
                f"the LoRA has {shapes}; use a LoRA for this family"
            )
    return changed, {role for role, stored in layer.stored.items() if stored in used}


def fuse(checkpoint: Checkpoint, loras: Sequence[Lora]) -> dict[str, "Callable[[], torch.Tensor]"]:
    """For each parameter that `loras` change, a function that reads and computes it.

    LoRAs are fused in their order. The function returns a float32 tensor in the shape of the parameter, not
    rounded to the checkpoint's dtype, and raises CheckpointError if the result contains NaN or Inf.
    """
    changes: dict[str, list[tuple[Lora, LoraLayer]]] = {}
    for lora in loras:
        for name, layer in lora.changes.items():
            changes.setdefault(name, []).append((lora, layer))
    return {
        name: functools.partial(_fused, name, checkpoint.tensors[name], of_parameter)
        for name, of_parameter in changes.items()
    }


def _fused(name: str, stored: StoredTensor, changes: list[tuple[Lora, LoraLayer]]) -> "torch.Tensor":
    from sws_export.lora.formulas import adapted_bias, adapted_weight

    adapted = adapted_weight if name.endswith(".weight") else adapted_bias
    parameter = read_tensor(stored).float()
    for lora, layer in changes:
        parameter = adapted(parameter, layer, lora.scale)
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(
                f"{lora.file}: '{name}' contains NaN or Inf after fusing; the LoRA is broken"
            )
    return parameter
