"""Sigma-Weighted Shuffle in the torch UNet, for tuning the intensity before an export."""

from typing import Any

from comfy.patcher_extension import CallbacksMP, WrappersMP

from sws_export.adapters.live import LiveShuffle, self_attention

from .load import INTENSITY
from .patcher import SwsModelPatcher

_KEY = "sws_live"


class SigmaWeightedShuffle:
    """Patches the self-attention of a UNet MODEL."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches"
    DESCRIPTION = (
        "Sigma-Weighted Shuffle at the self-attention of a UNet in torch: what 'Convert to SWS engine' and "
        "sws-export put into an engine. The intensity can be changed without an export."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (ComfyUI's name)
        """The node's inputs."""
        tooltip = "A UNet in torch: SD 1, SD 2, SDXL and models derived from them."
        return {"required": {"model": ("MODEL", {"tooltip": tooltip}), "intensity": INTENSITY}}

    def patch(self, model: Any, intensity: float) -> tuple[Any]:
        """The MODEL with patches."""
        if isinstance(model, SwsModelPatcher):
            raise ValueError(
                "Sigma-Weighted Shuffle (live): the MODEL is an engine, which contains SWS; use 'Set SWS "
                "intensity'"
            )
        unet = model.model.diffusion_model
        if not hasattr(unet, "output_blocks"):
            raise ValueError(
                f"Sigma-Weighted Shuffle (live): {type(unet).__name__} is not a UNet; connect an SD 1, SD 2 "
                "or SDXL model"
            )
        patched, shuffle = model.clone(), LiveShuffle(intensity)
        patched.add_callback_with_key(CallbacksMP.ON_PRE_RUN, _KEY, lambda _: shuffle.clear())
        patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, _KEY, lambda _: shuffle.clear())
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, shuffle.call_unet)
        blocks = [("middle", 0)]
        blocks += [("input", number) for number in range(len(unet.input_blocks))]
        blocks += [("output", number) for number in range(len(unet.output_blocks))]
        for block in blocks:
            patched.set_model_attn1_replace(self_attention, *block)
        return (patched,)
