"""Engine backends and build options."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from sws_export.errors import EngineError, OptionError
from sws_export.files import file_digest
from sws_export.options.arguments import option_name
from sws_export.options.engine import EngineOptions


@dataclass(frozen=True)
class EngineBackend:
    """An engine library and its capabilities.

    TensorRT and TensorRT for RTX have the same Python API, so a backend is data: the code that calls the
    library is the same for both.
    """

    name: str
    """Name on the command line."""
    module: str
    """Python package, imported only to build or run an engine."""
    extra: str
    """Extra of sws-export that installs the package."""
    needs_gpu: bool
    plugins: bool
    """Whether the parser can resolve custom operators to plugins."""
    default_capabilities: tuple[str, ...]
    """Target compute capabilities by default; empty: the GPU of this machine."""
    fused_head_sizes: range
    """Head sizes with a dedicated kernel for float16 and bfloat16 attention on every target."""
    memory_factor: float
    """Peak memory of a build as a multiple of the size of the weights in the graph."""
    unsupported: Mapping[str, str]
    """Options of `BuildOptions` that this backend does not support, with the reason."""

    def load(self) -> ModuleType:
        """Import the library.

        Raises:
            EngineError: The library is not installed or cannot be loaded.
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
"""Name of the TensorRT `BuilderFlag` of each option that is a flag."""


@dataclass(frozen=True)
class BuildOptions(EngineOptions):
    """Options of an engine build with one backend.

    Attributes:
        backend: The engine library.
        plugins: Plugin libraries that the graph needs; they are serialized into the plan.

    Raises:
        OptionError: The backend does not support an option, or a value is out of range.
        EngineError: `compute_capabilities` is given and the library that defines them is not installed.
    """

    backend: EngineBackend
    plugins: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            reason = self.backend.unsupported.get(field.name)
            if reason and getattr(self, field.name):
                raise OptionError(
                    f"{option_name(field)} is not supported by --backend {self.backend.name}: {reason}"
                )
        super().__post_init__()
        if self.compute_capabilities:
            check_capabilities(self.compute_capabilities, self.backend.load())

    @property
    def targets(self) -> tuple[str, ...]:
        """Target compute capabilities; empty: the GPU of this machine."""
        return self.compute_capabilities or self.backend.default_capabilities

    def cache_key(self) -> dict[str, Any]:
        """Those of the group, with the backend, its targets and the content of the plugin libraries."""
        return super().cache_key() | {
            "backend": self.backend.name,
            "compute_capabilities": self.targets,
            "plugins": [file_digest(library).sha256 for library in self.plugins],
        }

    def to_json(self) -> dict[str, Any]:
        """The options of the child process by name, as JSON values."""
        return super().cache_key() | {
            "backend": self.backend.name,
            "compute_capabilities": self.targets,
            "timing_cache": str(self.timing_cache) if self.timing_cache else None,
            "plugins": [str(path) for path in self.plugins],
        }


FP8_CAPABILITY = (8, 9)
"""First compute capability with float8; TensorRT for RTX does not build float8 graphs for earlier ones."""


def supports_fp8(capability: str) -> bool:
    """Whether GPUs of a compute capability such as "8.9" have float8."""
    return tuple(map(int, capability.split("."))) >= FP8_CAPABILITY


def capability_member(capability: str) -> str:
    """Name in the enumeration `ComputeCapability` for "8.9": "SM89"."""
    return "SM" + capability.replace(".", "")


def check_capabilities(capabilities: tuple[str, ...], library: ModuleType) -> None:
    """Check that `library` can build for compute capabilities.

    Raises:
        OptionError: A capability is not supported.
    """
    # CURRENT is the GPU of this machine; NONE is a placeholder.
    members = [name[2:] for name in library.ComputeCapability.__members__ if name.startswith("SM")]
    supported = [f"{digits[:-1]}.{digits[-1]}" for digits in members]
    for capability in capabilities:
        if capability not in supported:
            raise OptionError(
                f"--compute-capability {capability}: {library.__name__} {library.__version__} "
                f"supports {', '.join(supported)} only"
            )
