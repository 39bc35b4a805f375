"""The report as one HTML page, with its styles and images embedded.

Its templates are `report.html` and `charts.html`.
"""

from collections.abc import Callable

import numpy as np
from markupsafe import Markup

from sws_export.engines.gpu_memory import GpuMemory
from sws_export.report.charts import figure, heat_map, line_chart, picture, spread
from sws_export.report.explanation import Explanation, SiteMetrics, StepMetrics
from sws_export.report.site_labels import site_labels
from sws_export.report.tables import (
    definitions,
    duration,
    parameters_list,
    quantization_facts,
    stages_table,
    steps_table,
    validation_table,
)
from sws_export.report.templates import MACROS, PAGE

_SHOWN_STEPS = 4
_MAX_TICKS = 6

_Value = Callable[[SiteMetrics, StepMetrics], float]
_MAPS: tuple[tuple[str, str, str, _Value], ...] = (
    (
        Markup("Keys mixed, α<sub>k</sub>"),
        "Share of each key that comes from its neighbourhood. 0 if u is at least u_stop.",
        ".1%",
        lambda site, _: site.alpha_k,
    ),
    (
        Markup("Values mixed, a<sub>v</sub>"),
        "Share of each value that comes from its neighbourhood.",
        ".1%",
        lambda site, _: site.a_v,
    ),
    (
        "KL divergence, share of its cap",
        "Change of the attention by key mixing, relative to the cap of the step.",
        ".1%",
        lambda site, step: site.kl / step.kl_cap,
    ),
    (
        "Entropy, nats",
        "Mean over the rows of plain attention: low if each token attends to few others.",
        ".2f",
        lambda site, _: site.entropy_mean,
    ),
    (
        "Range of the entropy, nats",
        "Largest minus smallest entropy of a row.",
        ".2f",
        lambda site, _: site.entropy_max - site.entropy_min,
    ),
    (
        "Uncertainty",
        "Position of the mean entropy between the smallest and the largest. Mixing is proportional to it.",
        ".2f",
        lambda site, _: site.uncertainty,
    ),
)


def render(explanation: Explanation) -> str:
    """The page as text."""
    return PAGE.render(
        title=explanation.artefact,
        facts=_facts(explanation),
        highlights=_highlights(explanation),
        charts=_charts(explanation),
        from_artefact=explanation.metrics_source == "artefact",
        maps=[_map(explanation, *column) for column in _MAPS],
        numbers=_site_numbers(explanation),
        transports=[_transports(explanation, name) for name in explanation.steps[0].states],
        steps=steps_table(explanation),
        validation=explanation.manifest.get("validation"),
        validation_table=validation_table(explanation),
        stages=stages_table(explanation),
        parameters=parameters_list(explanation),
    )


def _facts(explanation: Explanation) -> Markup:
    manifest, sizes = explanation.manifest, explanation.sizes
    source = manifest["source"]
    entries = {
        "model": f"{source['file']} ({source.get('family') or 'unknown family'})",
        "preset": str(manifest["preset"]),
        "precision": manifest["precision"],
        **quantization_facts(explanation),
        "intensity": f"{explanation.intensity:g}",
        "sites": str(len(explanation.steps[0].sites)),
        "steps": f"{len(explanation.steps)}, σ {explanation.steps[0].sigma:.3g} to "
        f"{explanation.steps[-1].sigma:.3g}",
        "latent": f"{sizes['height']} × {sizes['width']}, {explanation.text}",
    } | _gpu_memory(explanation)
    return definitions(entries)


def _gpu_memory(explanation: Explanation) -> dict[str, str]:
    """What the engine needs with the profile that needs the most; nothing where it was not recorded."""
    engine = explanation.manifest.get("engine")
    recorded = engine.get("gpu_memory") if engine else None
    if recorded is None:
        return {}
    memory = GpuMemory.from_json(recorded)
    return {"engine": memory.describe(memory.largest)}


def _highlights(explanation: Explanation) -> Markup:
    """The most important numbers, with the site and step of each."""
    steps = explanation.steps
    effect = max(range(len(steps)), key=lambda index: steps[index].effect)
    entries = [
        ("largest key mixing", *_peak(explanation, lambda site, _: site.alpha_k)),
        ("largest value mixing", *_peak(explanation, lambda site, _: site.a_v)),
        ("largest share of the KL cap", *_peak(explanation, lambda site, step: site.kl / step.kl_cap)),
        ("largest change of the prediction", f"{steps[effect].effect:.2%}", f"step {effect + 1}"),
    ]
    errors = [step.error for step in steps if step.error is not None]
    if errors:
        entries.append(
            ("largest error", f"{max(errors):.1e}", "against the reference, relative to the largest value")
        )
    typical = float(np.median([step.seconds for step in steps]))
    entries.append(("time of a step", duration(typical), "median, on this machine"))
    return MACROS.definitions([(name, [value, where]) for name, value, where in entries])


def _peak(explanation: Explanation, value: _Value) -> tuple[str, str]:
    labels = site_labels(explanation.steps[0].sites)
    found = [
        (value(site, step), f"{labels[path]}, step {index}")
        for index, step in enumerate(explanation.steps, start=1)
        for path, site in step.sites.items()
    ]
    largest, where = max(found)
    return f"{largest:.1%}", where


def _ticks(explanation: Explanation) -> list[str]:
    """Labels of the horizontal axis: the noise level of some steps, empty for the others."""
    count = len(explanation.steps)
    shown = {round(position) for position in np.linspace(0, count - 1, min(_MAX_TICKS, count))}
    return [f"{step.sigma:.2g}" if index in shown else "" for index, step in enumerate(explanation.steps)]


def _charts(explanation: Explanation) -> list[Markup]:
    steps, ticks = explanation.steps, _ticks(explanation)
    norms = {
        name.removeprefix("sws_state_"): [float(np.linalg.norm(step.states[name])) for step in steps]
        for name in steps[0].states
    }
    divergences = [[site.kl for site in step.sites.values()] for step in steps]
    charts = [
        (
            "Effect",
            "Root mean square change of the prediction by SWS, relative to the prediction.",
            {"effect": [step.effect for step in steps]},
            ".2%",
        ),
        (
            "KL divergence, nats",
            "The site with the largest divergence and the mean of all sites, below the cap.",
            {
                "cap": [step.kl_cap for step in steps],
                "largest": [max(values) for values in divergences],
                "mean": [float(np.mean(values)) for values in divergences],
            },
            ".3f",
        ),
        (
            "Largest mixing of a site",
            "Keys are not mixed if u is at least u_stop; values are.",
            {
                "keys": [max(site.alpha_k for site in step.sites.values()) for step in steps],
                "values": [max(site.a_v for site in step.sites.values()) for step in steps],
            },
            ".0%",
        ),
        ("State norms", "Norm of the transport of each grid: low if tokens are spread widely.", norms, ".1f"),
    ]
    return [
        figure(title, meaning, line_chart(series, ticks, unit)) for title, meaning, series, unit in charts
    ]


def _values(explanation: Explanation, value: _Value) -> dict[str, list[float]]:
    return {
        label: [value(step.sites[path], step) for step in explanation.steps]
        for path, label in site_labels(explanation.steps[0].sites).items()
    }


def _map(explanation: Explanation, title: str, meaning: str, unit: str, value: _Value) -> Markup:
    rows = _values(explanation, value)
    largest = max(max(row) for row in rows.values())
    return figure(title, meaning, heat_map(rows, _ticks(explanation), largest, unit))


def _site_numbers(explanation: Explanation) -> list[tuple[str, Markup]]:
    """The values of the maps as tables, with their titles."""
    head = ["site", *(str(number) for number in range(1, len(explanation.steps) + 1))]
    parts = []
    for title, _, unit, value in _MAPS:
        rows = [
            [label, *(format(number, unit) for number in row)]
            for label, row in _values(explanation, value).items()
        ]
        parts.append((title, MACROS.table(head, rows)))
    return parts


def _transports(explanation: Explanation, name: str) -> Markup:
    """Transport of the selected tokens of a grid, at some steps."""
    steps = explanation.steps
    shown = sorted(
        {round(position) for position in np.linspace(0, len(steps) - 1, min(_SHOWN_STEPS, len(steps)))}
    )
    height, width = steps[0].states[name].shape[1:]
    positions: dict[tuple[int, int], str] = {}
    for label, (down, right) in explanation.tokens.items():
        token = min(int(down * height), height - 1), min(int(right * width), width - 1)
        # On a coarse grid, or the single row of the text, several positions may be the same token.
        positions.setdefault(token, label)
    rows = [
        (label, [spread(steps[index].states[name], *token) for index in shown])
        for token, label in positions.items()
    ]
    largest = max(float(shares.max()) for _, drawn in rows for shares in drawn)
    images = [
        (label, [picture(shares, largest, f"{label} token") for shares in drawn]) for label, drawn in rows
    ]
    content = MACROS.pictures([(index + 1, f"{steps[index].sigma:.2g}") for index in shown], images)
    title = f"{name.removeprefix('sws_state_')}: {height} × {width} tokens"
    return figure(title, "", content, note=f"maximum: {largest:.2f}")
