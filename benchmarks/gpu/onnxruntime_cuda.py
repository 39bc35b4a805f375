"""Times a step of SD1.5 with ONNX Runtime on a GPU: plain, with SWS, and with the guard on 1/8 of the rows.

    python -m benchmarks.gpu.onnxruntime_cuda pack CHECKPOINT FOLDER    where sws-export is installed
    python -m benchmarks.gpu.onnxruntime_cuda run FOLDER --out gpu.json    on the GPU

`pack` exports the graphs for `onnxruntime-cuda` in float16, 512² and batch 2, and keeps the values of those
initializers only that are no weights of the model. `run` needs onnxruntime-gpu, onnx and torch: it fills the
weights with random numbers, so that a few MB are enough to carry. It writes the median time of a step, the
GPU memory, where nodes ran, and the difference from the CPU provider.
"""

import argparse
import collections
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper

FORMS: dict[str, list[str]] = {"plain": ["--plain"], "sws": [], "sws-rows-1/8": ["--guard-rows", "1/8"]}
SIZES = ["--batch", "2", "--height", "512", "--width", "512", "--tokens", "77"]
WARM_UP, REPEATS = 5, 30
WEIGHTS = "weights.bin"
COMPARED = ("plain", "sws")


def file_of(folder: Path, form: str) -> Path:
    """The graph of a form."""
    return folder / f"{form.replace('/', '-')}.onnx"


def pack(checkpoint: Path, folder: Path) -> None:
    """Export the graphs and drop the model's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights: set[str] = set()
    for form, options in FORMS.items():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            path = Path(work) / "graph.onnx"
            command = ["sws-export", str(checkpoint), "--out", str(path), "--backend", "onnxruntime-cuda"]
            subprocess.run([*command, "--precision", "fp16", *SIZES, "--no-validate", *options], check=True)
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


def fill(folder: Path, target: Path) -> None:
    """Write the graphs to `target` with one file of random weights."""
    places: dict[str, tuple[int, int]] = {}
    with (target / WEIGHTS).open("wb") as file:
        for form in FORMS:
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


def time_steps(session: Any, values: dict[str, np.ndarray]) -> tuple[float, list[np.ndarray]]:
    """Median milliseconds of a step with inputs and outputs in GPU memory, and the outputs."""
    import onnxruntime

    binding = session.io_binding()
    kept = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(value, "cuda", 0) for name, value in values.items()
    }
    for name, value in kept.items():
        binding.bind_ortvalue_input(name, value)
    outputs = []
    for output in session.get_outputs():
        dtype = np.float16 if "float16" in output.type else np.float32
        outputs.append(onnxruntime.OrtValue.ortvalue_from_shape_and_type(output.shape, dtype, "cuda", 0))
        binding.bind_ortvalue_output(output.name, outputs[-1])
    for _ in range(WARM_UP):
        session.run_with_iobinding(binding)
    times = []
    for _ in range(REPEATS):
        binding.synchronize_inputs()
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times), [output.numpy() for output in outputs]


def used_memory() -> int:
    """Bytes of GPU memory in use."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def nodes_by_provider(trace: Path) -> dict[str, int]:
    """Number of nodes that each provider ran, from a profile of one run.

    Its times are those of the CPU, with the search for convolution algorithms in them: no measure of the GPU.
    """
    return collections.Counter(
        event["args"]["provider"]
        for event in json.loads(trace.read_text())
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )


def measure(folder: Path, form: str) -> dict[str, Any]:
    """All figures of one form."""
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
    profiled = open_session(path, "CUDAExecutionProvider", profile=folder / "profile")
    profiled.run(None, values)
    figures["nodes"] = nodes_by_provider(Path(profiled.end_profiling()))
    del profiled
    if form in COMPARED:
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


def run(folder: Path, out: Path) -> None:
    """Measure every form; the file is written after each."""
    import onnxruntime
    import torch

    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "onnxruntime": onnxruntime.__version__}
    with tempfile.TemporaryDirectory() as work:
        fill(folder, Path(work))
        for form in FORMS:
            try:
                results[form] = measure(Path(work), form)
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
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "pack":
        pack(options.checkpoint, options.folder)
    else:
        run(options.folder, options.out)


if __name__ == "__main__":
    sys.exit(main())
