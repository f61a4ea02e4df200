"""Byte-pair encoding."""

from __future__ import annotations

from typing import Literal

from ctxlab.data.tokenizers.base import TOKENIZERS
from ctxlab.data.tokenizers.pieces import TrainedPieces


@TOKENIZERS.register("bpe")
class BPE(TrainedPieces):
    """The most frequent pair of pieces becomes a piece, again and again (Sennrich et al. 2016, arXiv:1508.07909)."""

    source = "Sennrich et al. 2016, arXiv:1508.07909; trained on the train split"

    class Config(TrainedPieces.Config):
        name: Literal["bpe"] = "bpe"
