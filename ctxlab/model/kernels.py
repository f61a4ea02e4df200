"""Whose kernels compute: those of the device where the tensors lie, or those of the one that a step is only traced for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_traced_for: str | None = None  # no ContextVar, which torch's compiler does not see through


def kernels_of(device: torch.device) -> str:
    """The kind of device whose kernels, and sizes of parts, are taken for tensors that lie on `device`: cpu, cuda, ..."""
    return _traced_for or device.type


@contextmanager
def traced_for(kind: str) -> Iterator[None]:
    """Inside, tensors without numbers that stand on a CPU go the ways of another kind of device: its operations are called, of
    which torch knows the shapes wherever it was built."""
    global _traced_for
    before, _traced_for = _traced_for, kind
    try:
        yield
    finally:
        _traced_for = before


def has_no_numbers(x: Tensor) -> bool:
    """Whether x is one of a trace: shapes are all there is."""
    return type(x).__name__ == "FakeTensor"
