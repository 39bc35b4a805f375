from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.plugins.cases import Harness
from tests.plugins.toolchain import build_contract_program, build_harness, build_library


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are small: with more threads torch spends its time on synchronization."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(build_harness(sanitized=False), Path(tmp_path_factory.mktemp("harness")))


@pytest.fixture(scope="session")
def sanitized_harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    """The same program under the address and undefined-behaviour sanitizers."""
    return Harness(build_harness(sanitized=True), Path(tmp_path_factory.mktemp("sanitized")))


@pytest.fixture(scope="session")
def library() -> Path:
    """The shared library, for one architecture."""
    return build_library()


@pytest.fixture(scope="session")
def contract_program() -> Path:
    """The program that calls the library as TensorRT does."""
    return build_contract_program()
