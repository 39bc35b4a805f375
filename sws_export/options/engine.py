"""Options of an engine build."""

import argparse
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sws_export.byte_sizes import parse_bytes
from sws_export.errors import OptionError
from sws_export.options.arguments import changed_options

_OPTIMIZATION_LEVELS = range(6)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is built; the backend rejects what it cannot do.

    Attributes:
        compute_capabilities: GPUs that a TensorRT for RTX engine is built for, such as `8.9`; empty for the
            backend's default.
        optimization_level: 0 (fast build) to 5 (fast engine); None for the library's default.
        timing_cache: File with kernel timings, read if it exists and written after the build (TensorRT).
        refit: Allow the weights of the engine to be replaced (TensorRT).
        strip_weights: Leave the weights out of the plan, to be added by a refit (TensorRT).
        version_compatible: Allow later versions of the library to load the engine (TensorRT).
        hardware_compatible: Allow every GPU from Ampere on to run the engine (TensorRT).
        weight_streaming: Allow the runtime to keep part of the weights outside GPU memory.
        max_gpu_memory: Bytes of GPU memory above which an engine is not published, such as `8GB`; empty for
            no limit.
    """

    compute_capabilities: tuple[str, ...] = field(default=(), metadata={"option": "--compute-capability"})
    optimization_level: int | None = field(default=None, metadata={"option": "--builder-optimization-level"})
    timing_cache: Path | None = None
    refit: bool = False
    strip_weights: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_streaming: bool = False
    max_gpu_memory: str = ""

    def __post_init__(self) -> None:
        level = self.optimization_level
        if level is not None and level not in _OPTIMIZATION_LEVELS:
            raise OptionError(f"--builder-optimization-level must be 0 to 5, found {level}")
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", capability):
                raise OptionError(
                    f"--compute-capability {','.join(self.compute_capabilities)}: expected MAJOR.MINOR "
                    f"separated by commas, such as 8.9,12.0; found {capability!r}"
                )

        self.gpu_memory_limit  # noqa: B018  (raises)

    @property
    def gpu_memory_limit(self) -> int | None:
        """`max_gpu_memory` in bytes; None for no limit."""
        given = self.max_gpu_memory
        return parse_bytes(given, f"--max-gpu-memory {given}") if given else None

    def require_defaults(self) -> None:
        """Reject options that have no meaning because no engine is built.

        Raises:
            OptionError: Names the option.
        """
        for option in changed_options(self).values():
            raise OptionError(
                f"{option} has no meaning for an ONNX graph: it is an option of engine builds; leave it out, "
                "or choose --out FILE.plan"
            )

    def cache_key(self) -> dict[str, Any]:
        """The options that a plan depends on, as JSON values.

        Not `max_gpu_memory`, which the finished engine is compared with, nor `timing_cache`, with which no
        engine is cached.
        """
        names = [option.name for option in fields(EngineOptions)]
        return {name: getattr(self, name) for name in names if name not in ("max_gpu_memory", "timing_cache")}

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add all arguments of the group."""
        group = parser.add_argument_group("engine")
        group.add_argument(
            "--compute-capability",
            dest="compute_capabilities",
            type=_capabilities,
            default=(),
            metavar="N.N[,N.N…]",
            help="target GPUs of tensorrt-rtx",
        )
        group.add_argument(
            "--builder-optimization-level",
            dest="optimization_level",
            type=int,
            metavar="0-5",
            help="0 for a fast build, 5 for a fast engine",
        )
        group.add_argument(
            "--timing-cache", type=Path, metavar="FILE", help="kernel timings shared by builds"
        )
        for option, text in (
            ("--refit", "allow the weights to be replaced"),
            ("--strip-weights", "leave the weights out of the plan"),
            ("--version-compatible", "allow later versions of TensorRT to load the engine"),
            ("--hardware-compatible", "allow every GPU from Ampere on to run the engine"),
            ("--weight-streaming", "allow weights outside GPU memory"),
        ):
            group.add_argument(option, action="store_true", help=text)
        group.add_argument(
            "--max-gpu-memory",
            default="",
            metavar="SIZE",
            help="do not write an engine that needs more, such as 8GB",
        )


def _capabilities(text: str) -> tuple[str, ...]:
    """Split "8.9,12.0" into ("8.9", "12.0"), without repetitions."""
    return tuple(dict.fromkeys(item.strip() for item in text.split(",")))
