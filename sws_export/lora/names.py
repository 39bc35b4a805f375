"""Assigns the tensors of a LoRA file to layers of a UNet.

The name of a tensor consists of prefixes, the name of a layer, and the role of the tensor in its layer.
Trainers use different prefixes, name layers after diffusers' or after the original UNet, with dots or
underscores, and have several names for most roles.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sws_export.errors import CheckpointError

# Stripped repeatedly. PEFT, pipelines, kohya and OneTrainer, SimpleTuner, ComfyUI, training wrappers.
_PREFIXES = (
    "base_model.model.",
    "unet.",
    "lora_unet_",
    "lycoris_",
    "model.diffusion_model.",
    "diffusion_model.",
    "module.",
    "_orig_mod.",
)
_TEXT_ENCODERS = (
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoders.",
    "te1_",
    "te2_",
    "text_model.",
    "text_model_",
)

_ADAPTER = r"(?:\.(?!weight|bias)\w+)?"
"""PEFT's name of the adapter, such as `.default_0`."""
_ROLES = tuple(
    (re.compile(f"(?:{pattern})$"), role)
    for pattern, role in (
        (
            rf"\.(?:lora_down|lora_A|lora\.down|lora_layer\.down|lora_linear_layer\.down){_ADAPTER}\.weight",
            "down",
        ),
        (rf"\.(?:lora_up|lora_B|lora\.up|lora_layer\.up|lora_linear_layer\.up){_ADAPTER}\.weight", "up"),
        (r"_lora\.down\.weight", "down"),
        (r"_lora\.up\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (rf"\.(?:lora_up|lora_B){_ADAPTER}\.bias", "up_bias"),
        (r"(?:\.lora|_lora|\.lora_layer)?\.alpha", "alpha"),
        (r"\.dora_scale", "dora_scale"),
        (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
        (rf"\.(hada_(?:w[12]_[ab]|t[12])){_ADAPTER}", r"\1"),
        (rf"\.(lokr_(?:w[12](?:_[ab])?|t2)){_ADAPTER}", r"\1"),
        (r"\.(oft_blocks|rescale)", r"\1"),
        (rf"\.oft_R{_ADAPTER}\.weight", "oft_R"),
        (r"\.(a1|a2|b1|b2)\.weight", r"\1"),
        (r"\.(on_input)", r"\1"),
        (rf"\.(ia3_l){_ADAPTER}", r"\1"),
        (r"\.(?:w_norm|diff)", "weight_difference"),
        (r"\.(?:b_norm|diff_b)", "bias_difference"),
        (r"\.set_weight", "new_weight"),
        (rf"(?:\.modules_to_save{_ADAPTER})?\.(weight|bias)", r"new_\1"),
    )
)
# Roles that models without an adaptation have, too.
_ROLES_OF_MODELS = (None, "new_weight", "new_bias", "alpha")

_UNSUPPORTED = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\.lora_E$|\.lora_ranknum", "AdaLoRA"),
        (r"\.vera_lambda", "VeRA"),
        (r"\.boft_[Rs]", "PEFT's BOFT"),
        (r"\.oft_r(\.|$)|\.oft_s(\.|$)|\.oft_diag", "an early form of OFT"),
        (r"\.lora_embedding_[AB]", "a LoRA of an embedding"),
        (r"\.(q_layer|p_layer)\.weight$|\.lambda_layer$", "T-LoRA"),
        (r"\.lokr_t1$", "LoKr with two Tucker decompositions"),
        (r"\.bm\.weight$", "GLoRA with Tucker decomposition"),
        (r"\.reshape_weight$", "a LoRA that changes the shape of a weight"),
    )
)

# Layers of the original UNet, with underscores. SDXL LoRAs of kohya's trainer have these names.
_BLOCK = re.compile(r"^(input|output)_blocks_(\d+)_(\d+)_(.*)$")
_MIDDLE = re.compile(r"^middle_block_([0-2])_(.*)$")
_ORIGINAL_PARTS = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ORIGINAL_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "time_embed_cond_proj": "time_embedding_cond_proj",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}


@dataclass(frozen=True)
class LoraNames:
    """The tensors of a LoRA file by layer.

    Attributes:
        layers: For each layer of the UNet, by diffusers' name, the stored name of each role's tensor.
        unmatched: Layers of the LoRA that the UNet does not have, by their name in the file.
        text_encoder: Stored names of tensors for the text encoder.
        unknown: Stored names of tensors whose role is not known.
    """

    layers: dict[str, dict[str, str]]
    unmatched: tuple[str, ...]
    text_encoder: tuple[str, ...]
    unknown: tuple[str, ...]


def read_names(
    path: Path, names: Collection[str], unet_layers: Iterable[str], layers_per_block: int | list[int]
) -> LoraNames:
    """Assign the tensors in a LoRA file to layers of a UNet.

    Args:
        path: The file, for messages.
        names: Stored names of its tensors.
        unet_layers: diffusers' names of the UNet's layers that have parameters.
        layers_per_block: As in the UNet's configuration.

    Raises:
        CheckpointError: The file is not a LoRA, or contains an adaptation of an unsupported kind, several
            adapters, or an adaptation of the text encoder only.
    """
    _check_supported(path, names)
    known = {layer.replace(".", "_"): layer for layer in unet_layers}
    layers: dict[str, dict[str, str]] = {}
    unmatched: dict[str, None] = {}
    text_encoder, unknown = [], []
    for name in names:
        stripped = _strip_prefixes(name)
        layer, role = _split(stripped)
        if name.startswith(_TEXT_ENCODERS) or stripped.startswith(_TEXT_ENCODERS):
            text_encoder.append(name)
        elif role is None:
            unknown.append(name)
        elif (found := _find(layer, known, layers_per_block)) is None:
            unmatched[_split(name)[0]] = None
        elif role in layers.setdefault(found, {}):
            raise CheckpointError(
                f"{path} contains several adapters: layer '{found}' has both '{layers[found][role]}' and "
                f"'{name}'; save each adapter to a file of its own"
            )
        else:
            layers[found][role] = name
    if all(_split(name)[1] in _ROLES_OF_MODELS for name in names):
        raise CheckpointError(
            f"{path} is not a LoRA: none of its {len(names)} tensors has a name such as lora_down, lora_A, "
            "hada_w1_a, lokr_w1 or diff"
        )
    if text_encoder and not layers and not unmatched:
        raise CheckpointError(
            f"{path} adapts the text encoder only ({len(text_encoder)} tensors, first '{text_encoder[0]}'); "
            "nothing can be fused into the UNet: apply it to the text encoder of your pipeline"
        )
    return LoraNames(layers, tuple(unmatched), tuple(text_encoder), tuple(unknown))


def _check_supported(path: Path, names: Iterable[str]) -> None:
    for name in names:
        for pattern, kind in _UNSUPPORTED:
            if pattern.search(name):
                raise CheckpointError(
                    f"{path} contains {kind} ('{name}'), which is not supported; merge it into the model "
                    "with the tools of its trainer"
                )


def _strip_prefixes(name: str) -> str:
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def _split(name: str) -> tuple[str, str | None]:
    """Name of the layer and role of a tensor; the role is None if it is unknown."""
    for pattern, role in _ROLES:
        match = pattern.search(name)
        if match is not None:
            return name[: match.start()], match.expand(role)
    return name, None


def _find(layer: str, known: Mapping[str, str], layers_per_block: int | list[int]) -> str | None:
    """diffusers' name of a layer that is named in any scheme, or None."""
    # Before PEFT, diffusers named LoRA layers after attention processors, with `to_out` for `to_out.0`. PEFT
    # calls an adapted layer `base_layer`.
    plain = layer.replace(".processor.", ".").removesuffix(".base_layer").replace(".", "_")
    name = _diffusers_name(plain, layers_per_block)
    candidates = (name, re.sub("to_out$", "to_out_0", name), name.replace("add_embedding", "class_embedding"))
    return next((known[candidate] for candidate in candidates if candidate in known), None)


def _diffusers_name(name: str, layers_per_block: int | list[int]) -> str:
    """diffusers' name of a layer, with underscores, from diffusers' or the original name.

    diffusers' own converter is not used: it mistakes block 10 for block 1 and thus only supports SDXL.
    """
    if name in _ORIGINAL_OUTSIDE:
        return _ORIGINAL_OUTSIDE[name]
    middle = _MIDDLE.match(name)
    if middle is not None:
        kind, number = (("resnets", 0), ("attentions", 0), ("resnets", 1))[int(middle[1])]
        return f"mid_block_{kind}_{number}_{_diffusers_part(middle[2])}"
    block = _BLOCK.match(name)
    if block is None or not isinstance(layers_per_block, int):
        return name
    direction = "down" if block[1] == "input" else "up"
    # Input block 0 is conv_in, and each level has a block for each layer and one that downsamples.
    number = int(block[2]) - (1 if direction == "down" else 0)
    level, position = divmod(number, layers_per_block + 1)
    prefix = f"{direction}_blocks_{level}"
    if block[4] in ("op", "conv"):
        return f"{prefix}_{direction}samplers_0_conv"
    return f"{prefix}_{'resnets' if block[3] == '0' else 'attentions'}_{position}_{_diffusers_part(block[4])}"


def _diffusers_part(part: str) -> str:
    return _ORIGINAL_PARTS.get(part, part)
