import argparse
import ctypes
import importlib.util
import sys

import pytest

from sws_export.engines.backend import BuildOptions
from sws_export.engines.choice import choose_backend, engine_memory_estimate, get_backend
from sws_export.errors import EngineError, OptionError
from sws_export.options.engine import EngineOptions

RTX = get_backend("tensorrt-rtx")
TENSORRT = get_backend("tensorrt")


class Driver:
    """The calls of the CUDA driver API with which GPUs are counted."""

    def __init__(self, gpus):
        self._gpus = gpus

    def cuInit(self, _):  # noqa: N802
        return 0

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = self._gpus
        return 0


@pytest.fixture
def machine(monkeypatch):
    """Simulates a machine with a number of GPUs and installed packages."""

    def pretend(gpus, *packages):
        def open_library(name, *arguments, **options):
            if name not in ("libcuda.so.1", "nvcuda.dll"):
                return load(name, *arguments, **options)
            if not gpus:
                raise OSError(f"{name}: cannot open shared object file")
            return Driver(gpus)

        load = ctypes.CDLL
        monkeypatch.setattr(ctypes, "CDLL", open_library)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in packages else None)
        for package in ("tensorrt", "tensorrt_rtx"):
            # The installed library replaces the other one, which is not installed on this machine.
            stand_in = importlib.import_module("tensorrt_rtx") if package in packages else None
            monkeypatch.setitem(sys.modules, package, stand_in)

    return pretend


@pytest.mark.parametrize(
    ("gpus", "packages", "expected"),
    [
        (0, ["tensorrt_rtx"], "tensorrt-rtx"),
        (0, ["tensorrt", "tensorrt_rtx"], "tensorrt-rtx"),
        (1, ["tensorrt_rtx"], "tensorrt-rtx"),
        (1, ["tensorrt", "tensorrt_rtx"], "tensorrt"),
    ],
)
def test_the_default_is_tensorrt_where_it_can_run(machine, gpus, packages, expected):
    machine(gpus, *packages)
    assert choose_backend().name == expected


@pytest.mark.parametrize(("name", "extra"), [("tensorrt", "gpu"), ("tensorrt-rtx", "rtx")])
def test_a_missing_package_is_named_with_its_extra(machine, name, extra):
    machine(1)
    with pytest.raises(EngineError, match=rf"backend {name} needs .*pip install 'sws-export\[{extra}\]'"):
        choose_backend(name)


def test_tensorrt_without_a_gpu_is_refused_with_the_other_backend(machine):
    machine(0, "tensorrt")
    with pytest.raises(EngineError, match=r"needs an NVIDIA GPU .* --backend tensorrt-rtx"):
        choose_backend("tensorrt")


def test_an_unknown_backend():
    with pytest.raises(
        OptionError,
        match="--backend openvino is unknown; choose one of tensorrt-rtx, tensorrt, onnxruntime-cuda",
    ):
        choose_backend("openvino")


def test_a_package_that_cannot_be_loaded(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('libnvinfer.so.10: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EngineError, match=r"tensorrt cannot be loaded \(libnvinfer"):
        TENSORRT.load()


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("refit", True, "--refit is not supported by --backend tensorrt-rtx: without a GPU"),
        ("strip_weights", True, "--strip-weights is not supported"),
        ("version_compatible", True, "--version-compatible is not supported"),
        ("hardware_compatible", True, "--hardware-compatible .*--compute-capability"),
        ("timing_cache", "file", "--timing-cache .* selects kernels at run time"),
        ("plugins", ("x.so",), "does not support plugins"),
    ],
)
def test_options_that_rtx_does_not_support(option, value, text):
    with pytest.raises(OptionError, match=text):
        BuildOptions(RTX, **{option: value})


def test_tensorrt_does_not_support_other_gpus():
    with pytest.raises(OptionError, match=r"--compute-capability is not supported .*GPU of this machine"):
        BuildOptions(TENSORRT, compute_capabilities=("8.9",))


def test_an_unsupported_capability():
    with pytest.raises(OptionError, match=r"--compute-capability 9\.0: .* 7\.5, 8\.0, 8\.6, 8\.9, 12\.0"):
        BuildOptions(RTX, compute_capabilities=("8.9", "9.0"))


def test_capabilities_are_split_and_not_repeated():
    parser = argparse.ArgumentParser()
    EngineOptions.add_arguments(parser)
    assert parser.parse_args(["--compute-capability", "8.9, 12.0,8.9"]).compute_capabilities == (
        "8.9",
        "12.0",
    )


def test_rtx_builds_for_ampere_and_later_by_default():
    assert BuildOptions(RTX).targets == ("8.0", "8.6", "8.9", "12.0")


@pytest.mark.parametrize("level", [-1, 6])
def test_an_optimization_level_out_of_range(level):
    with pytest.raises(OptionError, match=f"--builder-optimization-level must be 0 to 5, found {level}"):
        BuildOptions(RTX, optimization_level=level)


@pytest.mark.parametrize(
    ("weights", "measured"),
    [(1_719_000_000, 6_385_000_000), (5_140_000_000, 16_000_000_000), (1e7, 934_000_000)],
)
def test_the_memory_estimate_is_at_most_a_fifth_above_the_measurement(weights, measured):
    assert measured <= engine_memory_estimate(int(weights), RTX) <= 1.2 * measured


def test_a_runtime_of_graphs_builds_no_engine() -> None:
    with pytest.raises(
        OptionError, match=r"--backend onnxruntime-cuda runs an ONNX graph .* use --out FILE\.onnx"
    ):
        get_backend("onnxruntime-cuda")
