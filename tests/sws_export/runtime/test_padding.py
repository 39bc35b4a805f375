"""Latents of sizes that the UNet does not take."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sws_export.runtime import Session, StepError


def mirrored(array: Any, height: int, width: int) -> Any:
    rows = [*range(array.shape[2]), *reversed(range(array.shape[2]))][:height]
    columns = [*range(array.shape[3]), *reversed(range(array.shape[3]))][:width]
    return array[:, :, rows][:, :, :, columns]


def test_a_latent_is_padded_and_the_prediction_cropped(sws_graph: Path, inputs: Callable[..., Any]) -> None:
    session, other = Session.load(sws_graph), Session.load(sws_graph)
    for number in range(2):
        step = inputs(number, height=7, width=5)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = session.step(**step)
        assert [str(warning.message) for warning in seen] == (
            [
                "the latent of 7 x 5 is padded to 8 x 6, the next multiple of 2, and the prediction cropped; "
                "pad=False rejects such sizes"
            ]
            if number == 0
            else []
        )
        expected = other.step(**(step | {"sample": mirrored(step["sample"], 8, 6)}))
        assert np.array_equal(found, expected[:, :, :7, :5])
    kept = session.state()["sws_state_d2"]
    assert kept.any()
    session.step(**inputs(0, height=8, width=6) | {"intensity": 0.0})
    fresh = Session.load(sws_graph)
    fresh.step(**inputs(0, height=8, width=6) | {"intensity": 0.0})
    assert np.array_equal(session.state()["sws_state_d2"], fresh.state()["sws_state_d2"])


def test_a_torch_tensor_stays_one(sws_graph: Path, inputs: Callable[..., Any]) -> None:
    step = {name: torch.from_numpy(array) for name, array in inputs(height=7, width=6).items()}
    with pytest.warns(UserWarning, match="padded to 8 x 6"):
        found = Session.load(sws_graph).step(**step)
    assert isinstance(found, torch.Tensor)
    assert found.shape == (2, 4, 7, 6)


@pytest.fixture
def with_scale(graph_copy: Path) -> Path:
    path = graph_copy.with_name(graph_copy.name + ".json")
    document = json.loads(path.read_text())
    document["source"] |= {"vae_scale": 8}
    path.write_text(json.dumps(document))
    return graph_copy


def test_padding_is_off_by_option(with_scale: Path, inputs: Callable[..., Any]) -> None:
    message = (
        r"height 7 \(56 pixels\) is not a multiple of 2; the nearest sizes are 6 \(48 pixels\) and "
        r"8 \(64 pixels\); or load with pad=True"
    )
    session = Session.load(with_scale, pad=False)
    for stream in (session, session.stream()):
        with pytest.raises(StepError, match=message):
            stream.step(**inputs(height=7))


def test_the_multiple_is_recorded(sws_graph: Path) -> None:
    contract = Session.load(sws_graph).contract
    assert contract.manifest["source"]["size_multiple"] == contract.size_multiple == 2
