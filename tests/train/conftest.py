"""One thread each: models of this size lose to the waiting of threads for one another many times over."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# For the processes that tests start; this one may have started its threads already.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
