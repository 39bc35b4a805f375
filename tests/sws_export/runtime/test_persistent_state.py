"""Runs of artefacts of `--preset comfyui-node`: one state for all, which nothing resets, and one batch."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

from sws_export.adapters.comfyui import Engine, SwsDiffusionModel
from sws_export.adapters.diffusers import SWSUNet
from sws_export.parameters import SwsParameters
from sws_export.reference import comfyui_node_schedule, fresh_transport, moving_average
from sws_export.report.report import write_report
from sws_export.runtime import Session, StepError
from tests import export_runs
from tests.sws_export.adapters.test_comfyui import SIGMAS, Sampler, draw
from tests.sws_export.conftest import TOKENS

STATE = "sws_state_text"
SITES = 4
MakeInputs = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def session(node_graph: Path) -> Session:
    return Session.load(node_graph, device="cpu", threads=1)


@pytest.fixture
def step(inputs: MakeInputs) -> MakeInputs:
    """Inputs of a step with one noise level and intensity for the batch."""

    def make(number: int = 0, **sizes: int) -> dict[str, Any]:
        return inputs(number, **sizes) | {"sigma": 6.0 / (number + 1), "intensity": 1.0}

    return make


def moved(state: Any, sigma: float, times: int = SITES) -> Any:
    """The state after as many sites, each of which averages the same transport in."""
    tokens = state.shape[1]
    u = comfyui_node_schedule(torch.tensor([sigma], dtype=torch.float64), SwsParameters()).u
    fresh = fresh_transport(tokens, u, SwsParameters())
    kept = torch.from_numpy(np.asarray(state[0], np.float64))
    for _ in range(times):
        kept = moving_average(kept, fresh, SwsParameters())
    return kept[None].numpy()


def test_inputs_that_the_contract_shares_and_persists(session: Session) -> None:
    contract = session.contract
    assert contract.preset == "comfyui-node"
    assert contract.shared_inputs == ("sigma", "intensity")
    assert not contract.resets_per_image
    assert [(pair.spec.name, pair.spec.shape, pair.persistent) for pair in contract.states] == [
        (STATE, (1, "tokens", "tokens"), True)
    ]


def test_state_is_fed_back(session: Session, node_graph: Path, step: MakeInputs) -> None:
    stream, by_hand = session.stream(), export_runs.Session(node_graph, optimized=True)
    steps = [step(number) for number in range(4)]
    spread = [s | {name: np.full(2, s[name]) for name in ("sigma", "intensity")} for s in steps]
    for given, (prediction, state) in zip(steps, by_hand.run(spread), strict=True):
        np.testing.assert_allclose(stream.step(**given), prediction, rtol=0, atol=1e-6)
        np.testing.assert_allclose(stream.state()[STATE], state[STATE], rtol=0, atol=1e-7)
    assert stream.state()[STATE].shape == (1, TOKENS, TOKENS)


def test_the_state_is_what_the_sites_make_of_the_noise_level(session: Session, step: MakeInputs) -> None:
    stream = session.stream()
    stream.step(**step())
    expected = moved(np.zeros((1, TOKENS, TOKENS)), 6.0)
    np.testing.assert_allclose(stream.state()[STATE], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{"batch": 3}, {"height": 12, "width": 4}])
def test_the_state_goes_on_with_another_batch_and_size(
    session: Session, step: MakeInputs, changes: dict[str, int]
) -> None:
    stream = session.stream()
    stream.step(**step())
    before = stream.state()[STATE]
    stream.step(**step(1, **changes))
    np.testing.assert_allclose(stream.state()[STATE], moved(before, 3.0), rtol=0, atol=1e-6)


def test_another_text_length_starts_afresh(session: Session, step: MakeInputs) -> None:
    stream = session.stream()
    stream.step(**step())
    longer = step(1) | {"encoder_hidden_states": np.random.default_rng(0).random((2, 9, 16), np.float32)}
    stream.step(**longer)
    np.testing.assert_allclose(stream.state()[STATE], moved(np.zeros((1, 9, 9)), 3.0), rtol=0, atol=1e-6)


def test_reset_is_a_fresh_start_of_the_whole_batch(session: Session, step: MakeInputs) -> None:
    stream = session.stream()
    first = stream.step(**step())
    stream.step(**step(1))
    with pytest.raises(StepError, match=r"share the state of node\.onnx; call reset\(\) without indices"):
        stream.reset([0])
    stream.reset()
    assert np.array_equal(stream.step(**step()), first)


def test_restore_goes_back(session: Session, step: MakeInputs) -> None:
    stream, other = session.stream(), session.stream()
    stream.step(**step())
    snapshot = stream.state()
    after = stream.step(**step(1))
    other.restore(snapshot)
    assert np.array_equal(other.step(**step(1)), after)


@pytest.mark.parametrize(
    ("name", "values"), [("sigma", [3.0, 2.0]), ("intensity", [0.5, 1.0])], ids=["sigma", "intensity"]
)
def test_a_batch_that_differs_is_refused(
    session: Session, step: MakeInputs, name: str, values: list[float]
) -> None:
    with pytest.raises(
        StepError, match=rf"input {name}: expected one value for the whole batch.*found {values[0]:g} and"
    ):
        session.stream().step(**(step() | {name: values}))
    session.stream().step(**(step() | {name: [values[0]] * 2}))


def test_metrics_are_the_same_for_all_samples(session: Session, step: MakeInputs) -> None:
    stream = session.stream()
    stream.step(**step(1))
    metrics = stream.metrics()
    assert metrics["alpha_k"].shape == (2, SITES)
    assert (metrics["alpha_k"] > 0).all()
    assert all(np.array_equal(values[0], values[1]) for values in metrics.values())


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_a_pipelines_unet_goes_on_from_image_to_image(node_graph: Path, random_unet: Path) -> None:
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    config = UNet2DConditionModel.load_config(random_unet)
    unet = SWSUNet.load(node_graph, config=config, scheduler=scheduler, device="cpu", threads=1)
    for image in range(2):
        scheduler.set_timesteps(3)
        for number, timestep in enumerate(scheduler.timesteps):
            before = unet.session.state()
            unet(draw(2, 4, 8, 6), timestep, draw(2, TOKENS, 16))
            assert bool(before and before[STATE].any()) == (image > 0 or number > 0)
    unet.reset()
    assert not unet.session.state()[STATE].any()


@pytest.mark.parametrize("together", [True, False])
def test_in_comfyui_all_calls_share_one_state(node_graph: Path, together: bool) -> None:
    model = SwsDiffusionModel(Engine.open(node_graph, device="cpu", threads=1))
    for _ in range(2):
        Sampler(model, together).run()
        # The state outlives the engine in memory.
        model.unload()
    expected = np.zeros((1, TOKENS, TOKENS))
    levels = [float(sigma) for sigma, _ in itertools.pairwise(SIGMAS)] * 2
    for sigma in levels:
        expected = moved(expected, sigma, SITES if together else 2 * SITES)
    np.testing.assert_allclose(model._kept[STATE], expected, rtol=0, atol=1e-5)


def test_the_report_looks_into_it(node_graph: Path, random_unet: Path, tmp_path: Path) -> None:
    explanation = write_report(
        node_graph, random_unet, tmp_path / "report.html", steps=4, intensity=1.0, height=12, width=8
    )
    parameters = SwsParameters()
    assert explanation.metrics_source == "artefact"
    for step in explanation.steps:
        assert step.error is not None
        assert step.error < 1e-4
        assert step.effect > 1e-4
        assert step.kl_cap == pytest.approx(parameters.kl_slope * (1 - step.progress) + parameters.kl_floor)
        # Eight tokens in a row, of which each is sent to itself and its neighbours.
        band = step.states[STATE]
        assert band.shape == (145, 1, 8)
        np.testing.assert_allclose(band.sum(axis=0), 1.0, atol=0.05)
        for site in step.sites.values():
            assert (site.alpha_k == 0) == (step.progress >= parameters.u_stop)
    assert [step.progress for step in explanation.steps] == sorted(
        (step.progress for step in explanation.steps), reverse=True
    )
    assert "<dd>comfyui-node</dd>" in (tmp_path / "report.html").read_text("utf-8")
