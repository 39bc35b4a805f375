"""Loads the plugin library into TensorRT for RTX and prints the results.

A separate program, because the parser of TensorRT for RTX ends the process after it has created a plugin.

Usage: registry_session.py LIBRARY creators | refuse | parse ONNX_FILE | parse_without_functions ONNX_FILE
"""

import sys
from pathlib import Path

import numpy as np
import tensorrt_rtx as trt

from sws_export.engines.network import without_plugin_functions


class Logger(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()

    def log(self, severity: object, message: str) -> None:
        print("log", severity, message, flush=True)


def print_creators(registry: trt.IPluginRegistry) -> None:
    for creator in registry.all_creators:
        names = [field.name for field in creator.field_names]
        print("creator", f"{creator.plugin_namespace}::{creator.name}", creator.plugin_version, *names)


def create(registry: trt.IPluginRegistry, name: str, **attributes: int) -> trt.IPluginV3 | None:
    fields = [
        trt.PluginField(key, np.array([value], np.int32), trt.PluginFieldType.INT32)
        for key, value in attributes.items()
    ]
    creator = registry.get_creator(name, "1", "sws")
    return creator.create_plugin("layer", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)


def describe(plugin: trt.IPluginV3) -> str:
    core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    runtime = plugin.get_capability_interface(trt.PluginCapabilityType.RUNTIME)
    return f"{core.plugin_namespace}::{core.plugin_name} {build.num_outputs} {runtime is not None}"


def main() -> None:
    library, command = sys.argv[1:3]
    logger = Logger()
    builder = trt.Builder(logger)
    registry = builder.get_plugin_registry()  # as the export's child process does
    print("loaded", registry.load_library(library) is not None)
    if command == "creators":
        print_creators(registry)
        print("plugin", describe(create(registry, "BandedTransport", radius=4, tensors=2)))
        print("plugin", describe(create(registry, "KeyGuard", num_heads=8)))
    elif command == "refuse":
        print("refused", create(registry, "BandedTransport", radius=99) is None)
        print("refused", create(registry, "KeyGuard") is None)
    elif command == "parse":
        network = builder.create_network(0)  # the parser does not keep it alive
        parser = trt.OnnxParser(network, logger)
        print("parsed", parser.parse_from_file(sys.argv[3]), flush=True)
    elif command == "parse_without_functions":
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        model = without_plugin_functions(builder, Path(sys.argv[3]))
        print("parsed", parser.parse(model, sys.argv[3]), flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main()
