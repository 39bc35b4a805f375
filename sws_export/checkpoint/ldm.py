"""Converts names of the original (LDM, "single file") layout to diffusers' names.

Only names differ between the layouts; each tensor has the same shape and values in both.
"""

from collections.abc import Iterable
from typing import Any

from sws_export.errors import CheckpointError

PREFIX = "model.diffusion_model."

# Omitted by diffusers' converter: LCM's guidance embedding.
_OMITTED_BY_DIFFUSERS = {"time_embed.cond_proj.weight": "time_embedding.cond_proj.weight"}


def diffusers_names(names: Iterable[str], config: dict[str, Any]) -> dict[str, str]:
    """A mapping from diffusers' parameter names to the stored names without prefix.

    Stored names that do not belong to the UNet of `config` are omitted.

    Raises:
        CheckpointError: A required tensor is missing, or the levels have different numbers of layers.
    """
    if not isinstance(config["layers_per_block"], int):
        raise CheckpointError(
            "the original (LDM) layout with a different number of layers on each level "
            f"({config['layers_per_block']}) cannot be converted; convert the model with diffusers first"
        )
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    # The converter only moves values, so the names are passed as values.
    prefixed = {PREFIX + name: name for name in names}
    try:
        converted: dict[str, str | None] = convert_ldm_unet_checkpoint(prefixed, config)
    except KeyError as error:
        raise CheckpointError(
            f"the checkpoint lacks tensor '{error.args[0]}', which its UNet needs"
        ) from error
    result = {name: ldm for name, ldm in converted.items() if ldm is not None}
    result.update({name: ldm for ldm, name in _OMITTED_BY_DIFFUSERS.items() if PREFIX + ldm in prefixed})
    return result
