"""Tables and lists of a report."""

import html
from collections.abc import Mapping

import numpy as np

from sws_export.report.charts import table
from sws_export.report.explanation import Explanation


def definitions(entries: Mapping[str, str]) -> str:
    """Entries of a definition list."""
    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>"
        for name, text in entries.items()
    )


def duration(seconds: float) -> str:
    """Seconds, or milliseconds below one second."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def steps_table(explanation: Explanation) -> str:
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
    return table([*head, *(["error"] if compared else []), "time"], rows)


def validation_table(explanation: Explanation) -> str:
    """Difference of each output from the reference, measured at the export."""
    validation = explanation.manifest.get("validation")
    if validation is None:
        return "<p>Unknown: the manifest was not found beside the artefact.</p>"
    if not validation.get("outputs"):
        return "<p>The export was not validated.</p>"
    rows = [
        [
            entry["name"],
            f"{entry['maximum']:.1e}",
            f"{entry['mean']:.1e}",
            f"{entry['tolerance']:.0e}",
            "ok" if entry["passed"] else "failed",
        ]
        for entry in validation["outputs"]
    ]
    sizes = validation["sizes"]
    about = (
        f"Against the {html.escape(str(validation['reference']))}, {validation['steps']} steps, batch "
        f"{sizes['batch']}, latent {sizes['height']} × {sizes['width']}. "
        + " ".join(f"{html.escape(remark)}." for remark in validation["remarks"])
    )
    return f"<p>{about}</p>" + table(["output", "largest", "mean", "allowed", ""], rows)


def stages_table(explanation: Explanation) -> str:
    """Time and peak memory of each stage of the export."""
    stages = explanation.manifest.get("stages", [])
    if not stages:
        return "<p>Unknown: the manifest was not found beside the artefact.</p>"
    rows = [[str(s["name"]), f"{s['seconds']:.1f} s", f"{s['peak_memory'] / 1e9:.2f} GB"] for s in stages]
    return table(["stage", "time", "peak memory"], rows)


def parameters_list(explanation: Explanation) -> str:
    """Parameters of SWS."""
    values = explanation.manifest["sws"] or {}
    shown = {
        name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in values.items()
    }
    guard = explanation.manifest["guard"]
    shown |= {"guard": guard["form"], "guard rows": guard["rows"]} if guard else {}
    return definitions(shown)
