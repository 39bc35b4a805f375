"""Processes that are killed at any time: what they leave is consistent, and the next run removes the rest."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sws_export.errors import SwsExportError
from sws_export.runtime.contract import read_contract
from tests.export_runs import COMMAND, run_command

KILLS = 12
"""At equal intervals of the time that a whole run takes."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL"),
]


def state(out: Path) -> str:
    """`none`, or the sha256 of a complete artefact; fails for an artefact that loads and is incomplete."""
    try:
        contract = read_contract(out)
    except SwsExportError:
        return "none" if not out.exists() else "refused"
    (entry,) = (entry for entry in contract.manifest["files"] if entry["name"] == out.name)
    assert hashlib.sha256(out.read_bytes()).hexdigest() == entry["sha256"]
    return entry["sha256"]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("name", ["graph.onnx", "engine.plan"])
def test_a_sweep_of_kills(
    name: str, random_unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "engine.plan":
        pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("SWS_EXPORT_CACHE_SIZE", "1GB")
    monkeypatch.setenv("SWS_EXPORT_CACHE_DIR", str(tmp_path / "cache"))
    out = tmp_path / "out" / name
    out.parent.mkdir()
    arguments = [str(random_unet), "--out", str(out), "--keep-onnx"] if name == "engine.plan" else []
    arguments = arguments or [str(random_unet), "--out", str(out)]
    arguments += ["--vae-scale", "1", "--height", "16", "--width", "16", "--guard", "literal"]
    begin = time.monotonic()
    assert run_command(*arguments, "--no-cache").returncode == 0
    whole = time.monotonic() - begin
    first = state(out)
    for number in range(KILLS):
        process = subprocess.Popen([COMMAND, *arguments, "--no-cache"], stderr=subprocess.DEVNULL)
        time.sleep(whole * (number + 0.5) / KILLS)
        children = []
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not psutil.wait_procs(children, timeout=20)[1], "a child process has outlived its parent"
        # Graphs are the same in every run. An engine of one run with the manifest of another is refused.
        assert state(out) == first if name == "graph.onnx" else state(out) != "none"
        assert len(leftovers(out.parent)) <= 1, "scratch of an earlier run is still there"
    done = run_command(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert state(out) not in ("none", "refused")
    assert leftovers(out.parent) == []
    assert set(json.loads(done.stdout)["files"]) == {str(file) for file in out.parent.iterdir()}
