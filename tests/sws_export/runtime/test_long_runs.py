"""Long runs hold memory constant: many steps of one stream, and many streams of one session."""

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from sws_export.runtime import Session

STEPS = 10_000
STREAMS = 1_000
GROWTH = 8_000_000
"""Bytes that the process may grow by: one step of this UNet allocates more than a thousandth of it."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_steps_of_one_stream(sws_graph: Path) -> None:
    step = make_step(Session.load(sws_graph, device="cpu", threads=1))
    grown = growth(step, warm=1_000, times=STEPS)
    print(f"{STEPS} steps: {grown / 1e6:.2f} MB")
    assert grown < GROWTH


def test_streams_of_one_session(sws_graph: Path) -> None:
    session = Session.load(sws_graph, device="cpu", threads=1)

    def one() -> None:
        step = make_step(session.stream())
        step()
        step()

    grown = growth(one, warm=100, times=STREAMS)
    print(f"{STREAMS} streams: {grown / 1e6:.2f} MB")
    assert grown < GROWTH


def make_step(stream: object) -> Callable[[], None]:
    """A step of a stream with inputs of its own."""
    random = np.random.default_rng(0)
    sample = random.standard_normal((1, 4, 8, 8), np.float32)
    text = random.standard_normal((1, 5, 16), np.float32)

    def step() -> None:
        stream.step(sample, 500, text, sigma=3.0)  # type: ignore[attr-defined]

    return step


def growth(action: Callable[[], None], *, warm: int, times: int) -> int:
    """Bytes of resident memory that the process gains in `times` actions, after `warm` ones."""
    for _ in range(warm):
        action()
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(times):
        action()
    gc.collect()
    return psutil.Process().memory_info().rss - before
