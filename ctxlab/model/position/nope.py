"""No position at all: order comes from the causal mask alone."""

from __future__ import annotations

from typing import Literal

from ctxlab.model.position.base import POSITIONS, Position


@POSITIONS.register("nope")
class NoPE(Position):
    """Nothing is added anywhere; a causal model can still count what it sees (Haviv et al. 2022, arXiv:2203.16634)."""

    class Config(Position.Config):
        name: Literal["nope"] = "nope"

    paper = "Haviv et al. 2022, arXiv:2203.16634"
    form = "none"
    relative = True
    bidirectional = False
