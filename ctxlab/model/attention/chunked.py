"""Chunked attention: the sequence is cut into chunks, and a query sees its own only."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.attention.local import Local
from ctxlab.model.attention.visible import Chunk, Visible


@ATTENTIONS.register("chunked")
class Chunked(Local):
    """A query sees the keys of its own chunk of `size` tokens, counted from the first: i // size = j // size, and j <= i.

    As the local layers of Llama 4, whose size is 8,192 and which leave every 4th layer global; the idea is that of the
    fixed pattern of Child et al. 2019, arXiv:1904.10509. A cache is emptied at each chunk's end.
    """

    class Config(Local.Config):
        name: Literal["chunked"] = "chunked"
        size: int = Field(1024, ge=1, description="tokens in a chunk")

    paper = "Child et al. 2019, arXiv:1904.10509"

    @staticmethod
    def neighbourhood(config: Any) -> Visible:
        return Chunk(config.size)
