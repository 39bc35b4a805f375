"""The table of known architectures: tensor shapes, and the options that shapes do not determine."""

from dataclasses import dataclass, replace
from typing import Any

from sws_export.checkpoint.config import complete
from sws_export.checkpoint.structure import Depths, Structure, structure_config

SDXL_TIME_IDS = 256
"""SDXL and models derived from it embed each number of time_ids in this width."""

_POOLED = 1280
_SDXL_ADDITION, _REFINER_ADDITION = _POOLED + 6 * SDXL_TIME_IDS, _POOLED + 5 * SDXL_TIME_IDS

SDXL_ADDITIONS = (_SDXL_ADDITION, _REFINER_ADDITION)
"""Widths of the added conditions of SDXL and its refiner: text_embeds, and six or five embedded time_ids."""


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: Name in the log and the manifest.
        structure: The structure by which the family is recognized.
        heads: Number of attention heads of each level (diffusers' `attention_head_dim`, misnamed there).
        sample_size: Height and width of the latents that the model was trained on.
        upcast: Whether attention must run in float32 (diffusers' `upcast_attention`).
        vae_scale: Pixels for each latent element along height and width.
    """

    name: str
    structure: Structure
    heads: tuple[int, ...]
    sample_size: int = 64
    upcast: bool = False
    vae_scale: int = 8

    def config(self) -> dict[str, Any]:
        """The complete configuration."""
        return complete(
            structure_config(self.structure)
            | {
                "attention_head_dim": list(self.heads),
                "sample_size": self.sample_size,
                "upcast_attention": self.upcast,
                "addition_time_embed_dim": SDXL_TIME_IDS if self.structure.addition is not None else None,
            }
        )


def _trunk(channels: tuple[int, ...], depths: tuple[int, ...], layers: int, mid: Depths | None) -> Structure:
    """A regular UNet; `depths` is the transformer depth of each level, 0 for a level without attention."""
    return Structure(
        in_channels=4,
        out_channels=4,
        channels=channels,
        down=tuple((depth,) * layers for depth in depths),
        mid=mid,
        up=tuple((depth,) * (layers + 1) for depth in reversed(depths)),
        context=768,
        linear=False,
        cross_only=(False,) * len(channels),
    )


_FOUR = (320, 640, 1280, 1280)
_THREE = (320, 640, 1280)

_SD1 = _trunk(_FOUR, (1, 1, 1, 0), layers=2, mid=(1,))
_SD1_HEADS = (8, 8, 8, 8)
_SD2 = replace(_SD1, context=1024, linear=True)
_SD2_HEADS = (5, 10, 20, 20)
_SDXL = replace(
    _trunk(_THREE, (0, 2, 10), layers=2, mid=(10,)), context=2048, linear=True, addition=_SDXL_ADDITION
)
_SDXL_HEADS = (5, 10, 20)
_REFINER = replace(
    _trunk((384, 768, 1536, 1536), (0, 4, 4, 0), layers=2, mid=(4,)),
    context=1280,
    linear=True,
    addition=_REFINER_ADDITION,
)
_SSD_1B = replace(
    _SDXL,
    down=((0, 0), (2, 2), (4, 4)),
    mid=(),
    up=((4, 4, 10), (2, 1, 1), (0, 0, 0)),
)
_VEGA = replace(
    _trunk(_THREE, (0, 1, 2), layers=2, mid=()), context=2048, linear=True, addition=_SDXL_ADDITION
)
_KOALA_700M = replace(
    _trunk(_THREE, (0, 2, 5), layers=1, mid=None), context=2048, linear=True, addition=_SDXL_ADDITION
)
_KOALA_1B = replace(
    _trunk(_THREE, (0, 2, 6), layers=1, mid=(6,)), context=2048, linear=True, addition=_SDXL_ADDITION
)

# Distilled, with fewer layers: https://github.com/Nota-NetsPresso/BK-SDM and https://github.com/segmind/distill-sd.
_BK_BASE = _trunk(_FOUR, (1, 1, 1, 0), layers=1, mid=(1,))
_BK_SMALL = replace(_BK_BASE, mid=None)
_BK_TINY = _trunk(_THREE, (1, 1, 1), layers=1, mid=None)
_BK_HEADS = (8, 8, 8)

FAMILIES: tuple[Family, ...] = (
    Family("SD 1.x", _SD1, _SD1_HEADS),
    Family("SD 1.x inpainting", replace(_SD1, in_channels=9), _SD1_HEADS),
    Family("SD 1.x instruct-pix2pix", replace(_SD1, in_channels=8), _SD1_HEADS),
    Family("SD 1.x LCM", replace(_SD1, time_cond=256), _SD1_HEADS),
    # 2.0, 2.1 and their 512 and 768 pixel versions have the same shapes. 2.1 overflows in fp16 attention.
    Family("SD 2.x", _SD2, _SD2_HEADS, 96, upcast=True),
    Family("SD 2.x inpainting", replace(_SD2, in_channels=9), _SD2_HEADS),
    Family("SD 2.x depth", replace(_SD2, in_channels=5), _SD2_HEADS),
    Family("SD 2.1 unCLIP (ViT-H)", replace(_SD2, class_projection=2048), _SD2_HEADS, 96, upcast=True),
    Family("SD 2.1 unCLIP (ViT-L)", replace(_SD2, class_projection=1536), _SD2_HEADS, 96, upcast=True),
    Family("SDXL base", _SDXL, _SDXL_HEADS, 128),
    Family("SDXL inpainting", replace(_SDXL, in_channels=9), _SDXL_HEADS, 128),
    Family("SDXL instruct-pix2pix", replace(_SDXL, in_channels=8), _SDXL_HEADS, 128),
    Family("SDXL LCM", replace(_SDXL, time_cond=256), _SDXL_HEADS, 128),
    Family("SDXL refiner", _REFINER, (6, 12, 24, 24), 128),
    Family("SSD-1B", _SSD_1B, _SDXL_HEADS, 128),
    Family("SSD-1B LCM", replace(_SSD_1B, time_cond=256), _SDXL_HEADS, 128),
    Family("Segmind-Vega", _VEGA, _SDXL_HEADS, 128),
    Family("KOALA-700M", _KOALA_700M, _SDXL_HEADS, 128),
    Family("KOALA-1B", _KOALA_1B, _SDXL_HEADS, 128),
    Family("BK-SDM base / small-sd", _BK_BASE, _SD1_HEADS),
    Family("BK-SDM small", _BK_SMALL, _SD1_HEADS),
    Family("BK-SDM tiny / tiny-sd", _BK_TINY, _BK_HEADS),
    Family("BK-SDM-v2 base", replace(_BK_BASE, context=1024, linear=True), _SD2_HEADS, upcast=True),
    Family("BK-SDM-v2 small", replace(_BK_SMALL, context=1024, linear=True), _SD2_HEADS, upcast=True),
    Family("BK-SDM-v2 tiny", replace(_BK_TINY, context=1024, linear=True), _SDXL_HEADS, upcast=True),
)


def find_family(structure: Structure) -> Family | None:
    """The family with exactly this structure, or None."""
    return next((family for family in FAMILIES if family.structure == structure), None)


def find_family_with_other_inputs(structure: Structure) -> Family | None:
    """The family that differs from `structure` only in input or output channels and conditions, or None."""
    same_inputs = {
        "in_channels": 4,
        "out_channels": 4,
        "time_cond": None,
        "class_projection": None,
        "classes": None,
    }
    trunk = replace(structure, **same_inputs)  # type: ignore[arg-type]
    return find_family(trunk)
