"""Times a step of a UNet with ONNX Runtime on a GPU: plain, with SWS, and with the guard on 1/8 of the rows.

    python -m benchmarks.gpu.onnxruntime_cuda pack CHECKPOINT FOLDER    where sws-export is installed
    python -m benchmarks.gpu.onnxruntime_cuda run FOLDER --out gpu.json    on the GPU

`pack` exports the graphs for `onnxruntime-cuda` in float16 and batch 2, without the weights of the model but
with all other initializers. `run` needs onnxruntime-gpu, onnx and torch: it fills the weights with random
numbers, so that a few MB are enough to carry. It writes the median time of a step, the GPU memory, where
nodes ran, the GPU time of each type of operator, and the difference from the CPU provider. The time of each
node goes to a file beside it, `NAME-FORM-nodes.json`.
"""

import argparse
import collections
import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper

from benchmarks.gpu.kernel_times import by_node, record_kernels, times_by_operator, write_nodes

FORMS: dict[str, list[str]] = {"plain": ["--plain"], "sws": [], "sws-rows-1/8": ["--guard-rows", "1/8"]}
WARM_UP, REPEATS = 5, 30
WEIGHTS = "weights.bin"
COMPARED = ("plain", "sws")
"""The forms that are compared with the CPU, if any are."""


def file_of(folder: Path, form: str) -> Path:
    """The graph of a form."""
    return folder / f"{form.replace('/', '-')}.onnx"


def pack(checkpoint: Path, folder: Path, side: int) -> None:
    """Export the graphs for images of `side` x `side` pixels and drop the model's weights."""
    sizes = ["--batch", "2", "--height", str(side), "--width", str(side), "--tokens", "77"]
    folder.mkdir(parents=True, exist_ok=True)
    weights: set[str] = set()
    for form, options in FORMS.items():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            path = Path(work) / "graph.onnx"
            command = ["sws-export", str(checkpoint), "--out", str(path), "--backend", "onnxruntime-cuda"]
            subprocess.run([*command, "--precision", "fp16", *sizes, "--no-validate", *options], check=True)
            model = onnx.load(path, load_external_data=False)
            external = {t.name: t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL}
            weights = weights or {name for name, t in external.items() if t.data_type == TensorProto.FLOAT16}
            for name, tensor in external.items():
                if name not in weights:
                    external_data_helper.load_external_data_for_tensor(tensor, work)
                    tensor.data_location = TensorProto.DEFAULT
                    del tensor.external_data[:]
        onnx.save(model, file_of(folder, form))


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values that keep the size of activations: ones for norms, zeros for biases, scaled noise else."""
    if len(shape) < 2:
        return np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float16)
    fan_in = math.prod(shape[1:]) if len(shape) == 4 else shape[0]
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return (values / math.sqrt(fan_in)).astype(np.float16)


def fill(folder: Path, target: Path, forms: Iterable[str]) -> None:
    """Write the graphs to `target` with one file of random weights."""
    places: dict[str, tuple[int, int]] = {}
    with (target / WEIGHTS).open("wb") as file:
        for form in forms:
            model = onnx.load(file_of(folder, form), load_external_data=False)
            for tensor in model.graph.initializer:
                if tensor.data_location != TensorProto.EXTERNAL:
                    continue
                if tensor.name not in places:
                    data = random_weight(tensor.name, tuple(tensor.dims), len(places)).tobytes()
                    places[tensor.name] = (file.tell(), len(data))
                    file.write(data)
                tensor.raw_data = b""  # set_external_data asks for it
                external_data_helper.set_external_data(tensor, WEIGHTS, *places[tensor.name])
                tensor.ClearField("raw_data")
            onnx.save(model, file_of(target, form))


def inputs_of(session: Any, intensity: float) -> dict[str, np.ndarray]:
    """Random inputs; states are zero, as before the first step."""
    generator = np.random.default_rng(0)
    values: dict[str, np.ndarray] = {}
    for value in session.get_inputs():
        dtype = np.float16 if "float16" in value.type else np.float32
        if value.name.startswith("sws_state"):
            values[value.name] = np.zeros(value.shape, dtype)
        elif value.name in ("timestep", "sigma", "intensity"):
            number = {"timestep": 500.0, "sigma": 3.0, "intensity": intensity}[value.name]
            values[value.name] = np.full(value.shape, number, dtype)
        else:
            values[value.name] = generator.standard_normal(value.shape, np.float32).astype(dtype)
    return values


def open_session(path: Path, provider: Any, *, profile: Path | None = None) -> Any:
    """A session that reports errors only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(path, options, providers=[provider])


def bind(session: Any, values: Mapping[str, np.ndarray]) -> tuple[Any, list[Any]]:
    """A binding of inputs and outputs in GPU memory, and the outputs."""
    import onnxruntime

    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value, "cuda", 0))
    outputs = []
    for output in session.get_outputs():
        dtype = np.float16 if "float16" in output.type else np.float32
        outputs.append(onnxruntime.OrtValue.ortvalue_from_shape_and_type(output.shape, dtype, "cuda", 0))
        binding.bind_ortvalue_output(output.name, outputs[-1])
    return binding, outputs


def run_step(session: Any, binding: Any) -> None:
    """One step, waited for."""
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()


def time_steps(session: Any, values: Mapping[str, np.ndarray]) -> tuple[float, list[np.ndarray]]:
    """Median milliseconds of a step with inputs and outputs in GPU memory, and the outputs."""
    binding, outputs = bind(session, values)
    for _ in range(WARM_UP):
        run_step(session, binding)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run_step(session, binding)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times), [output.numpy() for output in outputs]


def used_memory() -> int:
    """Bytes of GPU memory in use."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def profile_nodes(path: Path, values: Mapping[str, np.ndarray], nodes_file: Path) -> dict[str, Any]:
    """Number of nodes by provider, and GPU time by operator; that of each node goes to `nodes_file`."""
    prefix = path.with_suffix("")
    session = open_session(path, "CUDAExecutionProvider", profile=prefix)
    binding, _ = bind(session, values)
    runs, works = record_kernels(session, functools.partial(run_step, session, binding), prefix)
    pairs = by_node(works, runs)
    write_nodes(nodes_file, pairs)
    nodes = collections.Counter(run.provider for run in {run.node: run for run in runs}.values())
    return {"nodes": nodes, "kernels": times_by_operator(pairs)}


def measure(folder: Path, form: str, nodes_file: Path, *, compare: bool) -> dict[str, Any]:
    """All figures of one form; `compare` adds the differences from the CPU."""
    path, figures = file_of(folder, form), {}
    before = used_memory()
    session = open_session(path, "CUDAExecutionProvider")
    values = inputs_of(session, 0.5)
    figures["milliseconds"], outputs = time_steps(session, values)
    figures["gpu_bytes"] = used_memory() - before
    if "intensity" in values:
        idle = inputs_of(session, 0.0)
        figures["milliseconds_at_intensity_0"] = time_steps(session, idle)[0]
    del session
    try:
        graph = open_session(path, ("CUDAExecutionProvider", {"enable_cuda_graph": "1"}))
        figures["milliseconds_cuda_graph"] = time_steps(graph, values)[0]
        del graph
    except Exception as error:  # ONNX Runtime's exceptions share no base class; its rejection is the result
        figures["cuda_graph"] = str(error).splitlines()[0][:300]
    figures |= profile_nodes(path, values, nodes_file)
    if compare:
        figures |= compare_with_cpu(path, values, outputs)
    return figures


def compare_with_cpu(path: Path, values: dict[str, np.ndarray], outputs: list[np.ndarray]) -> dict[str, Any]:
    """Largest differences of `outputs` from those of the CPU provider, which takes half a minute."""
    cpu = open_session(path, "CPUExecutionProvider")
    exact = cpu.run(None, values)
    names = [output.name for output in cpu.get_outputs()]
    differences = {
        name: float(np.abs(a.astype(np.float32) - b.astype(np.float32)).max())
        for name, a, b in zip(names, outputs, exact, strict=True)
    }
    return {"difference_from_cpu": differences, "largest_prediction": float(np.abs(exact[0]).max())}


def run(folder: Path, out: Path, forms: Sequence[str], *, compare: bool) -> None:
    """Measure forms; the file is written after each."""
    import onnxruntime
    import torch

    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "onnxruntime": onnxruntime.__version__}
    with tempfile.TemporaryDirectory() as work:
        fill(folder, Path(work), forms)
        for form in forms:
            try:
                nodes_file = out.with_name(f"{out.stem}-{file_of(folder, form).stem}-nodes.json")
                results[form] = measure(Path(work), form, nodes_file, compare=compare and form in COMPARED)
            except Exception as error:  # as above; the other forms may still run
                results[form] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            print(form, json.dumps(results[form]), flush=True)
            out.write_text(json.dumps(results, indent=2) + "\n")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("checkpoint", type=Path)
    packing.add_argument("folder", type=Path)
    packing.add_argument("--side", type=int, default=512, help="pixels of an image; default 512")
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--forms", choices=FORMS, nargs="+", default=list(FORMS))
    running.add_argument("--no-compare", action="store_true", help="leave out the steps on the CPU")
    options = parser.parse_args()
    if options.command == "pack":
        pack(options.checkpoint, options.folder, options.side)
    else:
        run(options.folder, options.out, options.forms, compare=not options.no_compare)


if __name__ == "__main__":
    sys.exit(main())
