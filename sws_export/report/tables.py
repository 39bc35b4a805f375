"""Tables and lists of a report."""

import html
from collections.abc import Mapping, Sequence

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
    """Seconds as a reader wants them."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def steps_table(explanation: Explanation) -> str:
    """A row a step, of the run that was looked into."""
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
    head = ["step", "σ", "u", "KL cap", "effect", *norms, "row sums off by"]
    return table([*head, *(["error"] if compared else []), "time"], rows)


def validation_table(explanation: Explanation) -> str:
    """How far each output was from the reference when the artefact was exported."""
    validation = explanation.manifest.get("validation")
    if validation is None:
        return (
            "<p>Not known: it is in the manifest beside what was exported, which is not beside this file.</p>"
        )
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
    """Time and memory of each stage of the export."""
    stages: Sequence[Mapping[str, float]] = explanation.manifest.get("stages", ())
    if not stages:
        return (
            "<p>Not known: it is in the manifest beside what was exported, which is not beside this file.</p>"
        )
    rows = [[str(s["name"]), f"{s['seconds']:.1f} s", f"{s['peak_memory'] / 1e9:.2f} GB"] for s in stages]
    return table(["stage", "time", "peak memory"], rows)


def parameters_list(explanation: Explanation) -> str:
    """What SWS was exported with."""
    values = explanation.manifest["sws"]
    shown = {
        name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in values.items()
    }
    guard = explanation.manifest["guard"]
    return definitions({**shown, "guard": guard["form"], "guard rows": guard["rows"]})
