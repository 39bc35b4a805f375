"""Tables of the results of benchmarks/step.py, with ratios to the plain UNet of each group."""

from typing import Any

Rows = dict[str, dict[str, Any]]


def print_row(group: str, name: str, rows: Rows) -> None:
    """Print the result of one case."""
    row = rows[f"{group} | {name}"]
    text = row.get("error") or "  ".join(filter(None, _cells(row, _plain_of(row, rows))))
    print(f"    {text}", flush=True)


def table(rows: Rows) -> str:
    """All cases as Markdown, one table per group."""
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows.values()):
        first = next(row for row in rows.values() if row["group"] == group)
        rtx = first["kind"] == "rtx"
        lines += ["", f"**{group}**", ""]
        names = ("build", "peak", "layers", "plan") if rtx else ("wall", "CPU", "peak", "attentions")
        lines += [f"| | {' | '.join(names)} | nodes |", "|---|---|---|---|---|---|"]
        for row in rows.values():
            if row["group"] == group:
                cells = [row["error"]] if "error" in row else _cells(row, _plain_of(row, rows))
                lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def _plain_of(row: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """The plain UNet that a row is compared with: torch rows with torch, others with the plain graph."""
    name = "torch plain" if row["kind"] == "torch" else "plain"
    plain = rows.get(f"{row['group']} | {name}", {})
    return {} if plain is row else plain


def _cells(row: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    wall = f"{row['seconds']:.3g} s" + _ratio(row, plain, "seconds")
    peak = f"{row['peak_bytes'] / 1e9:.2f} GB" + _ratio(row, plain, "peak_bytes")
    nodes = str(row["graph"]["nodes"]) if "graph" in row else ""
    if row["kind"] == "rtx":
        plan = f"{row['plan_bytes'] / 1e6:.1f} MB" + _ratio(row, plain, "plan_bytes", digits=3)
        return [wall, peak, str(row["layers"]), plan, nodes]
    cpu = f"{row['cpu_seconds']:.3g} s" + _ratio(row, plain, "cpu_seconds")
    return [wall, cpu, peak, str(row.get("attentions", "")), nodes]


def _ratio(row: dict[str, Any], plain: dict[str, Any], key: str, digits: int = 2) -> str:
    return f" ({row[key] / plain[key]:.{digits}f} ×)" if key in plain else ""
