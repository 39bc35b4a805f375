"""Helpers for tests of whole exports: small UNets, files shared by a session, the command as a process."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from filelock import FileLock

from sws_export import ExportOptions, SwsOptions
from sws_export.checkpoint import Checkpoint, check_tensors, expected_shapes
from sws_export.progress import Progress, SilentProgress, Stage

Array = npt.NDArray[Any]
Outputs = dict[str, Array]

ROOT = Path(__file__).parents[1]
TRAINED = ROOT / "examples" / "shapes" / "unet"
COMMAND = Path(sys.executable).parent / "sws-export"
# One site with the literal guard: exported in a fifth of the time of the default, loaded in a tenth.
ONE_SITE = SwsOptions(sites=("mid_block.*.attn1",), guard="literal")


def make_unet(directory: Path, **changes: Any) -> Path:
    """A UNet of about 1 M random weights with attention on its coarser grid, in pixel space."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **{
            "sample_size": 16,
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        }
        | changes
    )
    unet.save_pretrained(directory)
    return directory


def check_names(checkpoint: Checkpoint) -> int:
    """Compare names and shapes with diffusers' UNet; returns the number of unused tensors."""
    return check_tensors(checkpoint, expected_shapes(checkpoint.config))


# A group norm subtracts a constant, next to which float32 keeps little of the signal: the graph is over its
# tolerance.
ROUNDED_AWAY = {"mid_block.resnets.0.conv1.bias": lambda bias: bias + 300}


def changed_copy(model: Path, folder: Path, changes: Mapping[str, Callable[[Array], Array]]) -> Path:
    """A copy of a UNet in `folder`, with the weights that `changes` names replaced by functions of them."""
    from safetensors.numpy import load_file, save_file

    copy = Path(shutil.copytree(model, folder / "changed"))
    file = copy / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name, change in changes.items():
        weights[name] = change(weights[name]).astype(weights[name].dtype)
    save_file(weights, file)
    return copy


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A file or directory that `make` writes once a test session, whichever test process asks first.

    The processes of pytest-xdist have a common parent directory. `make` gets the final path, since the
    contents may refer to it; a marker beside it records that it is complete.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    path = base / "shared" / name
    path.parent.mkdir(exist_ok=True, parents=True)
    complete = path.with_name(f"{path.name}.complete")
    with FileLock(path.with_name(f"{path.name}.lock")):
        if not complete.exists():
            make(path)
            complete.touch()
    return path


def export_once(factory: pytest.TempPathFactory, model: Path, options: ExportOptions) -> Path:
    """The graph of an export that is made once a test session; tests must not change the file."""
    from sws_export import export

    def make(directory: Path) -> None:
        directory.mkdir()
        export(model, directory / "graph.onnx", options)

    key = hashlib.sha256(repr((model, options)).encode()).hexdigest()[:16]
    return shared(factory, f"export-{key}", make) / "graph.onnx"


class SharedTraces:
    """Traces that were cached by the exports of a test session, for the caches of other tests."""

    def __init__(self, directory: Path) -> None:
        """Traces in `directory`, to which several test processes add theirs."""
        self._directory = directory
        self._lock = FileLock(directory.with_name("traces.copied"))

    @contextlib.contextmanager
    def used_in(self, cache: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
        """Export with a cache in the directory `cache`, which has these traces at first."""
        with self._lock:
            shutil.copytree(self._directory, cache / "entries", dirs_exist_ok=True)
        patch.setenv("SWS_EXPORT_CACHE_DIR", str(cache))
        patch.setenv("SWS_EXPORT_CACHE_SIZE", "1GB")
        yield
        with self._lock:
            for trace in (cache / "entries").glob("trace-*"):
                if not (self._directory / trace.name).exists():
                    shutil.copytree(trace, self._directory / trace.name)


def remove_results(cache: Path) -> None:
    """Remove all but the traces from a cache, and the digests of files."""
    for result in (cache / "entries").glob("*"):
        if not result.name.startswith("trace-"):
            shutil.rmtree(result)
    shutil.rmtree(cache / "digests", ignore_errors=True)


def trace(model: Path, out: Path) -> None:
    """Write the plain graph of `model`, without validation."""
    from sws_export import export

    export(model, out, ExportOptions(sws=SwsOptions(plain=True), validate=False))


def with_options(options: ExportOptions, **changes: Any) -> ExportOptions:
    """`options` with fields changed, those of the groups too, each named without its group."""
    grouped: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for name, value in changes.items():
        for group in ("source", "sws", "quantization", "sizes", "engine"):
            if hasattr(getattr(options, group), name):
                grouped.setdefault(group, {})[name] = value
                break
        else:
            own[name] = value
    groups = {
        group: dataclasses.replace(getattr(options, group), **fields) for group, fields in grouped.items()
    }
    return dataclasses.replace(options, **groups, **own)


class RecordingProgress:
    """A `Progress` that forwards everything and records messages and warnings."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.lines: list[tuple[bool, str]] = []
        """The messages in order: (is a warning, text)."""

    def stage(self, name: str, total: float | None = None) -> contextlib.AbstractContextManager[Stage]:
        """Open a stage."""
        return self._progress.stage(name, total)

    def log(self, message: str) -> None:
        """Forward and record a message."""
        self.lines.append((False, message))
        self._progress.log(message)

    def warn(self, message: str) -> None:
        """Forward and record a warning."""
        self.lines.append((True, message))
        self._progress.warn(message)


class AtStage(RecordingProgress):
    """Progress that calls `action` when the first stage `name` begins.

    Attributes:
        stages: Names of all stages in order.
    """

    def __init__(self, name: str = "", action: Callable[[], object] = lambda: None) -> None:
        super().__init__(SilentProgress())
        self.stages: list[str] = []
        self._name = name
        self._action = action

    def stage(self, name: str, total: float | None = None) -> contextlib.AbstractContextManager[Stage]:
        self.stages.append(name)
        if name == self._name and self.stages.count(name) == 1:
            self._action()
        return super().stage(name, total)


def run_command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `sws-export` in a process."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, timeout=500
    )


BUILDER = """#!{python} -SE
import json, os, sys
spec = json.load(sys.stdin)
folder = os.path.dirname(__file__)
number = len(os.listdir(folder))
assert os.path.isfile(spec["onnx"])
with open(os.path.join(folder, f"{number:03}.json"), "w") as file:
    json.dump(spec, file)
with open(spec["out"], "wb") as file:
    # Its size at byte 16, 1.7.1.116, compute capability 8.9; see sws_export/engines/header.py.
    file.write(b"vtrt" + bytes(12) + bytes([40, *bytes(7), 1, 7, 1, 116, *bytes(4), 8, *bytes(3)]))
    file.write(number.to_bytes(4, "little"))
figures = {"layers": 3, "decomposed_attentions": 0, "parse_seconds": 0.5, "build_seconds": 0.5}
figures |= {"library_version": "1.7", "peak_memory": 10**6, "gpu_memory": None}
print(json.dumps({"event": "log", "severity": "warning", "text": "slow"}))
print(json.dumps({"event": "built", **figures}))
"""


class Builds:
    """Engine builds in whose process a program takes the place of TensorRT.

    The last four bytes of an engine are its number, from 1 on.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        """Until the end of `patch`, engines are built by a program in `folder`, which does not exist yet."""
        folder.mkdir()
        self._folder = folder
        program = folder / "builder"
        program.write_text(BUILDER.replace("{python}", sys.executable))
        program.chmod(0o755)
        # The Python that runs the build process.
        patch.setattr(sys, "executable", str(program))

    @property
    def specifications(self) -> list[dict[str, Any]]:
        """The specification that each build process was given."""
        return [json.loads(file.read_text()) for file in sorted(self._folder.glob("*.json"))]

    def __len__(self) -> int:
        return len(self.specifications)


def error_line(stderr: str) -> str:
    """The error line of the command: exactly one, the last line, and no traceback."""
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("sws-export: ")]
    assert len(lines) == 1, stderr
    assert stderr.splitlines()[-1] == lines[0]
    return lines[0].removeprefix("sws-export: ")


def listing(directory: Path) -> dict[str, bytes | None]:
    """Every path below a directory, hidden ones included, with the contents of files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


class Session:
    """A graph in ONNX Runtime without `sws_export.runtime`: the caller passes the state from step to step."""

    def __init__(self, path: Path, *, optimized: bool = False) -> None:
        """Load a graph; optimizing one with SWS takes longer than all the steps that a test runs."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.inputs = {node.name: types[node.type] for node in self._session.get_inputs()}
        self.outputs = [node.name for node in self._session.get_outputs()]
        self._states = {
            node.name: node.shape for node in self._session.get_inputs() if node.name.startswith("sws_state_")
        }

    def zero_state(self, inputs: Mapping[str, Array]) -> Outputs:
        """The zero state that an image starts with, for the sizes of `inputs`."""
        batch, _, height, width = inputs["sample"].shape
        tokens = inputs["encoder_hidden_states"].shape[1]
        sizes = {"batch": batch, "height": height, "width": width, "tokens": tokens}
        return {
            name: np.zeros([_size(dimension, sizes) for dimension in shape], np.float32)
            for name, shape in self._states.items()
        }

    def step(self, inputs: Mapping[str, Array], state: Mapping[str, Array]) -> tuple[Array, Outputs]:
        """The prediction and the next state, by the names of the state inputs."""
        feed = {name: np.asarray((inputs | state)[name], dtype) for name, dtype in self.inputs.items()}
        found = dict(zip(self.outputs, self._session.run(self.outputs, feed), strict=True))
        return found.pop("out_sample"), {name.removesuffix("_out"): value for name, value in found.items()}

    def run(self, steps: Sequence[Mapping[str, Array]]) -> Iterator[tuple[Array, Outputs]]:
        """Several steps with the state fed back."""
        state = self.zero_state(steps[0])
        for inputs in steps:
            out, state = self.step(inputs, state)
            yield out, state


@functools.lru_cache(maxsize=4)
def open_session(path: Path, *, optimized: bool = False) -> Session:
    """The session of a file that does not change."""
    return Session(path, optimized=optimized)


def _size(dimension: int | str, sizes: Mapping[str, int]) -> int:
    """The value of a declared dimension: a number, the name of a size, or `size/divisor`."""
    if isinstance(dimension, int):
        return dimension
    name, _, divisor = dimension.partition("/")
    return sizes[name] // int(divisor or 1)


def difference(found: Array, expected: Array) -> float:
    """Largest difference relative to the largest expected value; infinite if one is not finite."""
    apart = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max()
    return float(apart / np.abs(expected).max()) if np.isfinite(apart) else float("inf")
