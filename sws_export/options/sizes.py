"""Options of the sizes that an artefact is made for."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sws_export.errors import OptionError
from sws_export.tensors import SIZE_AXES, Range, SizeRanges, TensorSpec, latent_range, parse_range

# A batch of one prompt with and without its negative; the text length of CLIP.
_DEFAULT_BATCH = "1:2:2"
_DEFAULT_TOKENS = "77"


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """Sizes as texts: one number for a static size, or MIN:OPT:MAX for an engine.

    Results are cached under what the texts become for a model: `static_sizes` of a graph, and the shapes of
    `engine_profiles` of an engine. `512:512:512` and `512` are the same.

    Attributes:
        batch: None for 1:2:2 in an engine, for a dynamic size in a graph.
        height: Pixels; None for the size the UNet was trained on in an engine, for a dynamic size in a graph.
        width: As `height`.
        tokens: None for 77 in an engine, for a dynamic size in a graph.
        vae_scale: Pixels per latent element in each direction; None for what the checkpoint specifies.
        profiles: Optimization profiles of an engine, such as `batch=2,height=512,width=512`; sizes that one
            does not name are those of the other options. Empty for one profile of the other options.
    """

    batch: str | None = None
    height: str | None = None
    width: str | None = None
    tokens: str | None = None
    vae_scale: int | None = None
    profiles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.vae_scale is not None and self.vae_scale < 1:
            raise OptionError(
                f"--vae-scale {self.vae_scale}: expected 1 or more, such as 8 (Stable Diffusion)"
            )
        for name in SIZE_AXES:
            if (text := getattr(self, name)) is not None:
                parse_range(text, f"--{name}")
        for text in self.profiles:
            with _naming_profile(text):
                self._of_profile(text)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add all arguments of the group."""
        group = parser.add_argument_group(
            "sizes",
            "One number makes a size static, and what depends on it is computed at the export. Engines also "
            "take MIN:OPT:MAX; unspecified sizes of an .onnx stay dynamic. Height and width are in pixels.",
        )
        trained = "default of an engine: the size the UNet was trained on"
        group.add_argument("--batch", metavar="SIZES", help="default of an engine: 1:2:2")
        group.add_argument("--height", metavar="SIZES", help=trained)
        group.add_argument("--width", metavar="SIZES", help=trained)
        group.add_argument("--tokens", metavar="SIZES", help="text tokens; default of an engine: 77")
        group.add_argument(
            "--profile",
            dest="profiles",
            action="append",
            default=[],
            metavar="NAME=SIZES[,…]",
            help="an optimization profile of an engine, as in batch=2,height=512,width=512; repeatable",
        )
        group.add_argument("--vae-scale", type=int, metavar="N", help="pixels per latent element")

    def engine_profiles(
        self, config: Mapping[str, Any] | None, size_multiple: int, vae_scale: int | None
    ) -> tuple[SizeRanges, ...]:
        """The sizes of each optimization profile of an engine; height and width are those of the latent.

        Args:
            config: The UNet's configuration, which has the size it was trained on; None if unknown.
            size_multiple: Height and width of the latent become multiples of it.
            vae_scale: What the checkpoint specifies.

        Raises:
            OptionError: A size is malformed, not a multiple of the pixels of a latent element, or missing; or
                two profiles are the same.
        """
        if not self.profiles:
            return (self._sizes(config, size_multiple, vae_scale),)
        found: list[SizeRanges] = []
        for text in self.profiles:
            with _naming_profile(text):
                sizes = self._of_profile(text)._sizes(config, size_multiple, vae_scale)
            if sizes in found:
                raise OptionError(f"--profile {text}: an earlier profile has the same sizes; leave one out")
            found.append(sizes)
        return tuple(found)

    def _of_profile(self, text: str) -> "SizeOptions":
        """The options with those sizes replaced that a profile names."""
        return dataclasses.replace(self, profiles=(), **_parse_profile(text))

    def _sizes(
        self, config: Mapping[str, Any] | None, size_multiple: int, vae_scale: int | None
    ) -> SizeRanges:
        trained = config.get("sample_size") if config else None
        height, width = trained if isinstance(trained, list | tuple) else (trained, trained)
        return SizeRanges(
            batch=parse_range(self.batch or _DEFAULT_BATCH, "--batch"),
            height=self._side("height", height, size_multiple, vae_scale),
            width=self._side("width", width, size_multiple, vae_scale),
            tokens=parse_range(self.tokens or _DEFAULT_TOKENS, "--tokens"),
        )

    def static_sizes(self, size_multiple: int, vae_scale: int | None) -> dict[str, int]:
        """The sizes that are static in an ONNX graph, in units of the latent; the others stay dynamic.

        Args:
            size_multiple: Height and width of the latent become multiples of it.
            vae_scale: What the checkpoint specifies.

        Raises:
            OptionError: A size is malformed or a range, or not a multiple of the pixels of a latent element.
        """
        if self.profiles:
            raise OptionError(
                f"--profile {self.profiles[0]}: an ONNX graph has no optimization profiles; build an engine "
                "(--out FILE.plan), or give --batch, --height, --width and --tokens"
            )
        sizes = {}
        for name in SIZE_AXES:
            text = getattr(self, name)
            if text is None:
                continue
            if name in ("height", "width"):
                size = self._side(name, None, size_multiple, vae_scale)
            else:
                size = parse_range(text, f"--{name}")
            if size.minimum != size.maximum:
                raise OptionError(
                    f"--{name} {text}: an ONNX graph has one static size or is dynamic; give one "
                    "number, or leave the option out"
                )
            sizes[name] = size.minimum
        return sizes

    def remarks(self, size_multiple: int, vae_scale: int | None) -> list[str]:
        """A line for each size that becomes the next multiple."""
        if self.profiles:
            return [
                f"--profile {text}: {remark}"
                for text in self.profiles
                for remark in self._of_profile(text).remarks(size_multiple, vae_scale)
            ]
        found = []
        for name in ("height", "width"):
            text = getattr(self, name)
            if text is None:
                continue
            asked = parse_range(text, f"--{name}")
            scale = self._pixels_per_latent(vae_scale)
            made = [side * scale for side in self._side(name, None, size_multiple, vae_scale).values()]
            if changed := {old: new for old, new in zip(asked.values(), made, strict=True) if old != new}:
                sizes = ", ".join(f"{new} pixels for {old}" for old, new in changed.items())
                found.append(
                    f"--{name} {text}: the UNet takes multiples of {scale * size_multiple} pixels: made for "
                    f"{sizes}; sws_export.runtime pads smaller images and crops the result"
                )
        return found

    def _side(self, name: str, trained: int | None, size_multiple: int, vae_scale: int | None) -> Range:
        """Height or width of the latent, from the option in pixels or from the size trained on."""
        option, text = f"--{name}", getattr(self, name)
        if text is not None:
            return latent_range(text, option, self._pixels_per_latent(vae_scale), size_multiple)
        if trained is None:
            raise OptionError(
                f"the model does not specify the size it was trained on; add {option} MIN:OPT:MAX"
            )
        return latent_range(str(trained), option, 1, size_multiple)

    def _pixels_per_latent(self, vae_scale: int | None) -> int:
        scale = self.vae_scale or vae_scale
        if scale is None:
            raise OptionError(
                "the number of pixels per latent element is unknown for this model; "
                "add --vae-scale 8 (Stable Diffusion) or --vae-scale 1 (pixel space)"
            )
        return scale


@contextlib.contextmanager
def _naming_profile(text: str) -> Iterator[None]:
    """Name the profile in errors."""
    try:
        yield
    except OptionError as error:
        raise OptionError(f"--profile {text}: {error}") from error


def _parse_profile(text: str) -> dict[str, Any]:
    """The sizes that a profile names, as texts."""
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in SIZE_AXES or not size or name in sizes:
            raise OptionError(
                f"expected each of {', '.join(SIZE_AXES)} at most once, as NAME=SIZES; found {part!r}"
            )
        sizes[name] = size
    return sizes


def check_static_dimensions(
    inputs: tuple[TensorSpec, ...], requested: Mapping[str, Range], vae_scale: int | None = None
) -> None:
    """Reject sizes that contradict a static dimension of the graph.

    Args:
        inputs: Inputs of the graph.
        requested: Sizes by symbol; height and width are those of the latent.
        vae_scale: Pixels per latent element, for the message; None if unknown.

    Raises:
        OptionError: Names the dimension, the size of the graph and the size that was requested.
    """
    by_name = {spec.name: spec for spec in inputs}
    for name, size in requested.items():
        input_name, axis = SIZE_AXES[name]
        dimension = by_name[input_name].shape[axis]
        if not isinstance(dimension, int):
            continue
        static = Range(dimension, dimension, dimension)
        if size != static:
            scale = (vae_scale or 1) if name in ("height", "width") else 1
            expected, found = (_in_pixels(sizes, scale) for sizes in (static, size))
            raise OptionError(
                f"the graph has a static {name} of {expected}, found {found} in the profile; "
                "export the UNet with dynamic sizes, or request this one"
            )


def _in_pixels(size: Range, scale: int) -> str:
    if scale == 1:
        return str(size)
    return f"{size} ({Range(*(side * scale for side in size.values()))} pixels)"
