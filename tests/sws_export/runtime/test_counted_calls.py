"""`--preset comfyui-node --u calls`: as the published node runs in ComfyUI, u is a counter of its calls."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sws_export.checkpoint import open_checkpoint
from sws_export.checkpoint.unet_module import load_unet, unet_arguments
from sws_export.parameters import SwsParameters
from sws_export.reference import ComfyUINodeReferenceUNet
from sws_export.report.report import write_report
from sws_export.runtime import Session
from tests.sws_export.conftest import TOKENS

SITES = 4
MakeInputs = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def session(calls_graph: Path) -> Session:
    return Session.load(calls_graph, device="cpu", threads=1)


def test_calls_are_a_state_in_place_of_sigma(session: Session, inputs: MakeInputs) -> None:
    contract = session.contract
    assert contract.shared_inputs == ("intensity",)
    assert not contract.takes_sigma
    assert [(pair.spec.name, pair.output, pair.spec.shape, pair.persistent) for pair in contract.states] == [
        ("sws_state_text", "sws_state_text_out", (1, "tokens", "tokens"), True),
        ("calls", "calls_out", (1,), True),
    ]
    assert [state["grid"] for state in contract.manifest["states"]] == ["text", "none"]
    stream = session.stream()
    counts, caps = [], []
    for number in range(17):
        # Another batch, and another number of tokens, do not restart the count.
        text = np.zeros((2 + number % 2, TOKENS + number % 2, 16), np.float32)
        step = inputs(number, batch=2 + number % 2) | {"intensity": 1.0, "encoder_hidden_states": text}
        stream.step(**step)
        counts.append(float(stream.state()["calls"][0]))
        caps.append(stream.metrics()["kl_cap"])
    assert counts == [(number + 1) * SITES % 64 for number in range(17)]
    u = np.array([(number * SITES + 1) % 64 for number in range(17)]) / 64
    for found, expected in zip(caps, 0.08 * (1 - u) + 0.01, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    stream.reset()
    assert stream.state()["calls"] == 0


def test_the_graph_is_the_node_over_the_end_of_a_cycle(
    session: Session, random_unet: Path, inputs: MakeInputs
) -> None:
    """The second site of the first step has u = 0: the node changes nothing there but the temperature."""
    unet = ComfyUINodeReferenceUNet(
        load_unet(open_checkpoint(random_unet), torch.float64), SwsParameters(), u="calls"
    )
    stream = session.stream()
    tokens = np.full((1, TOKENS, TOKENS), 1 / TOKENS)
    state = {"sws_state_text": torch.from_numpy(tokens), "calls": torch.tensor([62.0])}
    stream.restore({name: values.numpy() for name, values in state.items()})
    for number in range(3):
        given = inputs(number) | {"intensity": np.ones(2), "sigma": np.ones(2)}
        tensors = {name: torch.from_numpy(np.asarray(values)).double() for name, values in given.items()}
        expected, state = unet.step(**unet_arguments(tensors), state=state)
        found = stream.step(**given)
        assert np.abs(found - expected.numpy()).max() <= 1e-4 * expected.abs().max()
        for name, values in stream.state().items():
            np.testing.assert_allclose(values, state[name].numpy(), atol=1e-6)
        metrics = stream.metrics()
        u = (62 + number * SITES + 1 + np.arange(SITES)) % 64 / 64
        mixes = (u > 0) & (u < 0.75)
        by_site = dict(zip(session.contract.metric_sites, metrics["alpha_k"][0], strict=True))
        assert [by_site[site] > 0 for site in unet.records] == mixes.tolist()


def test_the_report_of_a_counting_graph(calls_graph: Path, random_unet: Path, tmp_path: Path) -> None:
    found = write_report(calls_graph, random_unet, tmp_path / "report.html", steps=2, height=8, width=8)
    assert [step.progress for step in found.steps] == [1 / 64, 5 / 64]
    assert all(step.error is not None and step.error < 1e-4 for step in found.steps)
    assert found.steps[0].states.keys() == {"sws_state_text"}
