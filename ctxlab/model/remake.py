"""What backward makes again instead of finding it kept: single tensors always, larger parts by policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

Recompute = Literal["none", "selective", "block"]
RecomputeSetting = Literal["none", "selective", "block", "auto"]
POLICIES: tuple[Recompute, ...] = ("none", "selective", "block")
"""What is computed a second time, in the order of what it costs: no product of matrices; those of feed-forward layers but the
last of each; blocks, whole. Outputs of norms and of activation functions, which are cheap, are made again under none, too."""


@contextmanager
def remade(made: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, what autograd would keep of `made`, a view of it too, is only how to make it again: `again()`.

    Chen et al. 2016, arXiv:1604.06174, for single tensors. The gradients are the same bits where `again` gives the same bits.
    It runs once in a backward pass, however many operations have read `made`: at the first of them, until the last. What it
    needs should be kept for other reasons, or nothing is saved.
    """
    storage = made.untyped_storage()._cdata  # stands for `made` alone as long as that is alive, which is here
    shared = Shared(again)

    def pack(kept: Tensor) -> Any:
        if kept.untyped_storage()._cdata != storage:
            return kept.detach()  # itself, an output would hold its own graph, and what nobody reads would stay
        shared.uses += 1
        return kept.size(), kept.stride(), kept.storage_offset()

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else shared.take().as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class Shared:
    """A tensor that exists from the first of its uses in a backward pass to the last.

    Where a pass leaves some of them out, it waits for the next, or goes with the graph.
    """

    def __init__(self, again: Callable[[], Tensor]) -> None:
        self.again = again
        self.uses = self.left = 0
        self.made: Tensor | None = None

    def take(self) -> Tensor:
        made = self.made
        if made is None:
            with torch.no_grad():
                made = self.again()
            self.left = self.uses
        self.left -= 1
        self.made = made if self.left else None
        return made
