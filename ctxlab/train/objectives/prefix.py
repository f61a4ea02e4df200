"""Prefix language modelling: a text is read both ways up to some place, and said token by token from there on."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.windows import IGNORED, Row
from ctxlab.train.objectives.base import OBJECTIVES, Objective
from ctxlab.train.objectives.windows import Denoising


@OBJECTIVES.register("prefix")
class Prefix(Denoising):
    """-sum_{t >= P} ln p(x_t | x_<t) of n + 1 tokens x_0 .. x_n, where x_0 .. x_{P-1} see all of one another.

    Raffel et al. 2020, arXiv:1910.10683, sections 3.2.1 and 3.3.1; as in the preprocessors of its code (`prefix_lm`,
    `random_prefix_noise_mask`) P is uniform on 1 .. n, anew in each epoch, so one token at least is read and one said. One
    stack does both, whose weights are a decoder's: it may start from one. A prompt is the prefix when text is generated;
    perplexity of a text without one is scored token by token, as after a prefix of one.
    """

    class Config(Objective.Config):
        name: Literal["prefix"] = "prefix"

    paper = "Raffel et al. 2020, arXiv:1910.10683"
    architectures = ("decoder",)
    prefix = True
    continues = True

    def window(self, context: int, tokenizer: Tokenizer) -> int:
        return context + 1

    def row(self, tokens: np.ndarray, random: np.random.Generator, tokenizer: Tokenizer) -> Row:
        length = int(random.integers(1, len(tokens)))
        targets = tokens[1:].copy()
        targets[: length - 1] = IGNORED
        return Row(tokens[:-1], targets, ())


def prefix_lengths(targets: Tensor) -> Tensor:
    """How many tokens of each row (B,T) come before the first that is to be said, (B,): its target stands at the last of them."""
    return (targets != IGNORED).to(torch.int64).argmax(1) + 1
