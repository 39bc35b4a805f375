"""What an engine backend is, and the options of a build."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from sws_export.errors import EngineError, OptionError
from sws_export.options.engine import EngineOptions, option_name


@dataclass(frozen=True)
class Backend:
    """One engine library and what it can do.

    TensorRT and TensorRT for RTX share one Python API, so a backend is data: the code that calls the
    library is the same for both.
    """

    name: str
    """Name on the command line."""
    module: str
    """Python package that is imported, only where an engine is built."""
    extra: str
    """Extra of sws-export that installs the package."""
    needs_gpu: bool
    plugins: bool
    """Whether the parser can resolve nodes of a foreign domain to plugins."""
    default_capabilities: tuple[str, ...]
    """Compute capabilities built for when none is asked for; empty: the GPU of this machine."""
    fused_head_sizes: range
    """Head sizes for which float16 and bfloat16 attention certainly has a dedicated kernel."""
    memory_factor: float
    """Peak memory of a build in multiples of the weights as they are in the graph."""
    refused: Mapping[str, str]
    """Options of `BuildOptions` that this backend cannot do, and why."""

    def load(self) -> ModuleType:
        """Import the library.

        Raises:
            EngineError: It is not installed, or cannot be loaded.
        """
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            raise EngineError(
                f"backend {self.name} needs the Python package {self.module} ({error}); "
                f"install it with: pip install 'sws-export[{self.extra}]'"
            ) from error
        except (ImportError, OSError, RuntimeError) as error:
            raise EngineError(
                f"backend {self.name}: the installed package {self.module} cannot be loaded ({error}); "
                f"reinstall it with: pip install --force-reinstall 'sws-export[{self.extra}]'"
            ) from error


BUILDER_FLAGS: Mapping[str, str] = {
    "refit": "REFIT",
    "strip_weights": "STRIP_PLAN",
    "version_compatible": "VERSION_COMPATIBLE",
    "weight_streaming": "WEIGHT_STREAMING",
}
"""Options that are a flag of the build: the member of TensorRT's `BuilderFlag` by the name of the option."""


@dataclass(frozen=True)
class BuildOptions(EngineOptions):
    """How an engine is built by one backend.

    Attributes:
        backend: The engine library.
        plugins: Plugin libraries that the graph needs; they are serialized into the plan.

    Raises:
        OptionError: The backend does not support an option, or a value is out of range.
        EngineError: `compute_capabilities` is given and the library that defines them is not installed.
    """

    backend: Backend
    plugins: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            reason = self.backend.refused.get(field.name)
            if reason and getattr(self, field.name):
                raise OptionError(
                    f"{option_name(field.name)} is not possible with --backend {self.backend.name}: {reason}"
                )
        super().__post_init__()
        if self.compute_capabilities:
            check_capabilities(self.compute_capabilities, self.backend.load())

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that are built for; empty: the GPU of this machine."""
        return self.compute_capabilities or self.backend.default_capabilities

    def to_json(self) -> dict[str, Any]:
        """Every option by name, as JSON values: the child process and cache keys use it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {
            "backend": self.backend.name,
            "compute_capabilities": list(self.targets),
            "timing_cache": str(self.timing_cache) if self.timing_cache else None,
            "plugins": [str(path) for path in self.plugins],
        }


def capability_member(capability: str) -> str:
    """Name of the member of `ComputeCapability` for "8.9": "SM89"."""
    return "SM" + capability.replace(".", "")


def check_capabilities(capabilities: tuple[str, ...], library: ModuleType) -> None:
    """Refuse a compute capability that `library` cannot build for.

    Raises:
        OptionError: Names the capability and those that can be had.
    """
    # CURRENT asks the driver for the GPU of this machine; NONE is a placeholder.
    members = [name[2:] for name in library.ComputeCapability.__members__ if name.startswith("SM")]
    known = [f"{digits[:-1]}.{digits[-1]}" for digits in members]
    for capability in capabilities:
        if capability not in known:
            raise OptionError(
                f"--compute-capability {capability}: {library.__name__} {library.__version__} "
                f"builds for {', '.join(known)} only"
            )
