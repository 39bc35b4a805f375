"""From an ONNX file to a serialized engine through TensorRT's Python API.

Runs in the child process. The functions take the library, `tensorrt` or `tensorrt_rtx`, as their first
argument; both have the same API. Members that some supported release lacks are looked up by name.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sws_export.engines.backend import BUILDER_FLAGS, BuildOptions, capability_member
from sws_export.errors import EngineError, OptionError
from sws_export.tensors import ProfileShapes


def create_builder(trt: Any, logger: Any) -> Any:
    """A `Builder`.

    Raises:
        EngineError: TensorRT cannot create one, for example because the NVIDIA driver is too old.
    """
    return _create(trt, logger, "builder", lambda: trt.Builder(logger))


def _create(trt: Any, logger: Any, what: str, factory: Callable[[], Any]) -> Any:
    """The result of `factory`. TensorRT returns null on failure: None, or a TypeError from a constructor."""
    try:
        created = factory()
    except (TypeError, RuntimeError) as error:
        created, reason = None, str(error)
    else:
        reason = "no reason given"
    if created is None:
        reason = getattr(logger, "first_error", None) or reason
        raise EngineError(
            f"{trt.__name__} {trt.__version__} cannot create a {what}: {reason}; "
            "check that the NVIDIA driver supports this version (nvidia-smi shows the driver)"
        )
    return created


def parse(trt: Any, builder: Any, logger: Any, onnx_path: Path, options: BuildOptions) -> Any:
    """Parse the graph and its external data into a strongly typed network.

    Raises:
        EngineError: The parser rejects the graph; the message contains its first error.
    """
    # Networks of TensorRT 11 are always strongly typed; before, a flag requests it.
    flag = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    flags = 0 if flag is None else 1 << int(flag)
    network = _create(trt, logger, "network", lambda: builder.create_network(flags))
    parser = _create(trt, logger, "parser", lambda: trt.OnnxParser(network, logger))
    # Makes a plugin take precedence over the model-local function of the same name; TensorRT 10.15 and later.
    override = trt.OnnxParserFlag.__members__.get("ENABLE_PLUGIN_OVERRIDE")
    if options.plugins and override is None:
        parsed = parser.parse(without_plugin_functions(builder, onnx_path), str(onnx_path))
    else:
        if options.plugins:
            parser.set_flag(override)
        parsed = parser.parse_from_file(str(onnx_path))
    if not parsed:
        raise EngineError(
            f"{trt.__name__} {trt.__version__} cannot parse {onnx_path}: {_parser_error(parser)}"
        )
    return network


def without_plugin_functions(builder: Any, onnx_path: Path) -> bytes:
    """The serialized model without the functions that registered plugins implement.

    External data is not read.
    """
    # Only plugins need it, and it would take half of the time in which a build process starts.
    import onnx

    names = {creator.name for creator in builder.get_plugin_registry().all_creators}
    model = onnx.load(onnx_path, load_external_data=False)
    kept = [function for function in model.functions if function.name not in names]
    del model.functions[:]
    model.functions.extend(kept)
    return bytes(model.SerializeToString())


def _parser_error(parser: Any) -> str:
    if not parser.num_errors:
        return "no reason given"
    error = parser.get_error(0)
    where = f" at node {error.node_name()!r} ({error.node_operator()})" if error.node_operator() else ""
    return f"{' '.join(error.desc().split())}{where}"


def check_inputs(network: Any, shapes: ProfileShapes) -> None:
    """Check the shapes of the profile against the inputs of the network.

    Raises:
        OptionError: A dynamic input has no shapes, an input is unknown, a dimension contradicts the graph, or
            the sizes of a dimension are not ascending.
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
    """Mark attention layers as decomposable unless a fused kernel exists; the number of layers marked.

    The build fails for an attention that has no fused kernel and is not decomposable. Layers that are known
    to have one (float16 or bfloat16, head size in `fused_head_sizes`) are not changed.
    """
    count = 0
    half_types = (trt.DataType.HALF, trt.DataType.BF16)
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type != trt.LayerType.ATTENTION_INPUT:
            continue
        query = layer.get_input(0)
        if query.dtype in half_types and query.shape[-1] in fused_head_sizes:
            continue
        # get_layer returns the base class ILayer; assigning __class__ is the bindings' way to downcast.
        layer.__class__ = trt.IAttentionInputLayer
        layer.attention.decomposable = True
        count += 1
    return count


def configure(
    trt: Any,
    builder: Any,
    logger: Any,
    options: BuildOptions,
    profiles: Iterable[ProfileShapes],
    monitor: Any,
) -> Any:
    """Create the build configuration with its optimization profiles, in the given order.

    Raises:
        OptionError: TensorRT rejects a shape, or this version lacks an option.
        EngineError: TensorRT cannot create the configuration or the profile.
    """
    config = _create(trt, logger, "builder configuration", builder.create_builder_config)
    # TF32 is enabled by default; the float32 parts of the graph need the accuracy of float32.
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
    for shapes in profiles:
        profile = _create(trt, logger, "optimization profile", builder.create_optimization_profile)
        _add_profile(config, profile, shapes)
    return config


def _flags(trt: Any, options: BuildOptions) -> Mapping[str, Any]:
    members = trt.BuilderFlag.__members__
    missing = [
        option for option, name in BUILDER_FLAGS.items() if getattr(options, option) and name not in members
    ]
    if missing:
        raise OptionError(
            f"{trt.__name__} {trt.__version__} does not support {', '.join(missing)}; install a later version"
        )
    return {option: members[name] for option, name in BUILDER_FLAGS.items() if name in members}


def _add_profile(config: Any, profile: Any, shapes: ProfileShapes) -> None:
    for name, (minimum, optimum, maximum) in shapes.items():
        profile.set_shape(name, minimum, optimum, maximum)
    if config.add_optimization_profile(profile) < 0:
        raise OptionError(f"TensorRT rejects the profile {dict(shapes)}")


def load_timing_cache(config: Any, path: Path) -> Any:
    """Set the builder's timing cache to the contents of `path`, or to an empty cache; the cache.

    Raises:
        EngineError: The file cannot be read, or was written for another GPU or by another version.
    """
    try:
        timings = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise EngineError(f"cannot read the timing cache {path}: {error.strerror}") from error
    cache = config.create_timing_cache(timings)
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineError(
            f"the timing cache {path} was written for another GPU or TensorRT version; delete the file"
        )
    return cache


def save_timing_cache(config: Any, path: Path) -> None:
    """Write the timings of the build to `path` atomically: other builds may be reading it.

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
    """An `IStreamWriter` that passes each chunk of the plan to `write`.

    After an OSError it writes nothing more and keeps the error in its attribute `error`: TensorRT calls it
    from C++, where an exception would end the process, and reports success even if nothing was written.
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
