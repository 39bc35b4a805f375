"""Optimization profiles of an engine: which of them accepts a step, and how to build for another size."""

import math
from collections.abc import Mapping, Sequence

from sws_export.errors import StepError
from sws_export.runtime.contract import Contract
from sws_export.runtime.pixels import with_pixels
from sws_export.tensors import SIZE_AXES, ProfileShapes, Shape, TensorSpec

Shapes = Mapping[str, Shape]
"""Shapes of the inputs of a step by name, without those of states."""


def narrowest_profile(profiles: Sequence[ProfileShapes], shapes: Shapes) -> int | None:
    """Index of the profile that accepts `shapes` and the fewest others; None if none accepts them."""
    fitting = [index for index, profile in enumerate(profiles) if _accepts(profile, shapes)]
    return min(fitting, key=lambda index: _count(profiles[index], shapes), default=None)


def check_profiles(contract: Contract, shapes: Shapes) -> None:
    """Check that the engine accepts the shapes of a step.

    Raises:
        StepError: No profile does; the message has the command that builds an engine for them.
    """
    profiles = contract.profiles
    if not profiles or narrowest_profile(profiles, shapes) is not None:
        return
    if len(profiles) == 1:
        spec, axis = _outside(contract.inputs, profiles[0], shapes)
        smallest, _, largest = profiles[0][spec.name]
        is_side = (spec.name, axis) in (SIZE_AXES["height"], SIZE_AXES["width"])
        found, low, high = (
            with_pixels(contract, shape[axis]) if is_side else str(shape[axis])
            for shape in (shapes[spec.name], smallest, largest)
        )
        reason = (
            f"input {spec.name}: dimension {axis} ({spec.shape[axis]}) is {found}, the engine was built for "
            f"{low} to {high}; use a size in this range, or"
        )
    else:
        sizes = ", ".join(f"{name} {size}" for name, size in _sizes_of(shapes).items())
        built = "; ".join(_sizes_text(profile) for profile in profiles)
        reason = f"the step has {sizes}, and none of the profiles of the engine accepts that: {built};"
    raise StepError(
        f"{reason} build it again with: {_rebuild_command(contract, shapes)}, and the other options as before"
    )


def _accepts(profile: ProfileShapes, shapes: Shapes) -> bool:
    return all(
        low <= size <= high
        for name, shape in shapes.items()
        for low, size, high in zip(profile[name][0], shape, profile[name][2], strict=True)
    )


def _count(profile: ProfileShapes, shapes: Shapes) -> int:
    """Number of shapes that the profile accepts."""
    return math.prod(
        high - low + 1
        for name in shapes
        for low, high in zip(profile[name][0], profile[name][2], strict=True)
    )


def _outside(inputs: Sequence[TensorSpec], profile: ProfileShapes, shapes: Shapes) -> tuple[TensorSpec, int]:
    """The first input and dimension that the profile does not accept."""
    for spec in inputs:
        smallest, _, largest = profile[spec.name]
        for axis, size in enumerate(shapes[spec.name]):
            if not smallest[axis] <= size <= largest[axis]:
                return spec, axis
    raise AssertionError("the profile accepts these shapes")


def _sizes_of(shapes: Shapes) -> dict[str, int]:
    """Batch, height and width (latent) and tokens, those of them that the inputs have."""
    return {name: shapes[tensor][axis] for name, (tensor, axis) in SIZE_AXES.items() if tensor in shapes}


def _ranges(profile: ProfileShapes) -> dict[str, tuple[int, int, int]]:
    """Minimum, optimum and maximum of each size."""
    smallest, optimal, largest = (
        _sizes_of({name: shapes[place] for name, shapes in profile.items()}) for place in range(3)
    )
    return {name: (smallest[name], optimal[name], largest[name]) for name in smallest}


def _sizes_text(profile: ProfileShapes) -> str:
    return ", ".join(
        f"{name} {low}" if low == high else f"{name} {low} to {high}"
        for name, (low, _, high) in _ranges(profile).items()
    )


def _rebuild_command(contract: Contract, shapes: Shapes) -> str:
    """The export command of an engine that also accepts `shapes`.

    A single profile is extended to include them. To several profiles one more is added.
    """
    source = contract.manifest["source"]
    pixels = source.get("vae_scale") or 1
    wanted = _sizes_of(shapes)

    def text(name: str, low: int, best: int, high: int) -> str:
        scale = pixels if name in ("height", "width") else 1
        return f"{low * scale}:{best * scale}:{high * scale}" if low != high else str(low * scale)

    if len(contract.profiles) == 1:
        options = [
            f"--{name} {text(name, min(low, wanted[name]), best, max(high, wanted[name]))}"
            for name, (low, best, high) in _ranges(contract.profiles[0]).items()
        ]
    else:
        profiles = [_ranges(profile) for profile in contract.profiles]
        profiles.append({name: (size, size, size) for name, size in wanted.items()})
        options = [
            "--profile " + ",".join(f"{name}={text(name, *sizes)}" for name, sizes in profile.items())
            for profile in profiles
        ]
    return f"sws-export {source['file']} --out {contract.path.name} {' '.join(options)}"
