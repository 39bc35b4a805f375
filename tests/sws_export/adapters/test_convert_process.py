"""The process that exports for ComfyUI: its request and its events."""

from pathlib import Path
from typing import Any

import pytest

from sws_export.adapters import convert_process
from sws_export.runtime import Session


class Events:
    """Collects what the process sends."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, event: str, **values: Any) -> None:
        self.sent.append({"event": event, **values})


@pytest.fixture
def events() -> Events:
    return Events()


def request(events: Events, model: Path, out: Path) -> int:
    groups = {"source": {"precision": None}, "sws": {"guard": "literal"}, "sizes": {}, "engine": {}}
    document = {"model": str(model), "out": str(out), "backend": None, **groups}
    return convert_process.convert(document, events)  # type: ignore[arg-type]


def test_an_artefact_is_complete_when_it_is_finished(events: Events, traced: Path, tmp_path: Path) -> None:
    out = tmp_path / "unet.onnx"
    assert request(events, traced, out) == 0
    assert events.sent[-1] == {"event": "finished"}
    assert Session.load(out, device="cpu", threads=1).contract.takes_intensity
    assert {"stage", "describe", "log"} <= {event["event"] for event in events.sent}
    assert "validate" in {event["name"] for event in events.sent if event["event"] == "stage"}


def test_a_stage_sends_all_that_it_advanced_by(events: Events) -> None:
    progress = convert_process._EventProgress(events)  # type: ignore[arg-type]
    with progress.stage("weights", 30.0) as stage:
        for _ in range(30):
            stage.advance()
    advances = [event["amount"] for event in events.sent if event["event"] == "advance"]
    assert sum(advances) == 30.0
    # Less often than it advanced.
    assert len(advances) < 5


def test_an_error_is_one_event(events: Events, tmp_path: Path) -> None:
    assert request(events, tmp_path / "absent.safetensors", tmp_path / "unet.onnx") == 1
    assert [event["event"] for event in events.sent][-1] == "failed"
    assert "absent.safetensors" in events.sent[-1]["message"]
    assert not list(tmp_path.iterdir())
