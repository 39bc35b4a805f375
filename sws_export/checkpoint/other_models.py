"""Recognizes, from tensor names, models that are not a plain UNet2DConditionModel."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Kind:
    """A kind of model, recognized by substrings of its tensor names.

    Attributes:
        what: Description for messages, such as "a VAE".
        any_of: At least one of these substrings occurs, if there are any.
        all_of: Each of these substrings occurs.
    """

    what: str
    any_of: tuple[str, ...] = ()
    all_of: tuple[str, ...] = ()

    def matches(self, occurs: Callable[[str], bool]) -> bool:
        if not all(occurs(part) for part in self.all_of):
            return False
        return not self.any_of or any(occurs(part) for part in self.any_of)


_LORA = _Kind(
    "a LoRA, which only holds changes to a model; pass the model as MODEL and this file with --lora",
    any_of=(
        ".lora_up.",
        ".lora_down.",
        ".lora_A.",
        ".lora_B.",
        ".lora.up.",
        ".lora.down.",
        "_lora.up.",
        "_lora.down.",
        ".hada_w1",
        ".lokr_w",
        ".oft_blocks",
    ),
)

_UNFUSED = _Kind(
    "a UNet with a LoRA that is loaded but not fused; call fuse_lora() and unload_lora_weights() before "
    "save_pretrained(), or export the model without the LoRA and pass the LoRA with --lora",
    any_of=(".base_layer.",),
)

# Models that do not contain a UNet. The first match is reported.
_OTHER_MODELS = (
    _UNFUSED,
    _LORA,
    _Kind("an IP-Adapter", all_of=("image_proj.", "ip_adapter.")),
    _Kind("a ControlNet", any_of=("control_model.", "controlnet_cond_embedding.", "lora_controlnet")),
    _Kind("a T2I-Adapter", any_of=("adapter.body.", "body.0.block1.")),
    _Kind("AnimateDiff motion modules", any_of=("motion_modules.",)),
    _Kind(
        "a Flux transformer", any_of=("double_blocks.0.img_attn.", "single_transformer_blocks.0.proj_mlp.")
    ),
    _Kind("an SD3 transformer", any_of=("joint_blocks.0.x_block.",)),
    _Kind("an SD3 transformer", all_of=("transformer_blocks.0.attn.add_q_proj.", "pos_embed.proj.")),
    _Kind("an AuraFlow transformer", any_of=("double_layers.0.attn.", "joint_transformer_blocks.0.")),
    _Kind("a PixArt transformer", all_of=("adaln_single.", "caption_projection.")),
    _Kind("a Stable Cascade model", any_of=("clip_txt_mapper.", "clip_mapper.", ".channelwise.")),
    _Kind("a diffusion transformer", any_of=("transformer_blocks.0.", "x_embedder.", "patch_embedding.")),
    _Kind(
        "a VAE",
        any_of=(
            "encoder.down.0.",
            "decoder.up.0.",
            "encoder.down_blocks.0.",
            "decoder.up_blocks.0.",
            "decoder.layers.",
        ),
    ),
    _Kind(
        "a text or image encoder",
        any_of=(
            "text_model.",
            "vision_model.",
            "transformer.resblocks.0.",
            "visual.transformer.",
            "encoder.block.0.layer.0.SelfAttention.",
            "cond_stage_model.",
            "conditioner.embedders.",
            "token_embedding.weight",
        ),
    ),
    _Kind("a textual inversion", any_of=("emb_params", "clip_l", "clip_g")),
)

# Models that have all the tensors of a UNet and additional ones.
_EXTENDED_UNETS = (
    _UNFUSED,
    _Kind(
        "a ControlNet",
        any_of=(
            "controlnet_cond_embedding.",
            "controlnet_down_blocks.",
            "input_hint_block.",
            "zero_convs.0.",
        ),
    ),
    _Kind("a video UNet with motion modules", any_of=("motion_modules.",)),
    _Kind(
        "a video UNet",
        any_of=(
            ".time_stack.",
            ".temporal_transformer_blocks.",
            ".temp_attentions.",
            ".temp_convs.",
            ".time_mixer.",
        ),
    ),
    _Kind(
        "a UNet quantized with bitsandbytes, which is not supported; use its fp16 version",
        any_of=(
            ".absmax",
            ".quant_map",
            ".quant_state.",
            "bitsandbytes__",
        ),
    ),
)

# Parts of a UNet2DConditionModel that are not determined by tensor shapes.
_PARTS_THAT_NEED_CONFIG = (
    ("encoder_hid_proj.", "projected text embeddings"),
    (".add_k_proj.", "attention with added keys (DeepFloyd IF, Kandinsky)"),
    ("position_net.", "GLIGEN"),
    (".fuser.", "GLIGEN"),
)


def recognize_other_model(names: Collection[str]) -> str | None:
    """The kind of model ("a VAE", ...) in a file without a UNet, or None if it is unknown."""
    return _first_match(_OTHER_MODELS, names)


def recognize_extended_unet(names: Collection[str]) -> str | None:
    """The kind of model that extends a UNet ("a ControlNet", ...), or None for a UNet2DConditionModel."""
    return _first_match(_EXTENDED_UNETS, names)


def part_that_needs_config(names: Collection[str]) -> str | None:
    """A part of the UNet whose options cannot be inferred from tensor shapes, or None."""
    return next((what for part, what in _PARTS_THAT_NEED_CONFIG if _occurs(part, names)), None)


def _first_match(kinds: Iterable[_Kind], names: Collection[str]) -> str | None:
    return next((kind.what for kind in kinds if kind.matches(lambda part: _occurs(part, names))), None)


def _occurs(part: str, names: Collection[str]) -> bool:
    return any(part in name for name in names)
