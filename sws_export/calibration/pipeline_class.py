"""The pipeline class of a directory: one of diffusers, or one from the directory's own code."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from sws_export.checkpoint.config import read_json
from sws_export.checkpoint.locate import PICKLES
from sws_export.checkpoint.schemas import ModelIndex
from sws_export.documents import short
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
    if not pipeline.is_dir():
        raise CheckpointError(f"{pipeline}: no such directory; give a diffusers pipeline directory")
    if not index.is_file():
        raise CheckpointError(
            f"{pipeline} is not a diffusers pipeline: model_index.json is missing; give the directory that "
            "contains text_encoder, vae and scheduler beside the UNet"
        )
    name = read_json(index, ModelIndex).get("_class_name")
    if name is None:
        raise CheckpointError(f"{index} does not name the class of the pipeline: it has no _class_name")
    known = getattr(diffusers, name, None)
    if known is not None:
        if not (isinstance(known, type) and issubclass(known, diffusers.DiffusionPipeline)):
            raise CheckpointError(f"{index}: {name} of diffusers is not a pipeline")
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
    own = getattr(import_code(pipeline, CODE), name, None)
    if not (isinstance(own, type) and issubclass(own, diffusers.DiffusionPipeline)):
        raise CheckpointError(f"{pipeline / CODE} has no pipeline {name}")
    return own


def check_components(pipeline: Path, *, own_code: bool) -> None:
    """Reject components that diffusers would load from pickles, or whose class is unknown.

    Args:
        pipeline: A pipeline directory; its UNet is not loaded, and not checked.
        own_code: Whether the pipeline's own code is trusted and loads its components.

    Raises:
        CheckpointError: Names the component.
    """
    import diffusers
    import transformers

    index = pipeline / "model_index.json"
    for name, entry in read_json(index, dict[str, Any]).items():
        if name.startswith("_") or name == "unet" or not isinstance(entry, list) or entry == [None, None]:
            continue
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise CheckpointError(f"{index}: {name}: expected [library, class], found {short(entry)}")
        library, kind = entry
        module = {"diffusers": diffusers, "transformers": transformers}.get(library)
        module = module or getattr(diffusers.pipelines, library, None)
        if not own_code and not isinstance(getattr(module, kind, None), type):
            raise CheckpointError(
                f"{index}: {name} is a {kind} of {library}, which diffusers {diffusers.__version__} and "
                f"transformers {transformers.__version__} do not have"
            )
        files = sorted((pipeline / name).glob("*")) if (pipeline / name).is_dir() else []
        pickles = [file for file in files if file.suffix.lower() in PICKLES]
        if pickles and not any(file.suffix == ".safetensors" for file in files):
            raise CheckpointError(
                f"{pickles[0]} is a pickle, and loading a pickle executes the code in it, so it is not "
                f"supported: save {name} with save_pretrained(…, safe_serialization=True)"
            )


def import_code(pipeline: Path, file: str) -> ModuleType:
    """Import a Python file of a pipeline directory, with its neighbours as modules of the same package."""
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(pipeline.resolve())]
    for module in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
        del sys.modules[module]
    sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.{Path(file).stem}")
