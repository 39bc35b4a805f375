"""The sizes that an artefact is made for, from what was asked for."""

from collections.abc import Mapping
from typing import Any

from sws_export.errors import OptionError
from sws_export.options.options import ExportOptions
from sws_export.tensors import SIZE_AXES, Range, Sizes, TensorSpec, latent_range, parse_range, resolve_sizes

# Batch of one prompt with and without its negative; CLIP's text length.
_DEFAULT_BATCH = "1:2:2"
_DEFAULT_TOKENS = "77"


def engine_sizes(
    options: ExportOptions, config: Mapping[str, Any] | None, multiple: int, vae_scale: int | None
) -> Sizes:
    """The sizes that the engine is built for, in units of the latent.

    Args:
        options: Sizes as given.
        config: The UNet's configuration, for the size it was trained on; None where it is not known.
        multiple: What height and width of the latent must be multiples of.
        vae_scale: What the checkpoint says.

    Raises:
        OptionError: A size is malformed, not a multiple of what the UNet needs, or must be given.
    """
    scale = _pixels_a_latent(options, vae_scale)
    trained = config.get("sample_size") if config else None
    sides = trained if isinstance(trained, (list, tuple)) else (trained, trained)
    return resolve_sizes(
        batch=options.batch or _DEFAULT_BATCH,
        height=options.height or _trained_pixels("--height", sides[0], scale),
        width=options.width or _trained_pixels("--width", sides[1], scale),
        tokens=options.tokens or _DEFAULT_TOKENS,
        vae_scale=scale,
        multiple=multiple,
    )


def _trained_pixels(option: str, side: int | None, scale: int) -> str:
    if side is None:
        raise OptionError(f"the model does not say what size it was trained on; add {option} MIN:OPT:MAX")
    return str(side * scale)


def graph_sizes(options: ExportOptions, multiple: int, vae_scale: int | None) -> dict[str, int]:
    """The sizes that an ONNX graph is fixed to, in units of the latent; the others stay open.

    Args:
        options: Sizes as given.
        multiple: What height and width of the latent must be multiples of.
        vae_scale: What the checkpoint says.

    Raises:
        OptionError: A size is malformed or a range, or not a multiple of what the UNet needs.
    """
    fixed = {}
    for name in SIZE_AXES:
        text, option = getattr(options, name), f"--{name}"
        if text is None:
            continue
        if name in ("height", "width"):
            size = latent_range(text, option, _pixels_a_latent(options, vae_scale), multiple)
        else:
            size = parse_range(text, option)
        if size.minimum != size.maximum:
            raise OptionError(
                f"{option} {text}: an ONNX graph takes one size or any; give one number, or leave it out"
            )
        fixed[name] = size.minimum
    return fixed


def _pixels_a_latent(options: ExportOptions, vae_scale: int | None) -> int:
    scale = options.vae_scale or vae_scale
    if scale is None:
        raise OptionError(
            "how many pixels a latent value covers is not known for this model; "
            "add --vae-scale 8 (Stable Diffusion) or --vae-scale 1 (pixel space)"
        )
    return scale


def check_static_dimensions(inputs: tuple[TensorSpec, ...], asked: Mapping[str, Range]) -> None:
    """Refuse sizes that contradict a dimension which the graph fixes.

    Raises:
        OptionError: Names the dimension, the size of the graph and the size asked for.
    """
    by_name = {spec.name: spec for spec in inputs}
    for name, size in asked.items():
        input_name, axis = SIZE_AXES[name]
        dimension = by_name[input_name].shape[axis]
        if isinstance(dimension, int) and size != Range(dimension, dimension, dimension):
            raise OptionError(
                f"the graph has a fixed {name} of {dimension}; found {size} in the profile. "
                "Export the UNet with dynamic sizes or ask for this one"
            )
