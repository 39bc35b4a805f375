"""The class of a pipeline directory, where that is one of diffusers' or the directory's own code."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from sws_export.errors import CheckpointError, OptionError

CODE = "pipeline.py"
_PACKAGE = "sws_export_pipeline_code"


def pipeline_class(pipeline: Path, *, trust_code: bool) -> Any:
    """The class that `model_index.json` names.

    Args:
        pipeline: A pipeline directory.
        trust_code: Run `pipeline.py` of the directory, where diffusers does not know the class.

    Raises:
        CheckpointError: The directory is no pipeline, or nobody knows the class.
        OptionError: The class is in `pipeline.py`, which is not trusted.
    """
    import diffusers

    index = pipeline / "model_index.json"
    if not index.is_file():
        raise CheckpointError(
            f"{pipeline} is not a diffusers pipeline: model_index.json is missing; give the directory that "
            "holds text_encoder, vae and scheduler beside the UNet"
        )
    try:
        name = json.loads(index.read_text("utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} does not say the class of the pipeline: {error!r}") from error
    known = getattr(diffusers, str(name), None)
    if known is not None:
        # Without it diffusers raises an ImportError that does not name the extra.
        importlib.import_module("transformers")
        return known
    if not (pipeline / CODE).is_file():
        raise CheckpointError(f"{index}: diffusers {diffusers.__version__} has no pipeline {name}")
    if not trust_code:
        raise OptionError(
            f"{pipeline} is a {name}, which is code in its {CODE}; add --trust-code to run it, if you know "
            "where it comes from"
        )
    return getattr(_import(pipeline), str(name))


def _import(pipeline: Path) -> ModuleType:
    """`pipeline.py` as part of a package, so that it may import what lies beside it."""
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(pipeline.resolve())]
    for module in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
        del sys.modules[module]
    sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.{Path(CODE).stem}")
