"""Names of the original (LDM, "single file") layout, and their way to diffusers' names.

Only names are converted: a linear layer is a linear layer in both layouts, and a convolution a convolution.
"""

from collections.abc import Iterable
from typing import Any

from sws_export.errors import CheckpointError

PREFIX = "model.diffusion_model."

# Left out by diffusers' converter: the guidance embedding of LCM, named like its neighbours in time_embed.
_ALSO = {"time_embed.cond_proj.weight": "time_embedding.cond_proj.weight"}


def diffusers_names(names: Iterable[str], config: dict[str, Any]) -> dict[str, str]:
    """Diffusers' parameter name -> the stored name (without prefix) it stands for.

    Stored names that are no part of the UNet of `config` are left out.

    Raises:
        CheckpointError: A name that the conversion needs is missing, or the depth of the blocks is irregular.
    """
    if not isinstance(config["layers_per_block"], int):
        raise CheckpointError(
            "the original (LDM) layout with a different number of layers in each block "
            f"({config['layers_per_block']}) cannot be converted; convert the model with diffusers first"
        )
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    # The converter moves values and never looks into them, so the names themselves can be the values.
    prefixed = {PREFIX + name: name for name in names}
    try:
        converted: dict[str, str | None] = convert_ldm_unet_checkpoint(prefixed, config)
    except KeyError as error:
        raise CheckpointError(
            f"the checkpoint has no tensor '{error.args[0]}', which its UNet needs"
        ) from error
    result = {name: ldm for name, ldm in converted.items() if ldm is not None}
    result.update({name: ldm for ldm, name in _ALSO.items() if PREFIX + ldm in prefixed})
    return result
