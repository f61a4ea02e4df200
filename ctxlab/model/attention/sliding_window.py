"""Sliding-window attention: a query sees the last tokens only."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.attention.local import Local, is_global
from ctxlab.model.attention.visible import Visible, Window


@ATTENTIONS.register("sliding_window")
class SlidingWindow(Local):
    """A query sees `size` keys, itself among them: i - size < j <= i, or |i - j| < size where nothing is causal.

    Beltagy et al. 2020, arXiv:2004.05150; Jiang et al. 2023 (Mistral), arXiv:2310.06825. Libraries count differently:
    some let it see one key more. Keys that left the window of every later query leave the cache.
    """

    class Config(Local.Config):
        name: Literal["sliding_window"] = "sliding_window"
        size: int = Field(1024, ge=1, description="keys that a query sees, itself among them")

    paper = "Beltagy et al. 2020, arXiv:2004.05150"

    def rule(self, size: int) -> Visible:
        return Window(size)

    @staticmethod
    def near(i: Tensor, j: Tensor, size: int) -> Tensor:
        return (i - j).abs() < size

    def first_needed(self, position: int) -> int:
        return 0 if self.size is None else max(0, position - self.size + 1)

    @classmethod
    def cached_tokens(cls, config: Any, length: int, layer: int) -> int:
        return length if is_global(config, layer) else min(length, config.size)
