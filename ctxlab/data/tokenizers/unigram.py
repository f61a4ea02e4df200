"""A unigram language model over pieces."""

from __future__ import annotations

from typing import Literal

from ctxlab.data.tokenizers.base import TOKENIZERS
from ctxlab.data.tokenizers.pieces import TrainedPieces


@TOKENIZERS.register("unigram")
class Unigram(TrainedPieces):
    """The most probable cut of the text into pieces of a trained vocabulary (Kudo 2018, arXiv:1804.10959)."""

    source = "Kudo 2018, arXiv:1804.10959; trained on the train split"

    class Config(TrainedPieces.Config):
        name: Literal["unigram"] = "unigram"
