"""Time and peak memory of one float32 `Attention` in ONNX Runtime, whole and in query chunks.

    python benchmarks/query_rows.py --out benchmarks/results/query_rows.json

8 heads of 40 channels, as on the largest grid of SD1.5 at 512 x 512, and 10 of 64, as in SDXL at 1024 x 1024.
Each case runs in its own process, one after the other, in several rounds; ratios are those of the fastest
runs.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
from step_work import measure

TOKENS = 4096
CHUNKS = (1, 2, 4, 8, 16)
MODELS = {"8 x 40": (8, 40, 40), "8 x 42, values 82": (8, 42, 82), "10 x 64": (10, 64, 64)}
ROUNDS = 3


def run(heads: int, size: int, values: int, chunks: int) -> dict[str, float]:
    """Seconds of the fastest of three runs, and the growth of the peak memory of the process, in bytes."""
    import onnx_ir as ir
    import onnxruntime

    shapes = {"q": size, "k": size, "v": values}
    inputs = {
        name: ir.Value(
            name=name, shape=ir.Shape((1, heads, TOKENS, width)), type=ir.TensorType(ir.DataType.FLOAT)
        )
        for name, width in shapes.items()
    }
    q, k, v = inputs.values()
    if chunks == 1:
        nodes = [ir.node("Attention", [q, k, v])]
    else:
        split = ir.node("Split", [q], {"axis": 2, "num_outputs": chunks}, num_outputs=chunks)
        attentions = [ir.node("Attention", [rows, k, v]) for rows in split.outputs]
        joined = ir.node("Concat", [node.outputs[0] for node in attentions], {"axis": 2})
        nodes = [split, *attentions, joined]
    output = nodes[-1].outputs[0]
    output.name, output.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([q, k, v], [output], nodes=nodes, opset_imports={"": 23}, name="attention")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    proto = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feed = {
        name: rng.standard_normal((1, heads, TOKENS, width), dtype=np.float32)
        for name, width in shapes.items()
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = measure(lambda: session.run(None, feed), repeats=3)
    return {"seconds": measured["seconds"], "peak_bytes": measured["peak_bytes"] - before}


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention whole and in query chunks.")
    parser.add_argument("--out", type=Path, help="JSON file with the results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(run(*json.loads(arguments.worker))))
        return
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for _ in range(ROUNDS):
        for name, model in MODELS.items():
            for chunks in CHUNKS:
                command = [sys.executable, __file__, "--worker", json.dumps([*model, chunks])]
                measured = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                row = rows.setdefault((name, chunks), measured)
                row["seconds"] = min(row["seconds"], measured["seconds"])
    results = []
    for (name, chunks), row in rows.items():
        whole = rows[name, 1]
        ratios = {f"{key}_of_whole": row[key] / whole[key] for key in ("seconds", "peak_bytes")}
        results.append({"attention": name, "chunks": chunks, **row, **ratios})
        print(results[-1], flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
