"""PEFT's configuration of an adapter: adapter_config.json, or the copy that diffusers stores as metadata."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sws_export.checkpoint.config import read_json
from sws_export.checkpoint.schemas import PeftEntry
from sws_export.documents import check_document, parse_json, short
from sws_export.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
_SUPPORTED_TYPES = ("LORA", "LOHA", "LOKR", "IA3", "OFT")
# Options of LoRA with which PEFT computes something else than the weights of this package.
_UNSUPPORTED_OPTIONS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Initializations that change the weights of the base model, which the adapter then depends on.
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_NAME = re.compile(r"[\w.-]+")
# Matching takes at most the length of a layer's name to the power of the number of quantifiers.
_MAX_PATTERN, _MAX_QUANTIFIERS = 512, 3
_QUANTIFIERS = re.compile(r"[*+{?]")
_REPEATED_GROUP = re.compile(r"\)[*+{?]|\(\?|\\[0-9]")
_MERGE = "merge it with PEFT (merge_and_unload) and export the merged UNet"


@dataclass(frozen=True)
class PeftConfig:
    """The options of a PEFT adapter that determine the adapted weights.

    Attributes:
        content: The configuration.
        file: The configuration file, or None if the configuration is part of the adapter's file.
    """

    content: Mapping[str, Any]
    file: Path | None

    def scaling(self, layer: str, rank: int) -> float:
        """alpha / rank of a layer, or alpha / sqrt(rank) with rsLoRA.

        Args:
            layer: diffusers' name of the layer.
            rank: Rank of the layer's matrices; for LoKr the configuration has precedence.
        """
        if self.content.get("peft_type") == "LOKR":
            rank = self._of_layer("rank_pattern", layer, self.content.get("r", rank))
        alpha = self.content.get("lora_alpha", self.content.get("alpha", rank))
        alpha = self._of_layer("alpha_pattern", layer, alpha)
        return float(alpha) / (math.sqrt(rank) if self.content.get("use_rslora") else rank)

    def is_feedforward(self, layer: str) -> bool:
        """Whether (IA)³ scales the input of a layer instead of its output."""
        modules = self.content.get("feedforward_modules") or []
        if isinstance(modules, str):
            return re.fullmatch(_expression(modules), layer) is not None
        return any(layer.endswith(module) for module in modules)

    def _of_layer(self, option: str, layer: str, default: Any) -> Any:
        """The value of the first pattern that matches a layer's name."""
        patterns = self.content.get(option) or {}
        return next(
            (value for pattern, value in patterns.items() if _matches(pattern, layer)),
            default,
        )


def read_peft_config(path: Path, metadata: Mapping[str, str]) -> PeftConfig | None:
    """The configuration that belongs to the adapter in `path`, or None without one.

    Raises:
        CheckpointError: The configuration cannot be read, or the adapter cannot be fused with it.
    """
    try:
        config = _in_metadata(metadata)
    except ValueError as error:
        raise CheckpointError(f"{path}: the metadata lora_adapter_metadata is malformed: {error}") from error
    if config is None and _belongs_to(path):
        config = PeftConfig(read_json(path.parent / CONFIG_NAME, dict[str, Any]), path.parent / CONFIG_NAME)
    if config is not None:
        _check(config.file or path, config.content)
    return config


def _in_metadata(metadata: Mapping[str, str]) -> PeftConfig | None:
    content = parse_json(metadata.get("lora_adapter_metadata", "{}"))
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, found {short(content)}")
    options = {
        name.removeprefix("unet."): value for name, value in content.items() if name.startswith("unet.")
    }
    return PeftConfig(options, None) if options else None


def _belongs_to(path: Path) -> bool:
    """Whether the adapter_config.json beside `path` is for this file; a folder of LoRAs can contain any."""
    if not (path.parent / CONFIG_NAME).is_file():
        return False
    return path.name == "adapter_model.safetensors" or list(path.parent.glob("*.safetensors")) == [path]


def _matches(pattern: str, layer: str) -> bool:
    """Whether PEFT applies an entry of `rank_pattern` or `alpha_pattern` to a layer."""
    return re.match(rf"(.*\.)?({_expression(pattern)})$", layer) is not None


def _expression(pattern: str) -> str:
    """The regular expression of a pattern; that of a layer's name matches this name only."""
    return re.escape(pattern) if _NAME.fullmatch(pattern) else pattern


def _check_patterns(where: Path, config: Mapping[str, Any]) -> None:
    """Reject patterns that are no regular expressions, or may take very long to match.

    Raises:
        CheckpointError: Names the pattern.
    """
    patterns = [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    modules = config.get("feedforward_modules")
    for pattern in [*patterns, *([modules] if isinstance(modules, str) else [])]:
        if _NAME.fullmatch(pattern):
            continue
        problem = ""
        if len(pattern) > _MAX_PATTERN or len(_QUANTIFIERS.findall(pattern)) > _MAX_QUANTIFIERS:
            problem = f"has more than {_MAX_PATTERN} characters or {_MAX_QUANTIFIERS} quantifiers"
        elif _REPEATED_GROUP.search(pattern):
            problem = "repeats a group or refers to one"
        else:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                problem = f"is no regular expression ({error})"
        if problem:
            raise CheckpointError(f"{where}: the pattern {short(pattern)} {problem}; {_MERGE}")


def _check(where: Path, config: Mapping[str, Any]) -> None:
    try:
        check_document(dict(config), PeftEntry)
    except ValueError as error:
        raise CheckpointError(f"{where}: PEFT's configuration: {error}") from error
    _check_patterns(where, config)
    kind = config.get("peft_type", "LORA")
    if kind not in _SUPPORTED_TYPES:
        raise CheckpointError(
            f"{where}: adapters of type {short(kind)} are not supported (expected "
            f"{', '.join(_SUPPORTED_TYPES)}); {_MERGE}"
        )
    option = next((option for option in _UNSUPPORTED_OPTIONS if config.get(option)), None)
    initialization = config.get("init_lora_weights")
    if option is None and str(initialization).startswith(_CHANGED_BASE):
        option = f"init_lora_weights={initialization}"
    if kind != "OFT" and config.get("r") == 0:
        # OFT has the size of its blocks instead.
        raise CheckpointError(f"{where}: PEFT's configuration: r: expected an integer >= 1, found 0")
    if kind == "OFT" and config.get("coft"):
        option = "coft"
    if option is not None:
        raise CheckpointError(f"{where}: adapters with {option} are not supported; {_MERGE}")
