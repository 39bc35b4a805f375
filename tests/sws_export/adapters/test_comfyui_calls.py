"""Calls that ComfyUI made of a diffusion model, replayed.

`recorded/comfyui_calls.json` was written by `python -m benchmarks.comfyui --record` with ComfyUI 0.3.64: two
steps with both prompts, then two with cfg 1, for small UNets of SD 1.5 and SDXL and a batch of two.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sws_export.adapters.comfyui import Engine, SwsDiffusionModel, embed_sizes

CALLS = json.loads((Path(__file__).parent / "recorded" / "comfyui_calls.json").read_text("utf-8"))
POOLED, WIDTH = 1280, 16
SIZES = [64.0, 48.0, 0.0, 0.0, 64.0, 48.0]


def tensor(recorded: dict[str, Any], width: int | None = None) -> torch.Tensor:
    """A recorded tensor: its numbers, or random ones; `width` replaces the last size."""
    dtype = getattr(torch, recorded["dtype"])
    if "values" in recorded:
        return torch.tensor(recorded["values"], dtype=dtype)
    shape = recorded["shape"] if width is None else [*recorded["shape"][:-1], width]
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def arguments(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, for a graph whose text embeddings are narrow."""
    given: dict[str, Any] = {name: call[name] for name in call.keys() - {"x", "timesteps", "context", "y"}}
    given["context"] = tensor(call["context"], WIDTH)
    if call.get("y"):
        y = tensor(call["y"])
        assert y.shape[1] == POOLED + 6 * 256
        y[:, POOLED:] = torch.from_numpy(embed_sizes(SIZES)).flatten()
        given["y"] = y
    options = dict(call["transformer_options"])
    options |= {name: tensor(options[name]) for name in ("sigmas", "sample_sigmas")}
    return given | {"transformer_options": options}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_recorded_calls(name: str, sws_graph: Path, sdxl_graph: Path) -> None:
    engine = Engine.open({"sd15": sws_graph, "sdxl": sdxl_graph}[name], device="cpu", threads=1)
    session, model = engine.session(), SwsDiffusionModel(engine)
    streams: dict[str, Any] = {}
    assert [call["transformer_options"]["cond_or_uncond"] for call in CALLS[name]] == [[1, 0]] * 2 + [[0]] * 2
    for call in CALLS[name]:
        given = arguments(call)
        x, options = tensor(call["x"]), given["transformer_options"]
        found = model(x, tensor(call["timesteps"]), **given)
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        # Each condition by itself, with a stream of its own.
        parts = [x.chunk(len(options["uuids"])), given["context"].chunk(len(options["uuids"]))]
        for number, (identity, part, context) in enumerate(zip(options["uuids"], *parts, strict=True)):
            stream = streams.setdefault(identity, session.stream())
            added = {}
            if "y" in given:
                pooled = given["y"].chunk(len(options["uuids"]))[number][:, :POOLED]
                added = {"text_embeds": pooled, "time_ids": np.array([SIZES] * len(part))}
            expected = stream.step(
                part, call["timesteps"]["values"][0], context, sigma=options["sigmas"], **added
            )
            one = found.chunk(len(options["uuids"]))[number]
            torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)
    assert len(streams) == 3
