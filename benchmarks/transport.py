"""Time of the two forms of the transport on each grid: tiles, or one dense product.

    python benchmarks/transport.py --out benchmarks/results/transport.json

Milliseconds for keys and values of one site in ONNX Runtime with static shapes, including its share of the
work done once per grid and step. `DENSE_TOKENS` in graph_passes/choose_transport.py follows from the table.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BAND = 145
GRIDS = [
    # model, rows and columns of the grid, channels of keys and values, sites that share the grid
    ("SD1.5 512", 64, 64, 640, 5),
    ("SD1.5 512", 32, 32, 1280, 5),
    ("SD1.5 512", 16, 16, 2560, 5),
    ("SD1.5 512", 8, 8, 2560, 1),
    ("SDXL 1024", 64, 64, 1280, 10),
    ("SDXL 1024", 32, 32, 2560, 10),  # of 60
    ("SDXL 512", 16, 16, 2560, 10),  # of 60
    ("SD1.5 768", 48, 48, 1280, 5),
    ("SD1.5 768", 24, 24, 2560, 5),
    # Text of 77 and 231 tokens: cross-attention sites selected by --sites.
    ("SD1.5 text", 1, 77, 2560, 5),
    ("SDXL text", 1, 77, 2560, 10),  # of 60
    ("SDXL text", 1, 231, 2560, 10),
]


def graph_of(form: str, height: int, width: int, channels: int, sites: int, batch: int) -> bytes:
    """A graph that applies one transport to the keys and values of `sites` sites."""
    import onnx_ir as ir

    from graph_passes.clean_graph import CleanGraph
    from graph_passes.fold_constants import FoldConstants
    from graph_passes.functions.banded_transport import build_banded_transport
    from graph_passes.functions.dense_transport import build_dense_transport
    from graph_passes.lower_functions import LowerFunctions

    kind = ir.TensorType(ir.DataType.FLOAT)
    function = (build_dense_transport if form == "dense" else build_banded_transport)(ir.DataType.FLOAT)
    band = ir.Value(name="band", type=kind, shape=ir.Shape([batch, BAND, height, width]))
    tokens = [
        [
            ir.Value(name=f"{name}{i}", type=kind, shape=ir.Shape([batch, height * width, channels // 2]))
            for name in "kv"
        ]
        for i in range(sites)
    ]
    calls = [ir.node(function.name, [band, *pair], domain="sws", num_outputs=2) for pair in tokens]
    outputs = [output for call in calls for output in call.outputs]
    for number, output in enumerate(outputs):
        output.name, output.type = f"y{number}", kind
    graph = ir.Graph(
        [band, *(x for pair in tokens for x in pair)],
        outputs,
        nodes=calls,
        opset_imports={"": 23, "sws": 1},
        name=form,
    )
    model = ir.Model(graph, ir_version=10, functions=[function])
    LowerFunctions()(model)
    FoldConstants()(model)
    CleanGraph()(model)
    return ir.to_proto(model).SerializeToString()


def milliseconds(
    form: str, height: int, width: int, channels: int, sites: int, batch: int, repeats: int
) -> float:
    """Milliseconds per site of the fastest of `repeats` runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        graph_of(form, height, width, channels, sites, batch), options, providers=["CPUExecutionProvider"]
    )
    random = np.random.default_rng(0)
    feed = {value.name: random.random(value.shape, dtype=np.float32) for value in session.get_inputs()}
    session.run(None, feed)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        session.run(None, feed)
        seconds.append(time.perf_counter() - begin)
    return min(seconds) * 1000 / sites


def main() -> None:
    parser = argparse.ArgumentParser(description="Tiles against one dense product.")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose model name contains TEXT")
    parser.add_argument("--out", type=Path, help="JSON file with the results")
    arguments = parser.parse_args()
    import onnxruntime

    rows: list[dict[str, Any]] = []
    for model, height, width, channels, sites in (row for row in GRIDS if arguments.only in row[0]):
        row: dict[str, Any] = {"model": model, "grid": [height, width], "channels": channels, "sites": sites}
        for form in ("tiles", "dense"):
            row[form] = milliseconds(form, height, width, channels, sites, arguments.batch, arguments.repeats)
        rows.append(row)
        grid = f"{model:10} {height:3} x {width:<3} {channels:5} channels, {sites:2} sites"
        times = f"tiles {row['tiles']:8.2f} ms, dense {row['dense']:8.2f} ms"
        print(f"{grid}: {times}, {row['dense'] / row['tiles']:.2f} x", flush=True)
    results = {
        "onnxruntime": onnxruntime.__version__,
        "threads": len(os.sched_getaffinity(0)),
        "batch": arguments.batch,
        "load_average": os.getloadavg()[0],
        "milliseconds_a_site": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
