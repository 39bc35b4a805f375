"""What an engine backend is, and the options of a build."""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from sws_export.errors import EngineError, OptionError


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


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Raises:
        OptionError: The backend cannot do what is asked for, or a value is not one it knows.
        EngineError: `compute_capabilities` is given and the library that knows them is not installed.
    """

    backend: Backend
    compute_capabilities: tuple[str, ...] = ()
    """Targets such as "8.9"; empty: the backend's default."""
    optimization_level: int | None = None
    """0 (fast build) to 5 (fast engine); None: the library's default."""
    timing_cache: Path | None = None
    """File with kernel timings, read if it is there and written after the build."""
    refit: bool = False
    strip_weights: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_streaming: bool = False
    plugins: tuple[Path, ...] = ()
    """Plugin libraries that the graph needs; they become part of the plan."""

    def __post_init__(self) -> None:
        for field in fields(self):
            reason = self.backend.refused.get(field.name)
            if reason and getattr(self, field.name):
                option = "--" + field.name.replace("_", "-").replace("capabilities", "capability")
                raise OptionError(f"{option} is not possible with --backend {self.backend.name}: {reason}")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise OptionError(f"--builder-optimization-level must be 0 to 5, found {self.optimization_level}")
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


def parse_capabilities(text: str) -> tuple[str, ...]:
    """Split "8.9,12.0" into ("8.9", "12.0"), without repetitions.

    Raises:
        OptionError: An item is not MAJOR.MINOR.
    """
    items = tuple(dict.fromkeys(item.strip() for item in text.split(",")))
    for item in items:
        if not re.fullmatch(r"\d+\.\d", item):
            raise OptionError(
                f"--compute-capability {text}: expected MAJOR.MINOR separated by commas, such as 8.9,12.0; "
                f"found {item!r}"
            )
    return items


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
