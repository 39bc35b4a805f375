"""Recognises, from tensor names, the models that are given by mistake for a UNet."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Kind:
    """A kind of model and the pieces of names of which one (`any_of`) or each (`all_of`) occurs in it."""

    what: str
    any_of: tuple[str, ...] = ()
    all_of: tuple[str, ...] = ()

    def matches(self, occurs: Callable[[str], bool]) -> bool:
        if self.all_of and not all(occurs(piece) for piece in self.all_of):
            return False
        return not self.any_of or any(occurs(piece) for piece in self.any_of)


_LORA = (
    "a LoRA, which changes a model and is none; name the model it belongs to, and this file with --lora",
    (
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

# Files that hold no UNet at all. The first match counts.
_OTHER_MODELS = (
    _Kind(*_LORA),
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

# Models that have all the names of a UNet, and more.
_LOOKALIKES = (
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
)
_QUANTISED = _Kind(
    "a quantised UNet, whose weights need scales that diffusers' UNet does not take; use the fp16 model",
    any_of=(
        "scaled_fp8",
        ".scale_weight",
        ".weight_scale",
        ".absmax",
        ".quant_map",
        ".quant_state.",
        "bitsandbytes__",
    ),
)

# Parts of a UNet2DConditionModel that the shapes do not tell enough about.
_NEEDS_CONFIG = (
    ("encoder_hid_proj.", "projected text embeddings"),
    (".add_k_proj.", "attention with added keys (DeepFloyd IF, Kandinsky)"),
    ("position_net.", "GLIGEN"),
    (".fuser.", "GLIGEN"),
)


def name_other_model(names: Collection[str]) -> str | None:
    """What a file without a UNet holds ("a VAE", ...), or None if it is not recognised."""
    return _first_match(_OTHER_MODELS, names)


def name_lookalike(names: Collection[str]) -> str | None:
    """What a UNet's names belong to if not to a plain UNet2DConditionModel, or None."""
    return _first_match((*_LOOKALIKES, _QUANTISED), names)


def name_untellable(names: Collection[str]) -> str | None:
    """A part of the UNet for which its configuration is needed, or None."""
    return next((what for piece, what in _NEEDS_CONFIG if _occurs(piece, names)), None)


def _first_match(kinds: Iterable[_Kind], names: Collection[str]) -> str | None:
    return next((kind.what for kind in kinds if kind.matches(lambda piece: _occurs(piece, names))), None)


def _occurs(piece: str, names: Collection[str]) -> bool:
    return any(piece in name for name in names)
