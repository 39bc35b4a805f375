"""The process that builds one engine: `python -m sws_export.engines.child < spec.json`.

TensorRT can exhaust the memory or abort, which cannot be caught, so the build runs in a process of its own.
`build.py` starts the process and reports the result.
"""

import ctypes
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sws_export.engines import network as steps
from sws_export.engines.backend import BuildOptions
from sws_export.engines.choice import get_backend
from sws_export.engines.events import EventWriter
from sws_export.engines.gpu_memory import read_builder_memory
from sws_export.engines.memory import OUT_OF_MEMORY_ADVICE, is_out_of_memory
from sws_export.engines.monitor import make_logger, make_monitor
from sws_export.errors import EngineError, SwsExportError
from sws_export.stage_timings import peak_memory
from sws_export.tensors import ProfileShapes

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Build the engine specified as JSON on standard input; returns 0 if the plan is complete."""
    spec = json.load(sys.stdin)
    die_with_parent(spec["parent"])
    events = EventWriter()
    try:
        _build(spec, events)
    except SwsExportError as error:
        events.send("failed", error=type(error).__name__, message=str(error))
        return 1
    except MemoryError:
        events.send(
            "failed",
            error="EngineError",
            message=f"the engine build ran out of memory; {OUT_OF_MEMORY_ADVICE}",
        )
        return 1
    except OSError as error:
        if error.errno is None:
            raise
        events.send("not_written", errno=error.errno, path=spec["out"])
        return 1
    return 0


def die_with_parent(parent: int) -> None:
    """Request that the kernel kills this process when its parent ends for any reason (Linux only)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent process has ended")


def _build(spec: dict[str, Any], events: EventWriter) -> None:
    values = spec["options"]
    options = BuildOptions(
        **values
        | {
            "backend": get_backend(values["backend"]),
            "compute_capabilities": tuple(values["compute_capabilities"]),
            "timing_cache": Path(values["timing_cache"]) if values["timing_cache"] else None,
            "plugins": tuple(map(Path, values["plugins"])),
        }
    )
    profiles: list[ProfileShapes] = [
        {name: (tuple(a), tuple(b), tuple(c)) for name, (a, b, c) in shapes.items()}
        for shapes in spec["profiles"]
    ]
    onnx_path, out_path = Path(spec["onnx"]), Path(spec["out"])

    trt = options.backend.load()
    logger = make_logger(trt, events)
    builder = steps.create_builder(trt, logger)
    for library in options.plugins:
        if not builder.get_plugin_registry().load_library(str(library)):
            raise EngineError(f"{trt.__name__} {trt.__version__} cannot load the plugin library {library}")

    events.send("phase", text="parsing the graph")
    started = time.monotonic()
    network = steps.parse(trt, builder, logger, onnx_path, options)
    for shapes in profiles:
        steps.check_inputs(network, shapes)
    decomposed = steps.allow_decomposition(trt, network, options.backend.fused_head_sizes)
    config = steps.configure(trt, builder, logger, options, profiles, make_monitor(trt, events))
    if options.timing_cache:
        steps.load_timing_cache(config, options.timing_cache)
    parsed = time.monotonic()

    with out_path.open("wb") as file:
        writer = steps.stream_writer(trt, file.write)
        good = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if not good:
        reason = logger.first_error or "no reason given"
        advice = f"; the build ran out of memory: {OUT_OF_MEMORY_ADVICE}" if is_out_of_memory(reason) else ""
        raise EngineError(
            f"{trt.__name__} {trt.__version__} cannot build an engine from {onnx_path}: {reason}{advice}"
        )
    if options.timing_cache:
        steps.save_timing_cache(config, options.timing_cache)
    memory = read_builder_memory(logger.memory_messages, len(profiles))
    events.send(
        "built",
        library_version=trt.__version__,
        layers=network.num_layers,
        decomposed_attentions=decomposed,
        parse_seconds=parsed - started,
        build_seconds=time.monotonic() - parsed,
        peak_memory=peak_memory(),
        gpu_memory=dataclasses.asdict(memory) if memory else None,
    )


if __name__ == "__main__":
    sys.exit(main())
