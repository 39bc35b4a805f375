"""IP-Adapters in a UNet: read from the names of its tensors, and built into diffusers' module.

diffusers saves a UNet with loaded IP-Adapters with their tensors, but does not record them in its
config.json, and cannot load it again. The configuration here has a further entry `ip_adapters`.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sws_export.checkpoint.header import StoredTensor
from sws_export.errors import CheckpointError, first_items

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

IP_ADAPTER = "ip_image_proj"
"""`encoder_hid_dim_type` of a UNet with IP-Adapters."""
_ENTRY = "ip_adapters"
_TENSORS = {"image_embeds.weight", "image_embeds.bias", "norm.weight", "norm.bias"}
_LAYER = re.compile(r"encoder_hid_proj\.image_projection_layers\.(\d+)\.(.+)")


def with_ip_adapters(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """`config` with the IP-Adapters whose tensors are in `stored`, if there are any.

    Each entry has `width`, that of the image embedding, and `tokens`, the number of tokens made from it.

    Raises:
        CheckpointError: An IP-Adapter is of another kind than the one with a single linear projection, or
            the configuration names one whose tensors are missing.
    """
    layers: dict[int, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        if match := _LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
    if not layers:
        if config.get("encoder_hid_dim_type") == IP_ADAPTER:
            raise CheckpointError(
                f"the configuration has encoder_hid_dim_type = {IP_ADAPTER!r}, and the checkpoint has no "
                "tensors of an IP-Adapter; save the UNet again with it loaded, or remove the entry"
            )
        return dict(config)
    adapters = []
    for number in sorted(layers):
        weight = layers[number].get("image_embeds.weight")
        if weight is None or len(weight.shape) != 2 or set(layers[number]) - _TENSORS:
            raise CheckpointError(
                f"IP-Adapter {number} of the checkpoint has the tensors "
                f"{first_items(sorted(layers[number]))}; "
                "expected one linear projection (image_embeds) and a norm, as in ip-adapter_sd15 and "
                "ip-adapter_sdxl; the kinds Plus, Full Face and FaceID are not supported"
            )
        width = layers[number]["norm.weight"].shape[0]
        adapters.append({"width": weight.shape[1], "tokens": weight.shape[0] // width})
    return {**config, "encoder_hid_dim_type": IP_ADAPTER, _ENTRY: adapters}


def ip_adapters(config: Mapping[str, Any]) -> list[dict[str, int]]:
    """The IP-Adapters of a UNet with this configuration, see `with_ip_adapters`."""
    return list(config.get(_ENTRY) or ())


def image_inputs(config: Mapping[str, Any]) -> dict[str, int]:
    """Width of each input with an image embedding, by name: `image_embeds`, or one for each IP-Adapter."""
    adapters = ip_adapters(config)
    if len(adapters) == 1:
        return {"image_embeds": adapters[0]["width"]}
    return {f"image_embeds_{number}": adapter["width"] for number, adapter in enumerate(adapters)}


def unet_from_config(config: Mapping[str, Any]) -> "UNet2DConditionModel":
    """The UNet that a configuration describes, with its IP-Adapters at scale 1."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    adapters = ip_adapters(config)
    plain = {name: value for name, value in config.items() if name != _ENTRY}
    if not adapters:
        return UNet2DConditionModel.from_config(plain)
    unet = UNet2DConditionModel.from_config(plain | {"encoder_hid_dim_type": None})
    text = unet.config.cross_attention_dim
    width = text if isinstance(text, int) else text[0]
    unet.encoder_hid_proj = MultiIPAdapterImageProjection(
        [ImageProjection(adapter["width"], width, adapter["tokens"]) for adapter in adapters]
    )
    unet.config.encoder_hid_dim_type = IP_ADAPTER
    _set_processors(unet, width, [adapter["tokens"] for adapter in adapters])
    return unet


def _set_processors(unet: "UNet2DConditionModel", width: int, tokens: list[int]) -> None:
    """Give each cross-attention module the processor of IP-Adapters."""
    from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

    for module in unet.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            channels = module.to_q.out_features
            module.set_processor(IPAdapterAttnProcessor2_0(channels, width, num_tokens=tokens))
