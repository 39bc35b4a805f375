"""Fixtures of the tests of the examples."""

from collections.abc import Iterator

import pytest
import torch


# Bit-equal training needs it, and the rest is faster with it on a busy machine: the model is small.
@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
