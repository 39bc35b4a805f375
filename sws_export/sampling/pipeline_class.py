"""The pipeline class of a directory: one of diffusers, or one from the directory's own code."""

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
    """The class named in `model_index.json`.

    Args:
        pipeline: A pipeline directory.
        trust_code: Import `pipeline.py` of the directory if diffusers does not have the class.

    Raises:
        CheckpointError: The directory is not a pipeline, or the class does not exist.
        OptionError: The class is in `pipeline.py`, which is not trusted.
    """
    import diffusers

    index = pipeline / "model_index.json"
    if not index.is_file():
        raise CheckpointError(
            f"{pipeline} is not a diffusers pipeline: model_index.json is missing; give the directory that "
            "contains text_encoder, vae and scheduler beside the UNet"
        )
    try:
        name = json.loads(index.read_text("utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} does not name the class of the pipeline: {error!r}") from error
    known = getattr(diffusers, str(name), None)
    if known is not None:
        # Without it diffusers raises an ImportError that does not name the extra.
        importlib.import_module("transformers")
        return known
    if not (pipeline / CODE).is_file():
        raise CheckpointError(f"{index}: diffusers {diffusers.__version__} has no pipeline {name}")
    if not trust_code:
        raise OptionError(
            f"{pipeline} is a {name}, which is defined in its {CODE}; add --trust-code to run this code if "
            "you trust its origin"
        )
    return getattr(_import(pipeline), str(name))


def _import(pipeline: Path) -> ModuleType:
    """Import `pipeline.py` as a module of a package, so that it can import its neighbours."""
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(pipeline.resolve())]
    for module in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
        del sys.modules[module]
    sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.{Path(CODE).stem}")
