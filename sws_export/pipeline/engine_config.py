"""What engine will be built, decided before any long work."""

import dataclasses

from sws_export.engines import BuildOptions, choose_backend
from sws_export.engines.choice import named_backend
from sws_export.engines.plugin_library import find_plugin_library
from sws_export.options.options import ExportOptions
from sws_export.options.sizes import check_static_dimensions, engine_sizes, graph_sizes
from sws_export.pipeline.rewrite import Target
from sws_export.progress import Progress
from sws_export.sources.source import Source
from sws_export.tensors import Range, Sizes


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The sizes of the profile and how the engine is built."""

    sizes: Sizes
    build: BuildOptions


def configure_engine(source: Source, options: ExportOptions, progress: Progress) -> EngineConfig:
    """Choose backend, sizes and plugins.

    Raises:
        OptionError: A size or an option does not fit the model or the backend.
        EngineError: The backend is not installed, or there is no GPU for it.
    """
    sizes = engine_sizes(options, source.config, source.multiple, source.vae_scale)
    check_static_dimensions(source.inputs, sizes.ranges())
    backend = choose_backend(options.backend)
    library = find_plugin_library() if backend.plugins and not options.plain else None
    if backend.plugins and not options.plain and library is None:
        progress.warn(
            "the plugin library is not built: SWS is lowered to standard operators, which is slower; "
            "build it with `sws-export plugins build`"
        )
    build = BuildOptions(
        backend=backend,
        compute_capabilities=options.compute_capabilities,
        optimization_level=options.optimization_level,
        timing_cache=options.timing_cache,
        refit=options.refit,
        strip_weights=options.strip_weights,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        weight_streaming=options.weight_streaming,
        plugins=(library,) if library else (),
    )
    backend.load()
    return EngineConfig(sizes, build)


def static_graph_sizes(source: Source, options: ExportOptions) -> dict[str, int]:
    """The sizes that an ONNX graph is fixed to; none by default.

    Raises:
        OptionError: A size does not fit the model.
    """
    sizes = graph_sizes(options, source.multiple, source.vae_scale)
    check_static_dimensions(source.inputs, {name: Range(size, size, size) for name, size in sizes.items()})
    return sizes


def choose_target(options: ExportOptions, engine: EngineConfig | None) -> Target:
    """The runtime that the graph is lowered for.

    An ONNX graph is for ONNX Runtime, unless `--backend` says who will build an engine of it. For `tensorrt`
    it keeps the operators that plugins implement, and their definitions for runtimes without plugins.

    Raises:
        OptionError: There is no such backend.
    """
    if engine is None:
        if options.backend is None:
            return "onnxruntime"
        return "tensorrt" if named_backend(options.backend).plugins else "tensorrt-rtx"
    return "tensorrt" if engine.build.plugins else "tensorrt-rtx"
