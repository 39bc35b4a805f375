"""What an export will make, decided before any long work."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graph_passes.target import TARGETS, Target
from sws_export import onnx_files
from sws_export.engines.backend import BuildOptions, EngineBackend, supports_fp8
from sws_export.engines.choice import GRAPH_BACKENDS, choose_backend, get_backend
from sws_export.engines.library_trust import check_library
from sws_export.engines.plugin_library import find_plugin_library
from sws_export.errors import OptionError
from sws_export.options import EngineOptions, ExportOptions, artefact_kind
from sws_export.options.sizes import check_static_dimensions
from sws_export.progress import Progress
from sws_export.sources import Source
from sws_export.tensors import PRECISIONS, Range, SizeRanges


@dataclass(frozen=True)
class EngineConfig:
    """The sizes of each optimization profile, and how the engine is built."""

    profiles: tuple[SizeRanges, ...]
    build: BuildOptions

    @property
    def static_sizes(self) -> dict[str, int]:
        """The sizes, by symbol, that are one number, and the same one in all profiles."""
        first, *others = (sizes.static_sizes() for sizes in self.profiles)
        return {
            name: size for name, size in first.items() if all(other.get(name) == size for other in others)
        }


@dataclass(frozen=True)
class ExportPlan:
    """One export, decided and not started.

    Attributes:
        source: What is exported.
        options: What the user asked for.
        out: The artefact.
        engine: None for an ONNX graph.
        target: The runtime that the graph is lowered for.
        static_sizes: Those of batch, height and width (latent) and tokens that are static in the graph.
    """

    source: Source
    options: ExportOptions
    out: Path
    engine: EngineConfig | None
    target: Target
    static_sizes: Mapping[str, int]

    @property
    def summary(self) -> str:
        """The export in a few words, for lists of results."""
        return (
            f"{self.source.name}, {self.source.precision}, {self.options.sws.method}, for {self.target.name}"
        )

    @property
    def largest_sizes(self) -> Mapping[str, int]:
        """The largest height and width (latent) and tokens, as far as the key guard depends on them."""
        if self.target.branches or self.options.sws.guard == "literal":
            return {}
        if self.engine is None:
            return self.static_sizes
        ranges = [sizes.ranges() for sizes in self.engine.profiles]
        return {name: max(sizes[name].maximum for sizes in ranges) for name in ranges[0] if name != "batch"}

    @property
    def whole_files(self) -> tuple[Path, ...]:
        """Weight files of the source that external data of the graph begins with."""
        size = self.source.parameter_count * PRECISIONS[self.source.precision].itemsize
        if self.options.quantization.weight_format is not None or size <= onnx_files.EMBED_LIMIT:
            return ()
        return tuple(file.absolute() for file in self.source.whole_files)

    @property
    def keeps_graph(self) -> bool:
        """Whether the ONNX graph is an artefact."""
        return self.engine is None or self.options.keep_onnx


def make_plan(source: Source, options: ExportOptions, out: Path, progress: Progress) -> ExportPlan:
    """Choose backend, target and sizes.

    Raises:
        OptionError: An option does not fit the model or the backend.
        EngineError: The backend is not installed, or needs a GPU and there is none.
        PluginError: The plugin library is one that others could have written.
    """
    for remark in options.sizes.remarks(source.size_multiple, source.vae_scale):
        progress.log(remark)
    if artefact_kind(out) == "onnx":
        options.engine.require_defaults()
        if options.keep_onnx:
            raise OptionError(
                "--keep-onnx has no meaning for an ONNX graph: it is what is written; leave it out, or "
                "choose --out FILE.plan"
            )
        target = options.sws.target(_graph_target(options))
        return ExportPlan(source, options, out, None, target, _static_sizes(source, options))
    engine = _configure_engine(source, options, progress)
    target = options.sws.target(TARGETS["tensorrt" if engine.build.plugins else "tensorrt-rtx"])
    return ExportPlan(source, options, out, engine, target, engine.static_sizes)


def _configure_engine(source: Source, options: ExportOptions, progress: Progress) -> EngineConfig:
    profiles = options.sizes.engine_profiles(source.config, source.size_multiple, source.vae_scale)
    vae_scale = options.sizes.vae_scale or source.vae_scale
    for sizes in profiles:
        check_static_dimensions(source.inputs, sizes.ranges(), vae_scale)
    backend = choose_backend(options.backend)
    takes_plugins = backend.plugins and not options.sws.plain
    library = find_plugin_library() if takes_plugins else None
    if takes_plugins and library is None:
        progress.warn(
            "the plugin library is not built: SWS is lowered to standard operators, which is slower; "
            "build it with `sws-export plugins build`"
        )
    if library is not None:
        check_library(library)
    plugins = (library,) if library else ()
    engine = _engine_options(source, options, backend, progress)
    return EngineConfig(profiles, BuildOptions(backend=backend, plugins=plugins, **vars(engine)))


def _engine_options(
    source: Source, options: ExportOptions, backend: EngineBackend, progress: Progress
) -> EngineOptions:
    """The options of the build, without default targets that do not support the weights.

    Raises:
        OptionError: A target that was named does not support them.
    """
    engine = options.engine
    stored = source.quantization["weights"] if source.quantization else None
    if "fp8" not in (stored, options.quantization.weight_format):
        return engine
    named = [name for name in engine.compute_capabilities if not supports_fp8(name)]
    if named:
        instead = "--weights int8" if options.quantization.activations is None else "--precision int8"
        if source.quantization:
            instead = f"a checkpoint with --weights int8 instead of {source.path}"
        raise OptionError(
            f"--compute-capability {','.join(named)}: GPUs before 8.9 have no float8; "
            f"use {instead}, or leave these targets out"
        )
    unsupported = [name for name in backend.default_capabilities if not supports_fp8(name)]
    if engine.compute_capabilities or not unsupported:
        return engine
    progress.log(f"not built for compute capability {', '.join(unsupported)}: no float8 before 8.9")
    supported = tuple(filter(supports_fp8, backend.default_capabilities))
    return dataclasses.replace(engine, compute_capabilities=supported)


def _static_sizes(source: Source, options: ExportOptions) -> dict[str, int]:
    sizes = options.sizes.static_sizes(source.size_multiple, source.vae_scale)
    ranges = {name: Range(size, size, size) for name, size in sizes.items()}
    check_static_dimensions(source.inputs, ranges, options.sizes.vae_scale or source.vae_scale)
    return sizes


def _graph_target(options: ExportOptions) -> Target:
    """The target of an ONNX graph: ONNX Runtime on the CPU, unless `--backend` names another one.

    For `tensorrt` the graph keeps the operators that plugins implement, and their definitions for runtimes
    without plugins.
    """
    if options.backend is None:
        return TARGETS["onnxruntime"]
    if options.backend in GRAPH_BACKENDS:
        return TARGETS[options.backend]
    return TARGETS["tensorrt" if get_backend(options.backend).plugins else "tensorrt-rtx"]
