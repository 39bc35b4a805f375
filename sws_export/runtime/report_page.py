"""The page of `report`: HTML with its styles and pictures inside."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from graph_passes.parameters import STATE_RADIUS, diamond_offsets
from sws_export.runtime.report import Explanation, Floats, SiteFigures, StepFigures

_SHOWN_STEPS = 4
# From nothing to much: paper, sand, rust, plum.
_COLOURS = np.array([(247, 244, 238), (238, 196, 128), (201, 92, 62), (74, 24, 64)], np.float64)


def render(explanation: Explanation) -> str:
    """The page as text."""
    template = Template(files("sws_export.runtime").joinpath("report.html").read_text("utf-8"))
    return template.substitute(
        title=html.escape(explanation.artefact),
        facts=_facts(explanation),
        maps="".join(_heat_map(explanation, *column) for column in _MAPS),
        transports="".join(_transports(explanation, name) for name in explanation.steps[0].states),
        steps=_steps_table(explanation),
        validation=_validation_table(explanation),
        stages=_stages_table(explanation),
    )


_Value = Callable[[SiteFigures, StepFigures], float]

_MAPS: tuple[tuple[str, str, _Value], ...] = (
    (
        "Keys mixed, α<sub>k</sub>",
        "Share of each key that comes from its neighbourhood. Ends where the progress u passes u_stop.",
        lambda site, _: site.alpha_k,
    ),
    (
        "Values mixed, a<sub>v</sub>",
        "Share of each value that comes from its neighbourhood.",
        lambda site, _: site.a_v,
    ),
    (
        "Uncertainty",
        "Where the mean entropy of the attention rows lies between the lowest row and the highest.",
        lambda site, _: site.uncertainty,
    ),
    (
        "KL divergence, share of its cap",
        "How far mixing the keys moves the attention, against what is allowed at this step.",
        lambda site, step: site.kl / step.kl_cap,
    ),
)


def _facts(explanation: Explanation) -> str:
    manifest, sizes = explanation.manifest, explanation.sizes
    source = manifest["source"]
    entries = {
        "model": f"{source['file']} ({source.get('family') or 'no known family'})",
        "precision": manifest["precision"],
        "intensity": f"{explanation.intensity:g}",
        "sites": str(len(explanation.steps[0].sites)),
        "steps": f"{len(explanation.steps)}, sigma {explanation.steps[0].sigma:.3g} to "
        f"{explanation.steps[-1].sigma:.3g}",
        "latent": f"{sizes['height']} × {sizes['width']}, {explanation.text}",
    }
    return "".join(
        f"<div><dt>{name}</dt><dd>{html.escape(text)}</dd></div>" for name, text in entries.items()
    )


def _heat_map(explanation: Explanation, title: str, meaning: str, value: _Value) -> str:
    """Sites down, steps across; the colours span from 0 to the largest value there is."""
    sites = list(explanation.steps[0].sites)
    table = [[value(step.sites[site], step) for step in explanation.steps] for site in sites]
    largest = max((max(row) for row in table), default=0.0)
    rows = []
    for site, values in zip(sites, table, strict=True):
        cells = "".join(
            f'<td style="background:{_colour(number / largest if largest else 0.0)}" '
            f'title="{html.escape(site)}, step {index}: {number:.4g}"></td>'
            for index, number in enumerate(values, start=1)
        )
        rows.append(f'<tr><th title="{html.escape(site)}">{html.escape(_short(site))}</th>{cells}</tr>')
    caption = f'<b>{title}</b> <span class="range">0 – {largest:.3g}</span><br>{meaning}'
    return _figure(caption, f'<table class="heat">{"".join(rows)}</table>')


def _figure(caption: str, content: str) -> str:
    return f'<figure><figcaption>{caption}</figcaption><div class="scroll">{content}</div></figure>'


def _short(site: str) -> str:
    """`down_blocks.1.attentions.0.transformer_blocks.0.attn1` as `down 1 · 0 · 0`."""
    parts = site.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return " · ".join(
        [f"{parts[0].removesuffix('_blocks').removesuffix('_block')} {numbers[0]}", *numbers[1:]]
    )


def _colour(share: float) -> str:
    red, green, blue = _blend(np.array([share]))[0]
    return f"rgb({red},{green},{blue})"


def _blend(shares: Floats) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Colours [..., 3] of shares in [0, 1]."""
    places = np.linspace(0.0, 1.0, len(_COLOURS))
    channels = [np.interp(shares, places, _COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _transports(explanation: Explanation, name: str) -> str:
    """Where three tokens of a grid are sent, at a few steps."""
    count = len(explanation.steps)
    shown = sorted({round(index) for index in np.linspace(0, count - 1, min(_SHOWN_STEPS, count))})
    height, width = explanation.steps[0].states[name].shape[1:]
    tokens = {"centre": (height // 2, width // 2), "edge": (0, width // 2), "corner": (0, 0)}
    head = "".join(f"<th>step {index + 1}<br>σ {explanation.steps[index].sigma:.2g}</th>" for index in shown)
    rows = []
    for label, token in tokens.items():
        pictures = [spread(explanation.steps[index].states[name], *token) for index in shown]
        cells = "".join(f"<td>{_picture(picture, f'{label} token')}</td>" for picture in pictures)
        rows.append(f"<tr><th>{label}</th>{cells}</tr>")
    title = f"{name.removeprefix('sws_state_')}: {height} × {width} tokens"
    table = f'<table class="pictures"><tr><th></th>{head}</tr>{"".join(rows)}</table>'
    return _figure(f"<b>{title}</b>", table)


def spread(transport: Floats, row: int, column: int) -> Floats:
    """Where the token at (row, column) is sent.

    Args:
        transport: Banded, [145, H, W].
        row: Of the token.
        column: Of the token.

    Returns:
        Its share at every token, [H, W]; the sum is the row sum of the transport.
    """
    height, width = transport.shape[1:]
    shares = np.zeros((height, width), np.float32)
    for entry, (dy, dx) in enumerate(diamond_offsets(STATE_RADIUS)):
        y, x = row + dy, column + dx
        if 0 <= y < height and 0 <= x < width:
            shares[y, x] = transport[entry, row, column]
    return shares


def _picture(shares: Floats, label: str) -> str:
    image = Image.fromarray(_blend(shares / max(float(shares.max()), 1e-12)))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    most = f"at most {shares.max():.3g}"
    return f'<img src="data:image/png;base64,{data}" alt="{label}, {most}" title="{most}">'


def _steps_table(explanation: Explanation) -> str:
    rows = []
    for index, step in enumerate(explanation.steps, start=1):
        sums = [float(np.abs(state.sum(axis=0) - 1).max()) for state in step.states.values()]
        norms = [f"{float(np.linalg.norm(state)):.2f}" for state in step.states.values()]
        rows.append(
            [
                str(index),
                f"{step.sigma:.3f}",
                f"{step.progress:.2f}",
                f"{step.kl_cap:.3f}",
                f"{100 * step.effect:.2f} %",
                " ".join(norms),
                f"{max(sums, default=0.0):.1e}",
                f"{step.error:.1e}",
                f"{1000 * step.seconds:.0f} ms",
            ]
        )
    head = ["step", "σ", "u", "KL cap", "effect", "state norms", "row sums off by", "error", "time"]
    return _table(head, rows)


def _validation_table(explanation: Explanation) -> str:
    validation = explanation.manifest.get("validation")
    if not validation or not validation.get("outputs"):
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
    about = f"Against the {html.escape(str(validation['reference']))}, {validation['steps']} steps."
    return f"<p>{about}</p>" + _table(["output", "largest", "mean", "allowed", ""], rows)


def _stages_table(explanation: Explanation) -> str:
    stages = explanation.manifest.get("stages", ())
    rows = [[s["name"], f"{s['seconds']:.1f} s", f"{s['peak_memory'] / 1e9:.2f} GB"] for s in stages]
    return _table(["stage", "time", "peak memory"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="numbers"><tr>{titles}</tr>{body}</table></div>'
