"""Tables and lists of a report."""

from collections.abc import Mapping

import numpy as np
from markupsafe import Markup

from sws_export.report.explanation import Explanation
from sws_export.report.templates import MACROS


def definitions(entries: Mapping[str, str]) -> Markup:
    """Entries of a definition list."""
    return MACROS.definitions([(name, [text]) for name, text in entries.items()])


def duration(seconds: float) -> str:
    """Seconds, or milliseconds below one second."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def steps_table(explanation: Explanation) -> Markup:
    """One row per step."""
    compared = explanation.steps[0].error is not None
    rows = []
    for index, step in enumerate(explanation.steps, start=1):
        sums = [float(np.abs(state.sum(axis=0) - 1).max()) for state in step.states.values()]
        rows.append(
            [
                str(index),
                f"{step.sigma:.3f}",
                f"{step.progress:.2f}",
                f"{step.kl_cap:.3f}",
                f"{step.effect:.2%}",
                *(f"{float(np.linalg.norm(state)):.2f}" for state in step.states.values()),
                f"{max(sums, default=0.0):.1e}",
                *([f"{step.error:.1e}"] if step.error is not None else []),
                duration(step.seconds),
            ]
        )
    norms = [f"norm {name.removeprefix('sws_state_')}" for name in explanation.steps[0].states]
    head = ["step", "σ", "u", "KL cap", "effect", *norms, "error of row sums"]
    return MACROS.table([*head, *(["error"] if compared else []), "time"], rows)


def quantization_facts(explanation: Explanation) -> dict[str, str]:
    """What has 8-bit weights and what has not; nothing for a graph without."""
    entry = explanation.manifest.get("quantization")
    if entry is None:
        return {}
    layers = ", ".join(f"{count} {operator}" for operator, count in entry["layers"].items())
    what = "8-bit weights and activations" if "activations" in entry else "8-bit weights"
    skipped = (f"{reason}: {', '.join(names)}" for reason, names in entry["skipped_layers"].items())
    return {what: f"{entry['weights']}: {layers}", "layers without": "; ".join(skipped)}


def validation_table(explanation: Explanation) -> Markup:
    """Difference of each output from the reference, measured at the export."""
    rows = [
        [
            entry["name"],
            f"{entry['maximum']:.1e}",
            f"{entry['mean']:.1e}",
            f"{entry['tolerance']:.0e}",
            "ok" if entry["passed"] else "failed",
        ]
        for entry in explanation.manifest.get("validation", {}).get("outputs", ())
    ]
    without = explanation.manifest.get("validation", {}).get("unquantized")
    if without is not None:
        errors = (f"{without['maximum']:.1e}", f"{without['mean']:.1e}", f"{without['tolerance']:.0e}")
        rows.append([f"{without['name']}, not quantized", *errors, ""])
    return MACROS.table(["output", "largest", "mean", "allowed", ""], rows)


def stages_table(explanation: Explanation) -> Markup | None:
    """Time and peak memory of each stage of the export; None if they were not recorded."""
    rows = [
        [stage["name"], f"{stage['seconds']:.1f} s", f"{stage['peak_memory'] / 1e9:.2f} GB"]
        for stage in explanation.manifest.get("stages", ())
    ]
    return MACROS.table(["stage", "time", "peak memory"], rows) if rows else None


def parameters_list(explanation: Explanation) -> Markup:
    """Parameters of SWS."""
    values = explanation.manifest["sws"] or {}
    shown = {
        name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in values.items()
    }
    guard = explanation.manifest["guard"]
    shown |= {"guard": guard["form"], "guard rows": guard["rows"]} if guard else {}
    return definitions(shown)
