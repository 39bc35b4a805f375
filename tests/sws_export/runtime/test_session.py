"""Sessions: the results of steps, their state, streams, threads."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sws_export.errors import EngineError, OptionError
from sws_export.runtime import Session, StepError
from sws_export.runtime.session import Stream
from tests import export_runs

MakeInputs = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def session(sws_graph: Path) -> Session:
    return Session.load(sws_graph, device="cpu", threads=1)


@pytest.fixture(scope="session")
def text_session(text_graph: Path) -> Session:
    return Session.load(text_graph, device="cpu", threads=1)


def expected(path: Path, steps: list[dict[str, Any]]) -> list[Any]:
    return [prediction for prediction, _ in export_runs.Session(path, optimized=True).run(steps)]


def test_state_is_fed_back(session: Session, sws_graph: Path, inputs: MakeInputs) -> None:
    stream = session.stream()
    steps = [inputs(number) for number in range(4)]
    found = [stream.step(**step) for step in steps]
    for one, other in zip(found, expected(sws_graph, steps), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    # The history matters: the same last step without it is another one.
    assert export_runs.difference(session.stream().step(**steps[-1]), found[-1]) > 1e-5


def test_state_stays_in_two_buffers(session: Session, inputs: MakeInputs) -> None:
    """What a step writes is what the next one reads: the same memory, not a copy of it."""
    stream = session.stream()
    stream.step(**inputs(0))
    loop: Any = stream._loop
    places = [held["sws_state_d2"].data_ptr() for held in loop._sets]
    assert places[0] != places[1]
    current = []
    for number in range(1, 5):
        stream.step(**inputs(number))
        current.append(loop._current)
        held = loop._sets[loop._current]["sws_state_d2"]
        assert np.array_equal(held.numpy(), stream.state()["sws_state_d2"])
        assert [each["sws_state_d2"].data_ptr() for each in loop._sets] == places
    assert current in ([0, 1, 0, 1], [1, 0, 1, 0])


def test_numbers_stand_for_the_whole_batch(session: Session, inputs: MakeInputs) -> None:
    step = inputs()
    numbers = step | {"timestep": 500, "sigma": 3.0, "intensity": 0.5}
    arrays = step | {"timestep": [500, 500], "sigma": [3.0, 3.0], "intensity": [0.5, 0.5]}
    assert np.array_equal(session.stream().step(**numbers), session.stream().step(**arrays))


def test_default_intensity_is_half(session: Session, inputs: MakeInputs) -> None:
    step = inputs()
    named = session.stream().step(**(step | {"intensity": 0.5}))
    del step["intensity"]
    assert np.array_equal(session.stream().step(**step), named)


def test_torch_in_torch_out(session: Session, inputs: MakeInputs) -> None:
    step = inputs()
    tensors = {name: torch.from_numpy(value) for name, value in step.items()}
    tensors["sample"] = tensors["sample"].requires_grad_()
    found = session.stream().step(**tensors)
    assert isinstance(found, torch.Tensor)
    assert np.array_equal(found.numpy(), session.stream().step(**step))


def test_bfloat16_tensors_come_back_as_such(session: Session, inputs: MakeInputs) -> None:
    tensors = {name: torch.from_numpy(value).bfloat16() for name, value in inputs().items()}
    found = session.stream().step(**tensors)
    upcast = {name: value.float().numpy() for name, value in tensors.items()}
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float().numpy(), session.stream().step(**upcast), rtol=1e-2, atol=1e-2)


def test_predictions_are_the_callers_own(session: Session, inputs: MakeInputs) -> None:
    stream = session.stream()
    first = stream.step(**inputs(0))
    kept = first.copy()
    stream.step(**inputs(1))
    stream.step(**inputs(2))
    assert np.array_equal(first, kept)


def test_reset_starts_anew(session: Session, inputs: MakeInputs) -> None:
    stream = session.stream()
    first = stream.step(**inputs(0))
    stream.step(**inputs(1))
    stream.reset()
    assert all(not values.any() for values in stream.state().values())
    assert np.array_equal(stream.step(**inputs(0)), first)


def test_reset_of_one_sample_leaves_the_others(session: Session, inputs: MakeInputs) -> None:
    kept, renewed, fresh = session.stream(), session.stream(), session.stream()
    for stream in (kept, renewed):
        stream.step(**inputs(0))
    renewed.reset([1])
    for stream in (kept, renewed, fresh):
        stream.step(**inputs(1))
    found, with_history, without = (stream.state()["sws_state_d2"] for stream in (renewed, kept, fresh))
    np.testing.assert_allclose(found[0], with_history[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[1], without[1], rtol=0, atol=1e-6)
    for sample in range(2):
        assert np.abs(with_history[sample] - without[sample]).max() > 1e-3


def test_reset_of_a_sample_outside_the_batch(session: Session, inputs: MakeInputs) -> None:
    stream = session.stream()
    stream.step(**inputs())
    with pytest.raises(StepError, match="sample 2 is outside the batch of 2"):
        stream.reset([0, 2])
    with pytest.raises(StepError, match="sample -1 is outside"):
        stream.reset([-1])
    with pytest.raises(StepError, match="sample 0 is outside the batch: no step has run yet"):
        session.stream().reset([0])


@pytest.mark.parametrize("samples", [0, "0", [0.0], [None], ["0"], [[0]]])
def test_reset_of_what_is_no_index(session: Session, inputs: MakeInputs, samples: Any) -> None:
    stream = session.stream()
    stream.step(**inputs())
    before = stream.state()["sws_state_d2"]
    with pytest.raises(StepError, match="reset: expected indices of samples, found"):
        stream.reset(samples)
    assert np.array_equal(stream.state()["sws_state_d2"], before)


def test_restore_goes_back(session: Session, inputs: MakeInputs) -> None:
    stream, other = session.stream(), session.stream()
    stream.step(**inputs(0))
    snapshot = stream.state()
    after = stream.step(**inputs(1))
    assert any(not np.array_equal(snapshot[name], values) for name, values in stream.state().items())
    stream.restore(snapshot)
    assert np.array_equal(stream.step(**inputs(1)), after)
    other.restore(snapshot)
    assert np.array_equal(other.step(**inputs(1)), after)


def test_restore_of_an_empty_state_is_a_reset(session: Session, inputs: MakeInputs) -> None:
    stream = session.stream()
    empty = stream.state()
    first = stream.step(**inputs(0))
    stream.restore(empty)
    assert np.array_equal(stream.step(**inputs(0)), first)


def test_restore_refuses_other_states(session: Session) -> None:
    stream = session.stream()
    with pytest.raises(StepError, match="has the states sws_state_d2, found sws_state_d4"):
        stream.restore({"sws_state_d4": np.zeros((1, 145, 4, 4), np.float32)})
    with pytest.raises(StepError, match=r"has shape \[1, 41, 4, 4\], expected \[batch, 145, height/2"):
        stream.restore({"sws_state_d2": np.zeros((1, 41, 4, 4), np.float32)})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (np.full((1, 145, 4, 4), np.nan), r"expected finite numbers, found nan at \[0, 0, 0, 0\]"),
        (np.full((1, 145, 4, 4), 1e300), r"found inf at \[0, 0, 0, 0\] \(as float32\)"),
        (np.zeros((0, 145, 4, 4)), r"has shape \[0, 145, 4, 4\], expected"),
        ("zeros", r"expected numbers, found 'zeros' \(str"),
        ([[1], [1, 2]], r"expected a number, an array or a tensor: .*inhomogeneous"),
        (None, r"expected numbers, found None \(object"),
    ],
)
def test_restore_of_values_that_are_no_state(
    session: Session, inputs: MakeInputs, state: Any, message: str
) -> None:
    stream = session.stream()
    stream.step(**inputs())
    before = stream.state()["sws_state_d2"]
    with pytest.raises(StepError, match=f"restore: state sws_state_d2.*{message}"):
        stream.restore({"sws_state_d2": state})
    assert np.array_equal(stream.state()["sws_state_d2"], before)
    for snapshot in ([], 3, None, "state"):
        with pytest.raises(StepError, match=r"restore: sws\.onnx has the states sws_state_d2, found"):
            stream.restore(snapshot)  # type: ignore[arg-type]


def test_restore_of_states_that_contradict_each_other(text_session: Session) -> None:
    stream = text_session.stream()
    text = np.zeros((2, 145, 1, 5), np.float32)
    stream.restore({"sws_state_d2": np.zeros((2, 145, 4, 3), np.float32), "sws_state_text": text})
    with pytest.raises(
        StepError, match=r"sws_state_text has shape \[2, 145, 1, 5\].*found before: batch 1, "
    ):
        stream.restore({"sws_state_d2": np.zeros((1, 145, 4, 3), np.float32), "sws_state_text": text})


class DivergingBackend:
    """Predictions and states have NaN from the third step after a reset on."""

    device = "cpu"

    def loop(self, states: Mapping[str, tuple[int, ...]]) -> "DivergingBackend":
        self._states = {name: np.zeros(shape, np.float32) for name, shape in states.items()}
        return self

    def run(self, _: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        for state in self._states.values():
            state += 1
        worst = max(float(state.max()) for state in self._states.values())
        for output in outputs.values():
            output[...] = np.nan if not worst < 3 else worst

    def read(self, name: str) -> Any:
        return self._states[name].copy()

    def write(self, name: str, values: Any) -> None:
        self._states[name][...] = values


def test_a_prediction_that_is_not_finite_is_reported_with_its_step(
    session: Session, inputs: MakeInputs
) -> None:
    stream = Stream(session.contract, DivergingBackend())
    for _ in range(2):
        for _ in range(2):
            assert np.isfinite(stream.step(**inputs())).all()
        message = (
            r"prediction of step 3 has NaN or Inf \(none before it had any\), at precision fp32; call reset"
        )
        with pytest.raises(StepError, match=message):
            stream.step(**inputs())
        stream.reset()


@pytest.mark.parametrize("change", [{"batch": 3}, {"height": 12}, {"width": 10}])
def test_another_size_starts_from_an_empty_state(
    session: Session, inputs: MakeInputs, change: dict[str, int]
) -> None:
    stream = session.stream()
    stream.step(**inputs(0))
    found = stream.step(**inputs(1, **change))
    assert np.array_equal(found, session.stream().step(**inputs(1, **change)))
    # Back at the first size nothing of the first step is left.
    assert np.array_equal(stream.step(**inputs(2)), session.stream().step(**inputs(2)))


def test_more_tokens_keep_the_state(session: Session, sws_graph: Path, inputs: MakeInputs) -> None:
    steps = [inputs(0), inputs(1)]
    steps[1]["encoder_hidden_states"] = np.tile(steps[1]["encoder_hidden_states"], (1, 2, 1))
    stream = session.stream()
    found = [stream.step(**step) for step in steps]
    np.testing.assert_allclose(found[1], expected(sws_graph, steps)[1], rtol=0, atol=1e-6)


class TestStateOfTheText:
    """Session and graph with a state of the text beside one of the image."""

    def test_it_is_fed_back(self, text_session: Session, text_graph: Path, inputs: MakeInputs) -> None:
        steps = [inputs(number) for number in range(3)]
        stream = text_session.stream()
        for step, other in zip(steps, expected(text_graph, steps), strict=True):
            np.testing.assert_allclose(stream.step(**step), other, rtol=0, atol=1e-6)
        assert stream.state()["sws_state_text"].shape == (2, 145, 1, 5)

    def test_another_number_of_tokens_empties_it_alone(
        self, text_session: Session, text_graph: Path, inputs: MakeInputs
    ) -> None:
        stream, graph = text_session.stream(), export_runs.Session(text_graph, optimized=True)
        first, second = inputs(0), inputs(1, tokens=21)
        stream.step(**first)
        _, state = graph.step(first, graph.zero_state(first))
        state["sws_state_text"] = graph.zero_state(second)["sws_state_text"]
        out, after = graph.step(second, state)
        np.testing.assert_allclose(stream.step(**second), out, rtol=0, atol=1e-6)
        for name, values in stream.state().items():
            np.testing.assert_allclose(values, after[name], rtol=0, atol=1e-6)
        # What the image has seen matters.
        fresh = text_session.stream()
        fresh.step(**second)
        gap = np.abs(fresh.state()["sws_state_d2"] - after["sws_state_d2"])
        assert gap.max() > 1e-3

    @pytest.mark.parametrize("change", [{"batch": 3}, {"height": 12}, {"width": 10}])
    @pytest.mark.parametrize("tokens", [5, 6])
    def test_another_size_of_the_image_empties_all(
        self, text_session: Session, inputs: MakeInputs, change: dict[str, int], tokens: int
    ) -> None:
        stream, fresh = text_session.stream(), text_session.stream()
        stream.step(**inputs(0))
        step = inputs(1, tokens=tokens, **change)
        assert np.array_equal(stream.step(**step), fresh.step(**step))

    def test_it_is_restored_with_the_rest(self, text_session: Session, inputs: MakeInputs) -> None:
        stream, other = text_session.stream(), text_session.stream()
        stream.step(**inputs(0))
        snapshot = stream.state()
        after = stream.step(**inputs(1))
        stream.step(**inputs(2, tokens=9))
        for restored in (stream, other):
            restored.restore(snapshot)
            assert np.array_equal(restored.step(**inputs(1)), after)

    def test_a_restored_state_of_other_tokens_is_emptied(
        self, text_session: Session, inputs: MakeInputs
    ) -> None:
        stream, other = text_session.stream(), text_session.stream()
        stream.step(**inputs(0))
        other.restore(stream.state())
        step = inputs(1, tokens=9)
        assert np.array_equal(other.step(**step), stream.step(**step))


def test_cross_attention_alone_has_nothing_of_the_size(
    tmp_path: Path, traced: Path, inputs: MakeInputs
) -> None:
    """The shape of its only state does not show that the image is another one; that of the sample does."""
    from sws_export import ExportOptions, SwsOptions, export

    sws = SwsOptions(sites=("mid_block.*.attn2",), guard="literal")
    export(traced, tmp_path / "text.onnx", ExportOptions(sws=sws, validate=False))
    session = Session.load(tmp_path / "text.onnx", device="cpu", threads=1)
    stream, fresh = session.stream(), session.stream()
    stream.step(**inputs(0))
    assert [*stream.state()] == ["sws_state_text"]
    step = inputs(1, height=12)
    assert np.array_equal(stream.step(**step), fresh.step(**step))
    step = inputs(2, height=12)
    assert not np.array_equal(stream.step(**step), session.stream().step(**step))


def test_streams_in_threads_do_not_meet(session: Session, sws_graph: Path, inputs: MakeInputs) -> None:
    """Streams of three sizes of batch at once give what each gives alone."""
    runs = {batch: [inputs(number, batch=batch) for number in range(6)] for batch in (1, 2, 3)}

    def drive(batch: int) -> list[Any]:
        stream = session.stream()
        return [stream.step(**step) for step in runs[batch]]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(drive, [1, 2, 3, 1, 2, 3]))
    alone = {batch: expected(sws_graph, steps) for batch, steps in runs.items()}
    for batch, predictions in zip([1, 2, 3, 1, 2, 3], found, strict=True):
        for one, other in zip(predictions, alone[batch], strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_one_stream_from_many_threads_is_some_order_of_its_steps(
    session: Session, sws_graph: Path, inputs: MakeInputs
) -> None:
    """Eight equal steps: whoever comes k-th must get the k-th prediction."""
    stream, step = session.stream(), inputs()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: stream.step(**step), range(8)))
    serial = expected(sws_graph, [step] * 8)
    nearest = [int(np.argmin([export_runs.difference(one, other) for other in serial])) for one in found]
    assert sorted(nearest) == list(range(8))


def test_a_refused_step_leaves_the_state(session: Session, inputs: MakeInputs) -> None:
    stream = session.stream()
    stream.step(**inputs(0))
    before = stream.state()
    with pytest.raises(StepError):
        stream.step(**(inputs(1) | {"intensity": 2.0}))
    after = stream.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": None}, r"needs the input sigma; it takes sample, timestep"),
        ({"encoder_hidden_states": None}, r"needs the input encoder_hidden_states"),
        ({"time_ids": np.zeros((2, 6))}, r"has no input time_ids; it takes sample"),
        ({"sigma": 0.0}, r"sigma: expected a finite number above 0, found 0"),
        ({"sigma": float("inf")}, r"sigma: expected a finite number above 0, found inf"),
        ({"sigma": float("nan")}, r"sigma: expected a finite number above 0, found nan"),
        ({"intensity": -0.1}, r"intensity: expected 0 to 1, found -0.1"),
        ({"sigma": np.ones(3)}, r"input sigma: dimension 0 is 3, expected 2 \(batch"),
        ({"sample": np.zeros((2, 3, 8, 6))}, r"input sample: dimension 1 is 3, expected 4; the input is"),
        ({"sample": np.zeros((4, 8, 6))}, r"input sample: expected \[batch, 4, height, width\], found"),
        ({"encoder_hidden_states": np.zeros((1, 5, 16))}, r"states: dimension 0 is 1, expected 2 \(batch"),
        ({"encoder_hidden_states": np.zeros((2, 0, 16))}, r"states: dimension 1 is 0, expected at least 1"),
        ({"encoder_hidden_states": np.full((2, 5, 16), np.nan)}, r"finite numbers, found nan at \[0, 0, 0\]"),
        ({"sample": np.full((2, 4, 8, 6), -np.inf)}, r"input sample: expected finite numbers, found -inf"),
        ({"sample": np.full((2, 4, 8, 6), 1e300)}, r"sample: .* found inf at \[0, 0, 0, 0\] \(as float32\)"),
        ({"sample": np.full((2, 4, 8, 6), 1j)}, r"input sample: expected numbers, found .*\(complex128\)"),
        ({"sample": "noise"}, r"input sample: expected numbers, found 'noise'"),
        (
            {"sample": [[1], [1, 2]]},
            r"input sample: expected a number, an array or a tensor: .*inhomogeneous",
        ),
        ({"sample": torch.zeros(2, 4, 8, 6, device="meta")}, r"input sample: expected a number, an array or"),
        ({"timestep": 10**30}, r"input timestep: expected numbers, found 10+ \(object\)"),
        ({"timestep": "500"}, r"input timestep: expected numbers, found '500'"),
        ({"timestep": {"t": 1}}, r"input timestep: expected numbers, found \{'t': 1\}"),
        ({"timestep": float("nan")}, r"input timestep: expected finite numbers, found nan at \[0\]"),
        ({"sigma": True + 10**20}, r"input sigma: expected numbers, found 10+1 \(object\)"),
        ({"intensity": "0.5"}, r"input intensity: expected numbers, found '0.5'"),
    ],
)
def test_inputs_that_are_refused(
    session: Session, inputs: MakeInputs, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(StepError, match=message):
        session.stream().step(**(inputs() | change))


def test_shape_outside_the_profile(edit_manifest: Callable[..., Path], inputs: MakeInputs) -> None:
    profile = {
        "sample": [[1, 4, 8, 6], [2, 4, 8, 6]],
        "timestep": [[1], [2]],
        "encoder_hidden_states": [[1, 5, 16], [2, 5, 16]],
        "sigma": [[1], [2]],
        "intensity": [[1], [2]],
        "sws_state_d2": [[1, 145, 4, 3], [2, 145, 4, 3]],
    }
    recorded = {name: {"min": low, "opt": low, "max": high} for name, (low, high) in profile.items()}
    source = {"kind": "checkpoint", "file": "sd.safetensors", "sha256": "0" * 64, "vae_scale": 8}
    session = Session.load(edit_manifest(profile=recorded, source=source))
    session.step(**inputs())
    command = r"sws-export sd\.safetensors --out sws\.onnx --batch 1:1:{} --height {} --width 48"
    with pytest.raises(
        StepError,
        match=r"input sample: dimension 0 \(batch\) is 3, the engine was built for 1 to 2; use a size "
        r"in this range, or build it again with: " + command.format(3, 64),
    ):
        session.step(**inputs(batch=3))
    with pytest.raises(
        StepError,
        match=r"dimension 2 \(height\) is 12 \(96 pixels\), .* for 8 \(64 pixels\) to 8 \(64 .*"
        + command.format(2, "64:64:96"),
    ):
        session.step(**inputs(height=12))
    longer = inputs()
    longer["encoder_hidden_states"] = np.zeros((2, 7, 16), np.float32)
    with pytest.raises(
        StepError, match=r"states: dimension 1 \(tokens\) is 7, .* 5 to 5; .*--tokens 5:5:7, and"
    ):
        session.step(**longer)


def test_plain_graphs_take_neither_sigma_nor_intensity(traced: Path, inputs: MakeInputs) -> None:
    session = Session.load(traced)
    assert not session.contract.takes_intensity
    step = inputs()
    found = session.step(**step)
    assert np.array_equal(
        found, session.step(step["sample"], step["timestep"], step["encoder_hidden_states"])
    )
    assert session.state() == {}
    session.reset()


def test_intensity_zero_is_the_plain_graph(session: Session, traced: Path, inputs: MakeInputs) -> None:
    plain, stream = Session.load(traced), session.stream()
    for number in range(3):
        step = inputs(number) | {"intensity": 0.0}
        np.testing.assert_allclose(stream.step(**step), plain.step(**step), rtol=0, atol=1e-5)


def test_devices(sws_graph: Path) -> None:
    assert Session.load(sws_graph, device="cpu").device == "cpu"
    with pytest.raises(OptionError, match="device 'tpu' is unknown; use 'cpu' or 'cuda'"):
        Session.load(sws_graph, device="tpu")


def test_cuda_without_the_provider(sws_graph: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has its CUDA provider here")
    with pytest.raises(EngineError, match=r"no CUDA provider here; install it with: pip install"):
        Session.load(sws_graph, device="cuda")
