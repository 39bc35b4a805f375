"""The tables of 8-bit engines in `benchmarks/README.md` are those of the report."""

import json

from benchmarks.quantization import REPORT, ROOT, engine_table, error_table


def test_the_page_has_the_tables_of_the_report() -> None:
    report = json.loads(REPORT.read_text("utf-8"))
    page = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    assert engine_table(report) in page
    assert error_table(report) in page


def test_a_row_has_the_error_at_full_size() -> None:
    engine = {"plan": 10**9, "weights": None, "activations": None, "seconds": 1.4, "host_memory": 2 * 10**9}
    sizes = {"batch": 1, "height": 64, "width": 64}
    errors = {"error": 0.5, "reference": "eager reference in float32", "sizes": sizes}
    small = errors | {"error": 0.25, "reference": "eager reference in float64"}
    report = {
        "sd15": {
            "fp16": {"engine": engine, "error": small},
            "int8": {"engine": engine | {"plan": 5 * 10**8}, "error at 512": errors},
        }
    }
    *_, half = engine_table(report).splitlines()
    unknown = "0.500 | unknown | unknown | 1 s | 2.000 GB | 5.0e-01 |"
    assert half == f"| SD1.5, random weights | int8 | 0.500 GB | {unknown}"
    small_row, full_row = error_table(report).splitlines()[2:]
    assert small_row == "| SD1.5, random weights | 1 × 64 × 64 | float64 | 2.5e-01 |  |  |  |  |"
    assert full_row == "| SD1.5, random weights | 1 × 64 × 64 | float32 |  |  |  | 5.0e-01 |  |"
