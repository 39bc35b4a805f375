"""The limit of the GPU memory of an engine."""

import dataclasses

import pytest

from sws_export.engines.backend import BuildOptions
from sws_export.engines.build import EngineReport
from sws_export.engines.choice import get_backend
from sws_export.engines.gpu_memory import GpuMemory, ProfileMemory
from sws_export.errors import EngineError, OptionError
from sws_export.options import EngineOptions
from sws_export.pipeline.engine import check_gpu_memory
from sws_export.pipeline.plan import EngineConfig
from sws_export.tensors import Range, SizeRanges

SIDE, TOKENS = Range(64, 64, 64), Range(77, 77, 77)
PROFILES = tuple(SizeRanges(Range(batch, batch, batch), SIDE, SIDE, TOKENS) for batch in (2, 4))
MEMORY = GpuMemory(10**9, (ProfileMemory(10**8, 0), ProfileMemory(2 * 10**9, 0, 10**7)))
REPORT = EngineReport("tensorrt-rtx", "1.7", (), 4, 1.0, 0.5, 0.5, 10**6, 3, 0, {}, gpu_memory=MEMORY)


def limited(limit: str) -> EngineConfig:
    return EngineConfig(PROFILES, BuildOptions(backend=get_backend("tensorrt-rtx"), max_gpu_memory=limit))


@pytest.mark.parametrize("limit", ["", "3.01GB", "4 GB"])
def test_an_engine_within_the_limit(limit: str) -> None:
    check_gpu_memory(REPORT, limited(limit))


def test_an_engine_above_the_limit() -> None:
    with pytest.raises(
        EngineError,
        match=r"needs 3\.01 GB .* \(batch 4, height 64, .*\), more than --max-gpu-memory 3GB; nothing was",
    ):
        check_gpu_memory(REPORT, limited("3GB"))


def test_an_engine_whose_needs_are_unknown() -> None:
    unknown = dataclasses.replace(REPORT, gpu_memory=None)
    check_gpu_memory(unknown, limited(""))
    with pytest.raises(EngineError, match=r"--max-gpu-memory 3GB: tensorrt-rtx 1\.7 did not report"):
        check_gpu_memory(unknown, limited("3GB"))


def test_a_limit_that_is_no_size() -> None:
    with pytest.raises(OptionError, match="--max-gpu-memory much: expected a size such as 500MB"):
        EngineOptions(max_gpu_memory="much")


def test_static_sizes_are_those_of_all_profiles() -> None:
    assert limited("").static_sizes == {"height": 64, "width": 64, "tokens": 77}
