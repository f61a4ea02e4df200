"""Sliding-window attention: a query sees the last tokens only."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.attention.local import Local
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

    slides = True
    paper = "Beltagy et al. 2020, arXiv:2004.05150"

    @staticmethod
    def neighbourhood(config: Any) -> Visible:
        return Window(config.size)
