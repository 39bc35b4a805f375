"""Time and peak memory of one UNet step: plain, with SWS in each form, and in eager torch.

    python benchmarks/step.py --model examples/shapes/unet --batch 1 2 --size 32
    python examples/make_checkpoint.py --family sd15 --dtype fp32 --out sd15
    python benchmarks/step.py --model sd15 --batch 1 2 --size 64 --out benchmarks/results/step-sd15.json

Each form runs in a process of its own; ratios are to the plain graph in the same run. `--rtx` builds
TensorRT-RTX engines of the graphs too.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIGMA = 2.6  # half of the way, where keys and values are mixed most
INTENSITY = 0.5
GRAPHS = {
    "plain": None,
    "sws": ("fused", Fraction(1)),
    "sws-rows-1/8": ("fused", Fraction(1, 8)),
    "sws-literal": ("literal", Fraction(1)),
}
EAGER = ("torch-plain", "torch-node", "torch-reference")


def graph_path(folder: Path, form: str) -> Path:
    return folder / f"{form.replace('/', '-')}.onnx"


def write_graphs(model_path: Path, folder: Path, precision: str, forms: list[str], narrow: bool) -> None:
    """Write the ONNX graph of each form to `folder`."""
    import onnx_ir as ir

    from graph_passes.clean_graph import CleanGraph
    from graph_passes.find_sites import find_sites
    from graph_passes.insert_sws import InsertSws
    from graph_passes.lower_functions import LowerFunctions
    from graph_passes.parameters import SwsParameters
    from sws_export.checkpoint import open_checkpoint
    from sws_export.onnx_export import export_plain
    from sws_export.onnx_files import save_onnx
    from sws_export.progress import Silent

    checkpoint = open_checkpoint(model_path)
    for form in forms:
        if graph_path(folder, form).exists():
            continue
        model = export_plain(checkpoint, precision)
        if GRAPHS[form] is not None:
            guard, rows = GRAPHS[form]
            statistics = model.graph.outputs[0].dtype if narrow else ir.DataType.FLOAT
            InsertSws(find_sites(model)[0], SwsParameters(), guard, rows, statistics)(model)
            LowerFunctions()(model)
        CleanGraph()(model)
        save_onnx(model, graph_path(folder, form), Silent())


def inputs_for(shapes: dict[str, tuple[list[Any], Any]], batch: int, size: int) -> dict[str, np.ndarray]:
    """Inputs by name for latents of `size` x `size`, the same in every form."""
    known = {"batch": batch, "tokens": 77}
    feed = {}
    for name, (shape, dtype) in shapes.items():
        dims = [known.get(dim) or (dim if isinstance(dim, int) else _side(dim, size)) for dim in shape]
        if name == "sigma":
            value = np.full(dims, SIGMA)
        elif name == "intensity":
            value = np.full(dims, INTENSITY)
        elif name == "timestep":
            value = np.full(dims, 500.0)
        elif name.startswith("sws_state"):
            value = np.zeros(dims)
        else:
            value = np.random.default_rng(len(name)).standard_normal(dims)
        feed[name] = value.astype(dtype)
    return feed


def _side(dim: str, size: int) -> int:
    _, _, factor = dim.partition("/")
    return -(-size // int(factor or 1))


def measure(step: Callable[[], Any], repeats: int) -> dict[str, float]:
    """The fastest of `repeats` steps after one to warm up, and the peak memory so far.

    CPU seconds are those of all threads: other work on the machine disturbs them less than the wall time.
    """
    wall, cpu = [], []
    for _ in range(1 + repeats):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - cpu_begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": min(wall[1:]), "cpu_seconds": min(cpu[1:]), "peak_bytes": peak}


def run_graph(path: Path, batch: int, size: int, repeats: int, threads: int) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that wait in a loop would count as work.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    begin = time.perf_counter()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    load = time.perf_counter() - begin
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    shapes = {value.name: (value.shape, dtypes[value.type]) for value in session.get_inputs()}
    feed = inputs_for(shapes, batch, size)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = measure(lambda: session.run(None, feed), repeats)
    return result | {"load_seconds": load, "loaded_bytes": loaded}


def run_eager(
    model_path: Path, form: str, batch: int, size: int, repeats: int, threads: int
) -> dict[str, Any]:
    import torch

    from graph_passes.parameters import SwsParameters
    from sws_export.checkpoint import open_checkpoint
    from sws_export.contract import unet_inputs
    from sws_export.reference import ReferenceUNet, attention
    from sws_export.unet import call_unet, load_unet, unet_arguments

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model_path)
    unet = load_unet(checkpoint, torch.float32)
    shapes = {spec.name: (list(spec.shape), np.float32) for spec in unet_inputs(checkpoint.config, "float32")}
    inputs = {name: torch.from_numpy(value) for name, value in inputs_for(shapes, batch, size).items()}
    if form == "torch-plain":
        with torch.no_grad():
            return measure(lambda: call_unet(unet, inputs), repeats)
    if form == "torch-node":
        attention.row_entropies = _stored_entropies
        attention.largest_mixing = _stored_mixing
        attention.kl_divergence = _no_divergence
    reference = ReferenceUNet(unet, SwsParameters())
    sigma, intensity = torch.full((batch,), SIGMA), torch.full((batch,), INTENSITY)
    arguments = unet_arguments(inputs)
    return measure(lambda: reference.step(sigma=sigma, intensity=intensity, **arguments), repeats)


def _stored_entropies(q: Any, k: Any) -> Any:
    """As the node does it: the logits of all heads at once, and softmax over them."""
    log_a0 = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).log_softmax(-1)
    return -(log_a0.exp() * log_a0).sum(-1)


def _stored_mixing(q: Any, k: Any, kp: Any, limit: Any, kappa: Any, parameters: Any) -> Any:
    """As the node does it: an attention over all heads for each of seven steps."""
    import torch

    scale = 1 / math.sqrt(q.shape[-1])
    log_a0 = (q @ k.transpose(-1, -2) * scale).log_softmax(-1)
    low, high = torch.zeros_like(limit), limit
    for _ in range(parameters.bisection_steps):
        middle = (low + high) / 2
        mixed = k + middle[:, None, None, None] * (kp - k)
        log_a = (q @ mixed.transpose(-1, -2) * scale).log_softmax(-1)
        within = (log_a.exp() * (log_a - log_a0)).sum(-1).mean((1, 2)) <= kappa
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return low


def _no_divergence(*arguments: Any) -> Any:
    """The reference records the divergence at the share found; the node does not compute it."""
    return arguments[-1]


def describe_graph(path: Path) -> dict[str, int]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    data = path.with_name(path.name + ".data")
    size = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
    return {"nodes": len(graph.node), "initializers": len(graph.initializer), "file_bytes": size}


def build_rtx(path: Path, size: int) -> dict[str, Any]:
    """Build an engine for latents up to `size` x `size` and batch 2; what it took."""
    import onnx

    from sws_export.engines.backend import BuildOptions
    from sws_export.engines.build import build_engine
    from sws_export.engines.tensorrt_rtx import BACKEND

    graph = onnx.load(path, load_external_data=False).graph
    shapes = {}
    for value in graph.input:
        dims = [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        shapes[value.name] = tuple(
            tuple(inputs_for({value.name: (dims, np.float32)}, batch, side)[value.name].shape)
            for batch, side in ((1, size // 2), (2, size), (2, size))
        )
    with tempfile.TemporaryDirectory() as folder:
        report = build_engine(path, Path(folder) / "plan", shapes, BuildOptions(BACKEND, ("8.9",)))
    return {
        "plan_bytes": report.size,
        "build_seconds": report.parse_seconds + report.build_seconds,
        "layers": report.layers,
        "peak_bytes": report.peak_memory,
        "decomposed_attentions": report.decomposed_attentions,
    }


def worker(task: dict[str, Any]) -> Any:
    """One measurement; the only thing its process does."""
    folder, model = Path(task["folder"]), Path(task["model"])
    match task["kind"]:
        case "write":
            return write_graphs(model, folder, task["precision"], task["forms"], task["narrow"])
        case "describe":
            return describe_graph(graph_path(folder, task["form"]))
        case "rtx":
            return build_rtx(graph_path(folder, task["form"]), task["size"])
    shared = (task["batch"], task["size"], task["repeats"], task["threads"])
    if task["form"] in GRAPHS:
        return run_graph(graph_path(folder, task["form"]), *shared)
    return run_eager(model, task["form"], *shared)


def in_process(**task: Any) -> Any:
    """The result of `worker(task)` in a new process, or {"error": text}."""
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def print_row(row: dict[str, Any], plain: dict[str, Any]) -> None:
    label = f"{row['form']:18} batch {row['batch']}"
    if "error" in row:
        print(f"{label}  {row['error']}", flush=True)
        return
    ratios = ""
    if "seconds" in plain:
        wall, cpu, memory = (row[key] / plain[key] for key in ("seconds", "cpu_seconds", "peak_bytes"))
        ratios = f"  x {wall:.2f} wall  x {cpu:.2f} CPU  x {memory:.2f} memory"
    figures = f"{row['seconds']:8.3f} s  {row['cpu_seconds']:8.3f} CPU s  {row['peak_bytes'] / 1e9:6.2f} GB"
    print(f"{label}  {figures}{ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of one UNet step.")
    parser.add_argument("--model", type=Path, help="checkpoint, as sws-export takes it")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=64, help="side of the latents")
    parser.add_argument("--forms", nargs="+", choices=[*GRAPHS, *EAGER], default=[*GRAPHS, *EAGER])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rtx", action="store_true", help="build TensorRT-RTX engines too")
    parser.add_argument(
        "--work", type=Path, help="folder for the graphs, which are made once; default: a temporary one"
    )
    parser.add_argument("--out", type=Path, help="JSON file with the results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(json.loads(arguments.worker))))
        return
    if arguments.model is None:
        parser.error("--model is missing")
    with tempfile.TemporaryDirectory() as temporary:
        results = run_all(arguments, arguments.work or Path(temporary))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def run_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure and print; the results as they go into the JSON file."""
    import onnxruntime

    graphs = [form for form in arguments.forms if form in GRAPHS]
    task = {
        "model": str(arguments.model),
        "folder": str(folder),
        "precision": arguments.precision,
        "size": arguments.size,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
    }
    failed = in_process(kind="write", forms=graphs, narrow=arguments.rtx, **task)
    if failed:
        sys.exit(failed["error"])
    results: dict[str, Any] = {
        "model": arguments.model.name,
        "precision": arguments.precision,
        "latent_size": arguments.size,
        "threads": arguments.threads,
        "machine": platform.processor() or platform.machine(),
        "onnxruntime": onnxruntime.__version__,
        "load_average": os.getloadavg()[0],
        "graphs": {form: in_process(kind="describe", form=form, **task) for form in graphs},
        "steps": [],
    }
    for batch in arguments.batch:
        plain: dict[str, Any] = {}
        for form in arguments.forms:
            row = {"form": form, "batch": batch}
            row |= in_process(kind="step", form=form, batch=batch, **task)
            plain = plain or (row if form == "plain" else {})
            results["steps"].append(row)
            print_row(row, plain)
    for form, graph in results["graphs"].items():
        if arguments.rtx:
            graph["rtx"] = in_process(kind="rtx", form=form, **task)
        print(f"{form:18} {graph}", flush=True)
    return results


if __name__ == "__main__":
    main()
