"""Inputs of an artefact for Polygraphy, with zero states as at the first step of an image.

    SWS_MANIFEST=unet.onnx.json SWS_SIZES=batch=2,height=64,width=64,tokens=77 \\
        polygraphy run unet.onnx --onnxrt --data-loader-script .../sws_export/adapters/polygraphy_data.py

Polygraphy imports the file under its own name, which therefore cannot be `polygraphy`, and calls `load_data`.
Sizes are those of the latent; the default is the optimum of an engine's first profile.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from sws_export.errors import OptionError
from sws_export.manifest import Manifest, profiles_of, read_manifest, tensor_specs
from sws_export.runtime.inputs import Array, numpy_dtype
from sws_export.tensors import SIZE_AXES, TensorSpec, concrete_shape

_ITERATIONS = 3
_SIGMAS = (10.0, 3.0, 0.5)


def load_data() -> Iterator[dict[str, Array]]:
    """Inputs of a few steps at falling noise levels, by name.

    Raises:
        OptionError: `SWS_MANIFEST` is not the path of a file, or a size is missing in `SWS_SIZES`.
        ManifestError: The file is not a manifest.
    """
    manifest = read_manifest(_manifest_path())
    sizes = _sizes(os.environ.get("SWS_SIZES", ""), manifest)
    specs = tensor_specs(manifest["inputs"])
    states = {state["input"] for state in manifest["states"]}
    random = np.random.default_rng(0)
    for step in range(_ITERATIONS):
        yield {spec.name: _values(spec, spec.name in states, sizes, step, random) for spec in specs}


def _manifest_path() -> Path:
    path = Path(os.environ.get("SWS_MANIFEST", ""))
    if not path.is_file():
        raise OptionError(f"SWS_MANIFEST={path}: no such file; set it to the .json file beside the artefact")
    return path


def _sizes(text: str, manifest: Manifest) -> dict[str, int]:
    sizes: dict[str, int] = {}
    if profiles := profiles_of(manifest):
        sizes = {name: profiles[0][tensor][1][axis] for name, (tensor, axis) in SIZE_AXES.items()}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in SIZE_AXES or not value.isdigit():
            raise OptionError(f"SWS_SIZES: '{part}' is not NAME=NUMBER with a name of {', '.join(SIZE_AXES)}")
        sizes[name] = int(value)
    if missing := [name for name in SIZE_AXES if name not in sizes]:
        raise OptionError(f"SWS_SIZES: {', '.join(missing)} is missing; write {missing[0]}=NUMBER")
    return sizes


def _values(
    spec: TensorSpec, is_state: bool, sizes: Mapping[str, int], step: int, random: np.random.Generator
) -> Array:
    shape, dtype = concrete_shape(spec, sizes), numpy_dtype(spec.dtype)
    if is_state or spec.dtype == "int64":
        return np.zeros(shape, dtype)
    if spec.name == "sigma":
        return np.full(shape, _SIGMAS[step], dtype)
    if spec.name == "timestep":
        return np.full(shape, 900.0 - 300.0 * step, dtype)
    if spec.name == "intensity":
        return np.full(shape, 0.5, dtype)
    return random.standard_normal(shape, np.float32).astype(dtype)
