"""Schemas of the JSON documents of checkpoints, with bounds on counts and sizes.

The bounds are several times what published models have. They are checked before a model is built from a
configuration, which would otherwise take minutes or all memory.
"""

from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from sws_export.documents import FileName

Channels = Annotated[int, Meta(ge=1, le=2**16)]
Count = Annotated[int, Meta(ge=0, le=2**16)]
Layers = Annotated[int, Meta(ge=1, le=64)]
LevelCount = Meta(min_length=1, max_length=16)
LevelLayers = Annotated[list[Layers], Meta(min_length=1, max_length=64)]
Blocks = Annotated[list[str], LevelCount]
Positive = Annotated[float, Meta(gt=0)]
Kernel = Annotated[int, Meta(ge=1, le=31)]
Latents = Annotated[list[float], Meta(max_length=1024)]

MAX_TRANSFORMER_LAYERS = 512
"""Transformer layers of a UNet; SDXL has 70."""


class UnetConfig(TypedDict, total=False):
    """Options of diffusers' UNet2DConditionModel."""

    sample_size: Channels | Annotated[list[Channels], Meta(max_length=2)] | None
    in_channels: Channels
    out_channels: Channels
    center_input_sample: bool | None
    flip_sin_to_cos: bool | None
    freq_shift: float
    down_block_types: Blocks
    mid_block_type: str | None
    up_block_types: Blocks
    only_cross_attention: bool | Annotated[list[bool], LevelCount] | None
    block_out_channels: Annotated[list[Channels], LevelCount]
    layers_per_block: Layers | Annotated[list[Layers], LevelCount]
    downsample_padding: Annotated[int, Meta(ge=0, le=16)] | None
    mid_block_scale_factor: float
    dropout: float
    act_fn: str
    norm_num_groups: Channels | None
    norm_eps: Positive
    cross_attention_dim: Channels | Annotated[list[Channels], LevelCount] | None
    transformer_layers_per_block: Layers | Annotated[list[Layers | LevelLayers], LevelCount]
    reverse_transformer_layers_per_block: Annotated[list[Layers | LevelLayers], LevelCount] | None
    encoder_hid_dim: Channels | None
    encoder_hid_dim_type: str | None
    attention_head_dim: Channels | Annotated[list[Channels], LevelCount]
    num_attention_heads: Channels | Annotated[list[Channels], LevelCount] | None
    dual_cross_attention: bool | None
    use_linear_projection: bool | None
    class_embed_type: str | None
    addition_embed_type: str | None
    addition_time_embed_dim: Channels | None
    num_class_embeds: Count | None
    upcast_attention: bool | None
    resnet_time_scale_shift: str
    resnet_skip_time_act: bool | None
    resnet_out_scale_factor: float
    time_embedding_type: str
    time_embedding_dim: Channels | None
    time_embedding_act_fn: str | None
    timestep_post_act: str | None
    time_cond_proj_dim: Channels | None
    conv_in_kernel: Kernel
    conv_out_kernel: Kernel
    projection_class_embeddings_input_dim: Channels | None
    attention_type: str
    class_embeddings_concat: bool | None
    mid_block_only_cross_attention: bool | None
    cross_attention_norm: str | None
    addition_embed_type_num_heads: Channels


class SomeConfig(TypedDict, total=False):
    """What is read of a config.json whose class is not known yet."""

    _class_name: str
    model_type: str


class VaeConfig(TypedDict, total=False):
    """What is read of an AutoencoderKL's config.json."""

    block_out_channels: Annotated[list[Channels], LevelCount]


class SchedulerConfig(TypedDict, total=False):
    """What is read of a scheduler_config.json."""

    _class_name: str
    prediction_type: str | None
    rescale_betas_zero_snr: bool | None
    sigma_data: Positive | None
    sigma_min: Positive | None
    sigma_max: Positive | None


class ModelIndex(TypedDict, total=False):
    """What is read of a model_index.json: class of the pipeline, and library and class of some components."""

    _class_name: str
    transformer: Any
    prior: Any
    decoder: Any


class ShardIndex(TypedDict):
    """A .safetensors.index.json."""

    weight_map: Annotated[dict[str, FileName], Meta(min_length=1, max_length=100_000)]


class PeftEntry(TypedDict, total=False):
    """What is read of PEFT's configuration of an adapter."""

    peft_type: str
    r: Annotated[int, Meta(ge=0, le=2**16)] | None
    lora_alpha: float | None
    alpha: float | None
    rank_pattern: Annotated[dict[str, Annotated[int, Meta(ge=1, le=2**16)]], Meta(max_length=4096)] | None
    alpha_pattern: Annotated[dict[str, float], Meta(max_length=4096)] | None
    use_rslora: bool | None
    feedforward_modules: str | Annotated[list[str], Meta(max_length=4096)] | None
    init_lora_weights: NotRequired[bool | str | None]
    coft: bool | None


class QuantizationMetadata(TypedDict, total=False):
    """ComfyUI's metadata `_quantization_metadata`: the format of each layer, or an object with it."""

    layers: Annotated[dict[str, str | dict[str, Any]], Meta(max_length=100_000)]
