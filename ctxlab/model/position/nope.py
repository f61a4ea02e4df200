"""No position at all: order comes from the causal mask alone."""

from __future__ import annotations

from typing import Literal

from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position


@POSITIONS.register("nope")
class NoPE(Position):
    """Nothing is added anywhere; a causal model can still count what it sees (Haviv et al. 2022, arXiv:2203.16634).

    An encoder without positions knows the bag of its tokens alone (same paper, table 4), which is there to be seen: it is not
    refused.
    """

    class Config(Position.Config):
        name: Literal["nope"] = "nope"

    paper = "Haviv et al. 2022, arXiv:2203.16634"
    form = "none"
    relative = True
    bidirectional = False

    @classmethod
    def check(cls, config: Position.Config, model: ModelConfig, *, causal: bool = True) -> None:
        """Any model can do without."""
