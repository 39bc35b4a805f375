"""Which extra of sws-export installs a Python package.

The base installation runs exported artefacts. Modules that need a package of an extra import it as usual;
if such an import fails, `missing_extras_as_errors` turns the failure into one line with the pip command.
"""

import contextlib
from collections.abc import Iterator

from sws_export.errors import MissingExtraError

EXTRAS = {
    "export": (
        *("PIL", "diffusers", "filelock", "jinja2", "markupsafe", "onnx", "onnx_ir", "onnxscript"),
        *("polygraphy", "psutil", "rich", "safetensors", "torch"),
    ),
    "cpu": ("onnxruntime",),
    "gpu": ("tensorrt",),
    "rtx": ("tensorrt_rtx",),
    "sample": ("transformers",),
    "evaluate": ("scipy", "skimage"),
}
"""Packages of each extra, by the names under which they are imported."""


@contextlib.contextmanager
def missing_extras_as_errors() -> Iterator[None]:
    """Raise `MissingExtraError` where an import in the block fails because an extra is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        for extra, packages in EXTRAS.items():
            if error.name in packages:
                raise MissingExtraError(
                    f"the Python package {error.name} is not installed; "
                    f"install it with: pip install 'sws-export[{extra}]'"
                ) from error
        raise
