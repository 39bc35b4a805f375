"""From an ONNX file to a plan through TensorRT's Python API.

Runs in the child process. Every function takes the library as its first argument, `tensorrt` or
`tensorrt_rtx`: both have the same API.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sws_export.engines.backend import BUILDER_FLAGS, BuildOptions, capability_member
from sws_export.errors import EngineError, OptionError
from sws_export.tensors import Shapes


def parse(trt: Any, builder: Any, logger: Any, onnx_path: Path, options: BuildOptions) -> Any:
    """Parse the graph, external data included, into a strongly typed network.

    Raises:
        EngineError: The parser refuses the graph; its first error is quoted.
    """
    # From TensorRT 11 on every network is strongly typed; before, it has to be asked for.
    flag = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if options.plugins:
        # A plugin wins over the model-local function of the same name.
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if not parser.parse_from_file(str(onnx_path)):
        raise EngineError(
            f"{trt.__name__} {trt.__version__} cannot parse {onnx_path}: {_parser_error(parser)}"
        )
    return network


def _parser_error(parser: Any) -> str:
    if not parser.num_errors:
        return "no reason given"
    error = parser.get_error(0)
    where = f" at node {error.node_name()!r} ({error.node_operator()})" if error.node_operator() else ""
    return f"{' '.join(error.desc().split())}{where}"


def check_inputs(network: Any, shapes: Shapes) -> None:
    """Refuse shapes that do not fit the inputs of the network.

    Raises:
        OptionError: A dynamic input has no shapes, an input is unknown, a dimension contradicts the graph, or
            the sizes of a dimension do not ascend.
    """
    inputs = {
        tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))
    }
    unknown = sorted(shapes.keys() - inputs.keys())
    if unknown:
        raise OptionError(
            f"the profile names {', '.join(unknown)}; the graph has the inputs {', '.join(inputs)}"
        )
    for name, declared in inputs.items():
        if name not in shapes:
            if -1 in declared:
                raise OptionError(f"the profile has no shapes for input {name} {list(declared)}")
            continue
        if any(not low <= best <= high for low, best, high in zip(*shapes[name], strict=False)):
            raise OptionError(f"the profile of input {name} must ascend, found {shapes[name]}")
        for shape in shapes[name]:
            fits = len(shape) == len(declared) and all(
                there in (-1, here) for there, here in zip(declared, shape, strict=True)
            )
            if not fits:
                raise OptionError(
                    f"the profile gives input {name} the shape {list(shape)}, the graph has {list(declared)} "
                    "(-1: any size); choose sizes that the graph was exported for"
                )


def allow_decomposition(trt: Any, network: Any, fused_head_sizes: range) -> int:
    """Let TensorRT build an attention of several kernels where none covers it, and count these.

    The build fails for an attention that has no dedicated kernel and may not be decomposed. Those that
    certainly have one (float16 or bfloat16, head size in `fused_head_sizes`) are left alone.
    """
    count = 0
    half_types = (trt.DataType.HALF, trt.DataType.BF16)
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type != trt.LayerType.ATTENTION_INPUT:
            continue
        query = layer.get_input(0)
        if query.dtype in half_types and query.shape[-1] in fused_head_sizes:
            continue
        # get_layer returns the base class; this is how the bindings are made to see the real one.
        layer.__class__ = trt.IAttentionInputLayer
        layer.attention.decomposable = True
        count += 1
    return count


def configure(trt: Any, builder: Any, options: BuildOptions, shapes: Shapes, monitor: Any) -> Any:
    """Make the build configuration with one optimization profile.

    Raises:
        OptionError: TensorRT does not take a shape.
    """
    config = builder.create_builder_config()
    # On by default; float32 parts of the graph are float32 because they need its accuracy.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.progress_monitor = monitor
    for option, flag in _flags(trt, options).items():
        if getattr(options, option):
            config.set_flag(flag)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.targets:
        config.num_compute_capabilities = len(options.targets)
        for index, capability in enumerate(options.targets):
            config.set_compute_capability(
                trt.ComputeCapability.__members__[capability_member(capability)], index
            )
    if options.plugins:
        config.plugins_to_serialize = [str(path) for path in options.plugins]
    _add_profile(builder, config, shapes)
    return config


def _flags(trt: Any, options: BuildOptions) -> Mapping[str, Any]:
    members = trt.BuilderFlag.__members__
    missing = [
        option for option, name in BUILDER_FLAGS.items() if getattr(options, option) and name not in members
    ]
    if missing:
        raise OptionError(f"{trt.__name__} {trt.__version__} does not know {', '.join(missing)}; update it")
    return {option: members[name] for option, name in BUILDER_FLAGS.items() if name in members}


def _add_profile(builder: Any, config: Any, shapes: Shapes) -> None:
    profile = builder.create_optimization_profile()
    for name, (minimum, optimum, maximum) in shapes.items():
        profile.set_shape(name, minimum, optimum, maximum)
    if config.add_optimization_profile(profile) < 0:
        raise OptionError(f"TensorRT does not take the profile {dict(shapes)}")


def load_timing_cache(config: Any, path: Path) -> Any:
    """Give the builder the timings in `path`, or none yet, and return the cache.

    Raises:
        EngineError: The file cannot be read, or was made on another GPU or by another version.
    """
    try:
        timings = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise EngineError(f"cannot read the timing cache {path}: {error.strerror}") from error
    cache = config.create_timing_cache(timings)
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineError(f"the timing cache {path} is of another GPU or TensorRT version; delete it")
    return cache


def save_timing_cache(config: Any, path: Path) -> None:
    """Write the timings of the build to `path`, in one step: other builds may read it meanwhile.

    Raises:
        EngineError: The file cannot be written.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_bytes(config.get_timing_cache().serialize())
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise EngineError(f"cannot write the timing cache {path}: {error.strerror}") from error


def stream_writer(trt: Any, write: Callable[[bytes], int]) -> Any:
    """An `IStreamWriter` that hands each chunk of the plan to `write`.

    After an OSError it writes no more and keeps the error in its attribute `error`: TensorRT calls it from
    C++, where an exception would end the process, and reports a build as good even if nothing was written.
    """

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            if self.error is not None:
                return 0
            try:
                return write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()
