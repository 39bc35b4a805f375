"""Time and peak memory of one UNet step: plain, with SWS in each form, and in eager torch.

    python benchmarks/step.py --model examples/shapes/unet --batch 1 2 --size 32
    python examples/make_checkpoint.py --family sd15 --dtype fp32 --out sd15
    python benchmarks/step.py --model sd15 --logits 4 --size 64 --out benchmarks/results/step-sd15.json

Each case runs in a process of its own; ratios are to the plain graph in the same run. What the key guard
costs depends on the step: how far sampling has come, how peaked attention is, whether the KL budget binds.
`CASES` has one of each kind, and the attentions that ran tell which way a step went. Random weights make
attention flat; `--logits 4` multiplies the logits of the graphs. `--rtx` builds TensorRT-RTX engines too.
"""

import argparse
import collections
import dataclasses
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

MIDDLE = 2.6  # half of the way, where keys and values are mixed most
EARLY, LATE = 20.0, 0.5
TINY_BUDGET = {"kl_floor": 0.001, "kl_slope": 0.001}


@dataclasses.dataclass(frozen=True)
class GraphForm:
    """How a graph is made: plain where `guard` is None."""

    guard: str | None = None
    rows: Fraction = Fraction(1)
    parameters: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of one graph."""

    graph: str
    sigma: float = MIDDLE
    intensity: float = 0.5


GRAPHS = {
    "plain": GraphForm(),
    "sws": GraphForm("fused"),
    "sws-tiny-budget": GraphForm("fused", parameters=TINY_BUDGET),
    "sws-rows-1/8": GraphForm("fused", Fraction(1, 8)),
    "sws-literal": GraphForm("literal"),
}
CASES = {
    "plain": Case("plain"),
    "sws": Case("sws"),
    "sws-early": Case("sws", sigma=EARLY),
    "sws-late": Case("sws", sigma=LATE),
    "sws-off": Case("sws", intensity=0.0),
    "sws-binding": Case("sws-tiny-budget"),
    "sws-rows-1/8": Case("sws-rows-1/8"),
    "sws-rows-1/8-early": Case("sws-rows-1/8", sigma=EARLY),
    "sws-literal": Case("sws-literal"),
}
EAGER = ("torch-plain", "torch-node", "torch-reference")


def graph_path(folder: Path, form: str, target: str = "onnxruntime") -> Path:
    return folder / f"{form.replace('/', '-')}.{target}.onnx"


def write_graphs(
    model_path: Path, folder: Path, precision: str, forms: list[str], target: str, logits: float
) -> None:
    """Write the ONNX graph of each form to `folder`."""
    from graph_passes.clean_graph import CleanGraph
    from graph_passes.parameters import SwsParameters
    from sws_export.checkpoint import open_checkpoint
    from sws_export.onnx_export import export_plain
    from sws_export.onnx_files import save_onnx
    from sws_export.progress import Silent
    from sws_export.rewrite import GuardOptions, rewrite

    checkpoint = open_checkpoint(model_path)
    for name in forms:
        path, form = graph_path(folder, name, target), GRAPHS[name]
        if path.exists():
            continue
        model = export_plain(checkpoint, precision)
        scale_logits(model, logits)
        if form.guard is None:
            CleanGraph()(model)
        else:
            guard = GuardOptions(form.guard, form.rows)
            rewrite(model, SwsParameters(**form.parameters), (), guard, target, Silent())
        save_onnx(model, path, Silent())


def scale_logits(model: Any, factor: float) -> None:
    """Multiply the logits of all attentions."""
    import onnx_ir as ir

    for node in model.graph:
        if node.op_type == "Attention":
            scale = node.attributes.get_float("scale") or node.inputs[0].shape[3] ** -0.5
            node.attributes["scale"] = ir.AttrFloat32("scale", factor * scale)


def inputs_for(
    shapes: dict[str, tuple[list[Any], Any]], batch: int, size: int, case: Case
) -> dict[str, np.ndarray]:
    """Inputs by name for latents of `size` x `size`, the same in every case but for noise and strength."""
    known = {"batch": batch, "tokens": 77}
    feed = {}
    for name, (shape, dtype) in shapes.items():
        dims = [known.get(dim) or (dim if isinstance(dim, int) else _side(dim, size)) for dim in shape]
        if name == "sigma":
            value = np.full(dims, case.sigma)
        elif name == "intensity":
            value = np.full(dims, case.intensity)
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


def run_graph(path: Path, case: Case, batch: int, size: int, repeats: int, threads: int) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that wait in a loop would count as work.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        begin = time.perf_counter()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        load = time.perf_counter() - begin
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        shapes = {value.name: (value.shape, dtypes[value.type]) for value in session.get_inputs()}
        feed = inputs_for(shapes, batch, size, case)
        session.run(None, feed)
        executed = executed_nodes(Path(session.end_profiling()))
    result = measure(lambda: session.run(None, feed), repeats)
    return result | {"load_seconds": load, "attentions": executed["Attention"]}


def executed_nodes(profile: Path) -> collections.Counter[str]:
    """Nodes of each type that ran, those of branches that were not taken left out."""
    return collections.Counter(
        event["args"]["op_name"]
        for event in json.loads(profile.read_text("utf-8"))
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )


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
    inputs = {
        name: torch.from_numpy(value) for name, value in inputs_for(shapes, batch, size, Case(form)).items()
    }
    if form == "torch-plain":
        with torch.no_grad():
            return measure(lambda: call_unet(unet, inputs), repeats)
    if form == "torch-node":
        attention.row_entropies = _stored_entropies
        attention.largest_mixing = _stored_mixing
        attention.kl_divergence = _no_divergence
    reference = ReferenceUNet(unet, SwsParameters())
    sigma, intensity = (torch.full((batch,), value) for value in (MIDDLE, 0.5))
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
    import onnx_ir as ir

    graph = onnx.load(path, load_external_data=False).graph
    nodes = sum(1 for _ in ir.from_proto(graph).all_nodes())
    data = path.with_name(path.name + ".data")
    size = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
    return {"nodes": nodes, "initializers": len(graph.initializer), "file_bytes": size}


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
            tuple(inputs_for({value.name: (dims, np.float32)}, batch, side, Case("sws"))[value.name].shape)
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
            given = (task["precision"], task["forms"], task["target"], task["logits"])
            return write_graphs(model, folder, *given)
        case "describe":
            return describe_graph(graph_path(folder, task["form"]))
        case "rtx":
            return build_rtx(graph_path(folder, task["form"], "tensorrt-rtx"), task["size"])
    shared = (task["batch"], task["size"], task["repeats"], task["threads"])
    if task["case"] in CASES:
        step = CASES[task["case"]]
        return run_graph(graph_path(folder, step.graph), step, *shared)
    return run_eager(model, task["case"], *shared)


def in_process(**task: Any) -> Any:
    """The result of `worker(task)` in a new process, or {"error": text}."""
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def print_row(row: dict[str, Any], plain: dict[str, Any]) -> None:
    label = f"{row['case']:18} batch {row['batch']}"
    if "error" in row:
        print(f"{label}  {row['error']}", flush=True)
        return
    ratios = ""
    if "seconds" in plain:
        wall, cpu, memory = (row[key] / plain[key] for key in ("seconds", "cpu_seconds", "peak_bytes"))
        ratios = f"  x {wall:.2f} wall  x {cpu:.2f} CPU  x {memory:.2f} memory"
    figures = f"{row['seconds']:8.3f} s  {row['cpu_seconds']:8.3f} CPU s  {row['peak_bytes'] / 1e9:6.2f} GB"
    attentions = f"  {row['attentions']} attentions" if "attentions" in row else ""
    print(f"{label}  {figures}{ratios}{attentions}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of one UNet step.")
    parser.add_argument("--model", type=Path, help="checkpoint, as sws-export takes it")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=64, help="side of the latents")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *EAGER], default=[*CASES, *EAGER])
    parser.add_argument("--logits", type=float, default=1.0, help="factor of the logits of the graphs")
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

    graphs = list(dict.fromkeys(CASES[case].graph for case in arguments.cases if case in CASES))
    task = {
        "model": str(arguments.model),
        "folder": str(folder),
        "precision": arguments.precision,
        "logits": arguments.logits,
        "size": arguments.size,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
    }
    for target in ["onnxruntime", "tensorrt-rtx"] if arguments.rtx else ["onnxruntime"]:
        failed = in_process(kind="write", forms=graphs, target=target, **task)
        if failed:
            sys.exit(failed["error"])
    results: dict[str, Any] = {
        "model": arguments.model.name,
        "precision": arguments.precision,
        "logits": arguments.logits,
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
        for case in arguments.cases:
            row = {"case": case, "batch": batch}
            row |= in_process(kind="step", case=case, batch=batch, **task)
            plain = plain or (row if case == "plain" else {})
            results["steps"].append(row)
            print_row(row, plain)
    for form, graph in results["graphs"].items():
        if arguments.rtx:
            graph["rtx"] = in_process(kind="rtx", form=form, **task)
        print(f"{form:18} {graph}", flush=True)
    return results


if __name__ == "__main__":
    main()
