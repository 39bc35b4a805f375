"""Inputs for Polygraphy, and Polygraphy run with them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sws_export.adapters import polygraphy_data
from sws_export.errors import OptionError
from sws_export.runtime import Session
from tests import export_runs

SIZES = "batch=2,height=8,width=6,tokens=5"


@pytest.fixture
def environment(sws_graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWS_MANIFEST", f"{sws_graph}.json")
    monkeypatch.setenv("SWS_SIZES", SIZES)


def test_inputs_are_those_of_first_steps(environment: None, sws_graph: Path) -> None:
    session = Session.load(sws_graph)
    steps: list[dict[str, Any]] = list(polygraphy_data.load_data())
    assert len(steps) == 3
    assert [float(step["sigma"][0]) for step in steps] == [10.0, 3.0, 0.5]
    for step in steps:
        state = step.pop("sws_state_d2")
        assert state.shape == (2, 145, 4, 3)
        assert not state.any()
        assert np.isfinite(session.stream().step(**step)).all()


def test_polygraphy_runs_the_graph(sws_graph: Path) -> None:
    program, script = Path(sys.executable).parent / "polygraphy", polygraphy_data.__file__
    done = subprocess.run(
        [program, "run", sws_graph, "--onnxrt", "--validate", "--data-loader-script", script],
        env=os.environ
        | {"SWS_MANIFEST": f"{sws_graph}.json", "SWS_SIZES": SIZES, "PYTHONPATH": str(export_runs.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("batch=2", "SWS_SIZES: height, width, tokens is missing; write height=NUMBER"),
        ("depth=2", "SWS_SIZES: 'depth=2' is not NAME=NUMBER"),
        ("batch=two", "SWS_SIZES: 'batch=two' is not NAME=NUMBER"),
    ],
)
def test_sizes_that_are_refused(
    environment: None, monkeypatch: pytest.MonkeyPatch, sizes: str, message: str
) -> None:
    monkeypatch.setenv("SWS_SIZES", sizes)
    with pytest.raises(OptionError, match=message):
        next(polygraphy_data.load_data())


def test_a_manifest_that_is_missing(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWS_MANIFEST", "nowhere.json")
    with pytest.raises(OptionError, match=r"SWS_MANIFEST=nowhere\.json: no such file"):
        next(polygraphy_data.load_data())
