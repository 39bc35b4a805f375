"""What an export will need, before any long work, and what the machine has."""

import dataclasses
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from graph_passes.parameters import STATE_RADIUS, diamond_offsets
from sws_export.byte_sizes import format_bytes
from sws_export.engines.choice import engine_memory_estimate
from sws_export.engines.gpu_memory import STATE_BUFFERS, GpuMemory, ProfileMemory, describe_gpu_memory
from sws_export.options import ExportOptions
from sws_export.pipeline import estimates
from sws_export.pipeline.plan import EngineConfig
from sws_export.sources import Source
from sws_export.tensors import PRECISIONS

_MINUTES = 100.0
"""Seconds from which a time is shown in minutes."""


@dataclasses.dataclass(frozen=True)
class Preflight:
    """Expected needs of each stage in bytes and seconds, and what there is.

    Attributes:
        memory: Peak memory by stage.
        disk: Space for the artefacts and what is staged on the way.
        graph_size: Bytes of the ONNX graph with its weights.
        available_memory: Memory that is free now.
        free_disk: Space that is free where the artefacts go.
        seconds: Wall time by stage, on two idle processor cores.
        engine_size: Bytes of the plan; None for an ONNX graph.
        profiles: Sizes of each optimization profile of the engine, in words.
        gpu_memory: Of the engine; None for an ONNX graph, and if the UNet's configuration is unknown.
        max_gpu_memory: As `--max-gpu-memory`, in bytes.
        cached: What is in the cache and needs nothing: `graph`, `engine`.
    """

    memory: dict[str, int]
    disk: int
    graph_size: int
    available_memory: int
    free_disk: int
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    engine_size: int | None = None
    profiles: tuple[str, ...] = ()
    gpu_memory: GpuMemory | None = None
    max_gpu_memory: int | None = None
    cached: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """The needs in words."""
        lines = [f"in the cache: {', '.join(self.cached)}"] if self.cached else []
        if self.memory:
            stages = ", ".join(f"{stage} {size / 1e9:.1f} GB" for stage, size in self.memory.items())
            lines.append(f"expected memory: {stages}; {self.available_memory / 1e9:.1f} GB available")
        lines.append(
            f"expected disk: {self.disk / 1e9:.2f} GB, of it the graph {self.graph_size / 1e9:.2f} GB; "
            f"{self.free_disk / 1e9:.1f} GB free"
        )
        if self.seconds:
            stages = ", ".join(f"{stage} {_duration(time)}" for stage, time in self.seconds.items())
            total = _duration(sum(self.seconds.values()))
            lines.append(f"expected time: {total} on two idle cores ({stages}); longer beside other programs")
        if self.engine_size is not None:
            lines.append(
                f"expected engine: {self.engine_size / 1e9:.2f} GB ± {estimates.PLAN_SPREAD:.0%} for "
                f"{'; '.join(self.profiles)}"
            )
        if self.gpu_memory is not None:
            lines += [
                f"expected: the engine {needs} (activations ± {estimates.ACTIVATION_SPREAD:.0%})"
                for needs in describe_gpu_memory(self.gpu_memory, self.profiles)
            ]
        return lines

    def shortages(self) -> list[str]:
        """What will probably not fit."""
        found = [
            f"{stage} needs about {size / 1e9:.1f} GB of memory and {self.available_memory / 1e9:.1f} GB are "
            "available; it may be killed"
            for stage, size in self.memory.items()
            if size > self.available_memory
        ]
        if self.disk > self.free_disk:
            found.append(
                f"about {self.disk / 1e9:.1f} GB of disk are needed, {self.free_disk / 1e9:.1f} GB are free"
            )
        if self.gpu_memory is not None and self.max_gpu_memory is not None:
            needed = self.gpu_memory.total(self.gpu_memory.largest)
            if needed > self.max_gpu_memory:
                found.append(
                    f"the engine needs about {format_bytes(needed)} of GPU memory, --max-gpu-memory allows "
                    f"{format_bytes(self.max_gpu_memory)}; it may be built and not be written"
                )
        return found


def preflight(
    source: Source,
    engine: EngineConfig | None,
    options: ExportOptions,
    out: Path,
    cached: tuple[str, ...] = (),
) -> Preflight:
    """Estimate memory, disk, time and size from measured figures, see benchmarks/README.md.

    Args:
        source: What is exported.
        engine: What is built; None for an ONNX graph.
        options: What was asked for.
        out: Where the artefacts go.
        cached: What is in the cache: `graph` (with its validation), `engine`.
    """
    stored = source.parameter_count * PRECISIONS[source.precision].itemsize
    quantized = options.quantization.weight_format or source.quantization
    weights = _quantized_size(source, stored) if quantized else stored
    billions = source.parameter_count / 1e9
    kind = "plain" if options.sws.plain else "sws"
    memory: dict[str, int] = {}
    seconds: dict[str, float] = {}
    if "graph" not in cached:
        memory["export"] = estimates.EXPORT_MEMORY
        seconds["export"] = _export_seconds(source, stored)
        quantization = options.quantization
        if quantization.activations is not None and quantization.calibration is None:
            whole = stored * estimates.VALIDATION_FACTOR
            memory["calibration"] = estimates.EXPORT_MEMORY + min(
                whole, estimates.CALIBRATION_PARTITION_MEMORY
            )
            seconds["calibration"] = billions * estimates.CALIBRATION_SECONDS_PER_BILLION
        if options.validate:
            whole = weights * estimates.VALIDATION_FACTOR
            memory["validation"] = estimates.EXPORT_MEMORY + min(whole, estimates.VALIDATION_PARTITION_MEMORY)
            seconds["validation"] = billions * estimates.VALIDATION_SECONDS_PER_BILLION
    if engine is not None and "engine" not in cached:
        memory["engine build"] = engine_memory_estimate(weights, engine.build.backend)
        seconds["engine build"] = billions * estimates.BUILD_SECONDS_PER_BILLION[kind] * len(engine.profiles)
    return Preflight(
        memory=memory,
        disk=weights * (2 if engine is not None else 1),
        graph_size=weights,
        available_memory=psutil.virtual_memory().available,
        free_disk=shutil.disk_usage(out.parent).free,
        seconds=seconds,
        engine_size=_plan_size(weights, engine, kind) if engine else None,
        profiles=tuple(map(str, engine.profiles)) if engine else (),
        gpu_memory=_gpu_memory(source, engine, kind, weights) if engine else None,
        max_gpu_memory=options.engine.gpu_memory_limit,
        cached=cached,
    )


def _export_seconds(source: Source, weights: int) -> float:
    """Reading all that is stored once, then recording and writing the graph."""
    stored = sum(file.stat().st_size for file in source.files)
    seconds = estimates.START_SECONDS + stored / 1e9 * estimates.CHECK_SECONDS_PER_GB
    seconds += weights / 1e9 * estimates.EXPORT_SECONDS_PER_GB
    return seconds + (weights / 1e9 * estimates.CONVERT_SECONDS_PER_GB if source.converts else 0.0)


def _quantized_size(source: Source, stored: int) -> int:
    """Bytes of the weights if most of them have 8 bits."""
    share = estimates.UNQUANTIZED_SHARE
    return int(source.parameter_count * (1 - share) + stored * share)


def _plan_size(weights: int, engine: EngineConfig, kind: str) -> int:
    stored = 0.0 if engine.build.strip_weights else weights * estimates.PLAN_FACTOR[kind]
    size = estimates.PLAN_KERNELS[kind] * len(engine.profiles) + stored
    return int(size * (estimates.PLAN_TURING if "7.5" in engine.build.targets else 1.0))


def _gpu_memory(source: Source, engine: EngineConfig, kind: str, weights: int) -> GpuMemory | None:
    """What the builder will probably report; None where the channels of the UNet are unknown."""
    if source.config is None:
        return None
    value = source.config["block_out_channels"][0] * PRECISIONS[source.precision].itemsize
    state = 4 * len(diamond_offsets(STATE_RADIUS)) * _grids(source.config) if kind == "sws" else 0
    profiles = []
    for sizes in engine.profiles:
        latent = math.prod(getattr(sizes, name).maximum for name in ("batch", "height", "width"))
        activations = estimates.ACTIVATION_BASE[kind] + int(
            estimates.ACTIVATION_FACTOR[kind] * latent * value
        )
        if source.precision == "fp32":
            pixels = sizes.height.maximum * sizes.width.maximum
            activations += 2 * 4 * sizes.batch.maximum * _logits(source.config, pixels)
        profiles.append(ProfileMemory(activations, 0, int(STATE_BUFFERS * latent * state)))
    return GpuMemory(weights, tuple(profiles))


def _logits(config: Mapping[str, Any], pixels: int) -> int:
    """Logits of the attention with the most tokens, of one sample; engines store them in float32 only."""
    kinds = config["down_block_types"]
    level = next((level for level, kind in enumerate(kinds) if "Attn" in kind), len(kinds) - 1)
    # diffusers has the number of heads under this name.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 8
    heads = heads[level] if isinstance(heads, list | tuple) else heads
    return int(heads * (pixels // 4**level) ** 2)


def _grids(config: Mapping[str, Any]) -> float:
    """Tokens of all grids with attention sites, as a multiple of the latent's pixels."""
    kinds = config["down_block_types"]
    levels = {level for level, kind in enumerate(kinds) if "Attn" in kind} | {len(kinds) - 1}
    return sum(0.25**level for level in levels)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < _MINUTES else f"{seconds / 60:.0f} min"
