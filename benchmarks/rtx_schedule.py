"""Kernels of a TensorRT for RTX engine in their order, and the tensors alive at once; no GPU is needed.

    python benchmarks/rtx_schedule.py bench/sd15/sws.onnx --peaks 3

The graph has static shapes, such as those that benchmarks/rtx.py writes. With detailed profiling verbosity
the builder's log lists the kernels of the engine in the order of their execution, with their operands. A
tensor is alive from the kernel that writes it to the last one that reads it. Inputs and outputs of the engine
are not counted. The sum of the tensors alive is less than the builder's activation memory, which has gaps
between tensors and workspaces of kernels.
"""

import argparse
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_TENSOR = re.compile(r"\{ Name: (\S+), Dimensions: \[([\d,]*)\].*?Datatype: (\w+)")
_BYTES = {"Half": 2, "BFloat16": 2, "Float": 4, "Int32": 4, "Int64": 8, "Bool": 1, "Int8": 1, "FP8": 1}
_SHOWN_BYTES = 500_000


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel with the sizes of its operands in bytes, by name.

    Attributes:
        name: As in the log.
        read: Inputs.
        constants: Weights and other constants.
        written: Outputs.
    """

    name: str
    read: Mapping[str, int]
    constants: Mapping[str, int]
    written: Mapping[str, int]

    @property
    def traffic(self) -> int:
        """Bytes of all operands."""
        return sum((self.read | self.constants | self.written).values())  # type: ignore[operator]


def parse_kernels(log: Iterable[str]) -> list[Kernel]:
    """The kernels in the messages of a build, in order."""
    kernels = []
    for line in "\n".join(log).splitlines():
        if not line.startswith("Name: ") or ", Outputs: [" not in line:
            continue
        name, rest = line.removeprefix("Name: ").split(", LayerType: ", 1)
        before, written = rest.split(", Outputs: [", 1)
        read, _, constants = before.partition("Constants: [")
        sizes = [_sizes(text) for text in (read, constants, written.split(", TacticName: ")[0])]
        # Signals between streams have no operands.
        if any(sizes):
            kernels.append(Kernel(name, *sizes))
    return kernels


def _sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, dimensions, dtype in _TENSOR.findall(text):
        size = math.prod(int(number) for number in dimensions.split(",") if number) * _BYTES[dtype]
        sizes[name] = max(size, sizes.get(name, 0))
    return sizes


def alive(kernels: list[Kernel], outputs: Iterable[str]) -> list[dict[str, int]]:
    """The tensors alive at each kernel, by name with their bytes; without `outputs` of the engine."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for number, kernel in enumerate(kernels):
        for name, size in kernel.written.items():
            first.setdefault(name, number)
            sizes[name] = max(size, sizes.get(name, 0))
        last.update(dict.fromkeys((*kernel.read, *kernel.written), number))
    kept = first.keys() - set(outputs)
    return [
        {name: sizes[name] for name in kept if first[name] <= number <= last[name]}
        for number in range(len(kernels))
    ]


def build_log(path: Path) -> tuple[list[str], list[str]]:
    """The messages of a build for compute capability 8.9, and the names of the engine's outputs."""
    import tensorrt_rtx as trt

    messages: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def log(self, _: Any, message: str) -> None:
            messages.append(message)

    logger = Log()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise RuntimeError(parser.get_error(0).desc())
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if builder.build_serialized_network(network, config) is None:
        raise RuntimeError(f"no engine was built from {path}")
    return messages, [network.get_output(number).name for number in range(network.num_outputs)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels of an engine, and the tensors alive at once.")
    parser.add_argument("graph", type=Path, help="ONNX file with static shapes")
    parser.add_argument("--peaks", type=int, default=1, help="kernels to show, those with most bytes alive")
    arguments = parser.parse_args()
    log, outputs = build_log(arguments.graph)
    print(*(line for line in log if line.startswith(("Total Activation", "Total Weights"))), sep="\n")
    kernels = parse_kernels(log)
    print(f"{len(kernels)} kernels, traffic {sum(kernel.traffic for kernel in kernels) / 1e6:.0f} MB")
    tensors = alive(kernels, outputs)
    totals = [sum(of_kernel.values()) for of_kernel in tensors]
    for number in sorted(range(len(kernels)), key=lambda number: -totals[number])[: arguments.peaks]:
        print(f"\nkernel {number}, {totals[number] / 1e6:.1f} MB alive: {kernels[number].name}")
        for name, size in sorted(tensors[number].items(), key=lambda pair: -pair[1]):
            if size >= _SHOWN_BYTES:
                print(f"  {size / 1e6:6.2f} MB  {name}")


if __name__ == "__main__":
    main()
