"""Transformer-XL's recurrence: text is read in segments, and each sees the memory that the ones before it have left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ctxlab.errors import IncompatibleError
from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.attention.local import Local
from ctxlab.model.attention.visible import Remembered, Visible
from ctxlab.model.position.base import Position


@ATTENTIONS.register("recurrent")
class Recurrent(Local):
    """A query of segment s = i // size sees the keys j <= i of its segment and of the `memory` tokens before it.

        s size - memory <= j <= i

    Dai et al. 2019 (Transformer-XL), arXiv:1901.02860, section 3.2. A layer's memory is what its inputs were at those tokens;
    keys and values are projected from it anew. In training it is carried from one step to the next, whose rows go on with
    the same documents, and no gradient flows into it. In evaluation, where weights stand still, one forward over a long
    text, cached chunks and segments with carried memory are the same, and `memory` may be larger than in training: with L
    layers what is seen reaches back L memory tokens. Distances across segments have to mean something: schemes that are
    added to the embeddings, or look at where a query stands, are refused.
    """

    class Config(Local.Config):
        name: Literal["recurrent"] = "recurrent"
        size: int = Field(256, ge=1, description="tokens of a segment; in training it has to divide the context")
        memory: int = Field(256, ge=0, description="tokens before the segment that it sees, whole segments")
        global_every: Literal["none"] = Field("none", description="a memory has an end: no layer sees everything")

        @model_validator(mode="after")
        def _whole_segments(self) -> Recurrent.Config:
            if self.memory % self.size:
                nearest = round(self.memory / self.size) * self.size
                raise ValueError(
                    f"memory ({self.memory}) must be a multiple of the segment's size ({self.size}); "
                    f"the nearest valid value is {nearest}"
                )
            return self

    paper = "Dai et al. 2019, arXiv:1901.02860"

    @classmethod
    def check_position(cls, position: type[Position], name: str) -> None:
        if not position.relative:
            raise IncompatibleError(
                f"attention.name: recurrent attention reads {name} positions of an earlier segment as if they were of this "
                "one; use a relative scheme, such as transformer_xl or rope"
            )

    @classmethod
    def check_training(cls, config: Any, *, contexts: Sequence[int], packed: bool) -> None:
        if packed:
            raise IncompatibleError("data.packed: recurrent attention carries a memory along whole rows; use false")
        for context in contexts:
            if context % config.size:
                nearest = min(
                    (n for n in range(1, context + 1) if context % n == 0), key=lambda n: abs(n - config.size)
                )
                raise IncompatibleError(
                    f"attention.size: rows of {context} tokens are no whole segments of {config.size}; "
                    f"the nearest valid value is {nearest}"
                )

    @classmethod
    def carried_tokens(cls, config: Any) -> int:
        memory: int = config.memory
        return memory

    @staticmethod
    def neighbourhood(config: Any) -> Visible:
        return Remembered(config.size, config.memory)
