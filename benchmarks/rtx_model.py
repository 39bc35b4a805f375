"""Modelled time of a network on a GPU: bytes and floating-point operations of each layer (benchmarks/rtx.py).

The layers are those of TensorRT for RTX after parsing, with the shapes that the parser infers, so no figure
of a layer is put in by hand. Not a measurement: launch overhead and caches are ignored, and a layer takes the
longer of its arithmetic and its traffic at the rates given for the GPU. Elementwise operations, reductions,
concatenations and slices have the traffic of one kernel: they read what other layers wrote, and write what
others read. A reshape without a transposition moves nothing.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Rates of a GPU that kernels reach: operations and bytes a second.

    Attributes:
        attention: Fused float16 attention. H100: FlashAttention-3, head size 64, 4k tokens. RTX 4090: 56 % of
            the tensor cores with float32 sums.
        matmul: Float16 products and convolutions with float32 sums, 70 % of the tensor cores.
        float32: Products and convolutions of float32 without TF32, half of the arithmetic units.
        bandwidth: Of the device memory, 80 % of its nominal one.
        steps: Measured seconds of a plain step by model, batch 2; see docs/performance.md.
    """

    attention: float
    matmul: float
    float32: float
    bandwidth: float
    steps: dict[str, float]


GPUS = {
    "RTX 4090": Gpu(92e12, 115e12, 41e12, 0.8 * 1008e9, {"sd15": 25e-3, "sdxl": 110e-3}),
    "H100": Gpu(476e12, 690e12, 33e12, 0.8 * 3350e9, {"sdxl": 44e-3}),
}

_FUSED = {"ELEMENTWISE", "UNARY", "CAST", "ACTIVATION", "SELECT", "REDUCE", "SHUFFLE", "UNSQUEEZE", "SQUEEZE"}
_FUSED |= {"IDENTITY", "CONSTANT", "CONCATENATION", "SLICE"}
"""Layers that are computed where their operands are read, as one kernel with their neighbours."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one layer does.

    Attributes:
        kind: Type and, for products and attention, the shapes of the operands.
        unit: The rate of a GPU that limits its arithmetic.
        operations: Floating-point operations.
        bytes: Read and written in device memory.
    """

    kind: str
    unit: str
    operations: float
    bytes: float

    def seconds(self, gpu: Gpu) -> float:
        """Modelled time."""
        return max(self.operations / getattr(gpu, self.unit), self.bytes / gpu.bandwidth)


def network_layers(path: Path) -> int:
    """Number of layers of the graph at `path` after parsing."""
    with _parsed(path) as (_, network):
        return int(network.num_layers)


def network_work(path: Path) -> list[Work]:
    """The work of each layer of the graph at `path`, which has static shapes."""
    with _parsed(path) as (trt, network):
        layers = [network.get_layer(number) for number in range(network.num_layers)]
        outputs = {network.get_output(number).name for number in range(network.num_outputs)}
        return list(_works(trt, layers, outputs))


@contextlib.contextmanager
def _parsed(path: Path) -> Iterator[tuple[Any, Any]]:
    """The library, and the network of the graph at `path`, which lives as long as the builder."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise RuntimeError(parser.get_error(0).desc())
    yield trt, network


def _works(trt: Any, layers: list[Any], outputs: set[str]) -> Iterable[Work]:
    producers: dict[str, Any] = {}
    unfused_uses: collections.Counter[str] = collections.Counter()
    # By the name of a reshaped tensor, the one that it is a view of.
    stored: dict[str, Any] = {}
    for layer in layers:
        kind = _kind(layer)
        for tensor in _outputs(layer):
            producers[tensor.name] = layer
        if _is_reshape(trt, layer):
            (view,), source = _outputs(layer), layer.get_input(0)
            stored[view.name] = stored.get(source.name, source)
        elif kind not in _FUSED:
            unfused_uses.update({stored.get(x.name, x).name for x in _inputs(layer)})
    kinds = {name: _kind(layer) for name, layer in producers.items()}
    for layer in layers:
        kind = _kind(layer)
        if layer.get_output(0).name in stored:
            continue
        if kind in _FUSED:
            # A chain of fused layers reads what others wrote, and writes what others read.
            read = [stored.get(x.name, x) for x in _inputs(layer)]
            read = [x for x in read if kinds.get(x.name) not in _FUSED]
            written = [x for x in _outputs(layer) if unfused_uses[x.name] or x.name in outputs]
            traffic = _bytes(trt, read)
            if kind == "CONSTANT":
                traffic, written = 0.0, []
            elif kind == "SLICE":
                # It reads no more than it gives.
                traffic = min(traffic, _bytes(trt, _outputs(layer)))
            yield Work("fused elementwise", "float32", 0.0, traffic + _bytes(trt, written))
        elif kind == "ATTENTION_OUTPUT":
            continue
        else:
            yield _work(trt, layer, kind)


def _work(trt: Any, layer: Any, kind: str) -> Work:
    inputs, outputs = _inputs(layer), _outputs(layer)
    traffic = _bytes(trt, [*inputs, *outputs])
    unit = "float32" if inputs[0].dtype == trt.float32 else "matmul"
    if kind == "ATTENTION_INPUT":
        q, k, v = (tuple(x.shape) for x in inputs[:3])
        operations = 2.0 * math.prod(q[:3]) * k[2] * (q[3] + v[3])
        # Its output is as large as its queries.
        traffic = _bytes(trt, [*inputs[:3], inputs[0]])
        return Work(f"Attention {_text(q)} over {k[2]} keys", "attention", operations, traffic)
    if kind == "GATHER":
        # It reads what it writes, and no more than there is.
        read = min(_bytes(trt, inputs[:1]), _bytes(trt, outputs))
        return Work(kind.lower(), "float32", 0.0, read + _bytes(trt, outputs))
    if kind in ("MATRIX_MULTIPLY", "EINSUM"):
        a, b, y = (math.prod(x.shape) for x in (inputs[0], inputs[1], outputs[0]))
        batches = math.prod(outputs[0].shape[:-2]) if len(outputs[0].shape) > 2 else 1
        if math.prod(inputs[1].shape[:-2]) < batches:
            b *= batches
        # Of a product [M, K] x [K, N]: (M K) (K N) (M N) = (M K N)^2.
        operations = 2.0 * math.sqrt(float(a) * b / batches**2 * y / batches) * batches
        return Work(f"product {_text(outputs[0].shape)}, {inputs[0].dtype.name}", unit, operations, traffic)
    if kind in ("CONVOLUTION", "DECONVOLUTION"):
        layer.__class__ = trt.IConvolutionLayer if kind == "CONVOLUTION" else trt.IDeconvolutionLayer
        window = math.prod(layer.kernel_size_nd) / layer.num_groups
        x, y = inputs[0].shape, outputs[0].shape
        positions = math.prod(y) if kind == "CONVOLUTION" else math.prod(x)
        channels = x[1] if kind == "CONVOLUTION" else y[1]
        return Work(f"{kind.lower()} {_text(y)}", unit, 2.0 * positions * channels * window, traffic)
    return Work(kind.lower(), "float32", 0.0, traffic)


def _is_reshape(trt: Any, layer: Any) -> bool:
    """Whether the output has the elements of the input in the same order."""
    kind = _kind(layer)
    if kind != "SHUFFLE":
        return kind in ("SQUEEZE", "UNSQUEEZE")
    layer.__class__ = trt.IShuffleLayer
    in_order = list(range(trt.Dims.MAX_DIMS))
    permutations = (list(layer.first_transpose), list(layer.second_transpose))
    return all(order == in_order[: len(order)] for order in permutations)


def _kind(layer: Any) -> str:
    return str(layer.type).rsplit(".", 1)[-1]


def _inputs(layer: Any) -> list[Any]:
    return [x for x in map(layer.get_input, range(layer.num_inputs)) if x is not None]


def _outputs(layer: Any) -> list[Any]:
    return [layer.get_output(number) for number in range(layer.num_outputs)]


def _bytes(trt: Any, tensors: Iterable[Any]) -> float:
    unique = {tensor.name: tensor for tensor in tensors}
    return float(sum(math.prod(x.shape) * trt.DataType(x.dtype).itemsize for x in unique.values()))


def _text(shape: Iterable[int]) -> str:
    return " x ".join(str(dim) for dim in shape)


def added_time(plain: list[Work], sws: list[Work], gpu: Gpu) -> float:
    """Modelled seconds that the second network takes longer."""
    return sum(work.seconds(gpu) for work in sws) - sum(work.seconds(gpu) for work in plain)


def added_work(plain: list[Work], sws: list[Work]) -> list[dict[str, Any]]:
    """The kinds of work that the second network has more of, those with the most time on the first GPU first.

    Each row has the number of layers, operations and bytes, and the seconds by GPU.
    """
    totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for sign, works in ((1, sws), (-1, plain)):
        for work in works:
            row = totals[work.kind]
            row.update({"count": sign})
            for key, value in (("operations", work.operations), ("bytes", work.bytes)):
                row[key] += sign * value  # type: ignore[assignment]
            for name, gpu in GPUS.items():
                row[name] += sign * work.seconds(gpu)  # type: ignore[assignment]
    rows = [
        {"kind": kind, **totals[kind]} for kind in totals if totals[kind]["count"] or totals[kind]["bytes"]
    ]
    return sorted(rows, key=lambda row: -row[next(iter(GPUS))])
