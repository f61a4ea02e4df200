"""Selective recomputation: what is cheap to make again is not kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

Recompute = Literal["none", "selective", "block"]
RecomputeSetting = Literal["none", "selective", "block", "auto"]
POLICIES: tuple[Recompute, ...] = ("none", "selective", "block")
"""What backward makes again, in the order of what it costs: nothing; outputs of norms and of the feed-forward layer's
activation function; each block whole."""


@contextmanager
def remade(made: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, what autograd would keep of `made`, a view of it too, is only how to make it again: `again()`.

    Chen et al. 2016, arXiv:1604.06174, for single tensors. The gradients are the same bits where `again` gives the same bits.
    It runs once for each operation that has read `made`, in the backward pass, so it should cost little beside them.
    """
    storage = made.untyped_storage()._cdata  # stands for `made` alone as long as that is alive, which is here

    def pack(kept: Tensor) -> Any:
        if kept.untyped_storage()._cdata != storage:
            return kept
        return kept.size(), kept.stride(), kept.storage_offset()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return again().as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
