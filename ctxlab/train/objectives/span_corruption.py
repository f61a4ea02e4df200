"""Span corruption: spans of a text are left out, and a decoder writes them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.windows import Row
from ctxlab.errors import DataError
from ctxlab.train.objectives.base import OBJECTIVES, Objective
from ctxlab.train.objectives.windows import Denoising


@OBJECTIVES.register("span_corruption")
class SpanCorruption(Denoising):
    """T5's: 15% of the tokens are noise, in spans of 3 on average, each of which one sentinel stands for.

    Raffel et al. 2020, arXiv:1910.10683, section 3.1.4 and the preprocessors of its code. Of n tokens round(0.15 n) are
    noise, within 1 and n - 1, in max(1, round(noise / 3)) spans, as far as there are so many tokens of text to stand between
    them (T5's code has no bound, which its 15% need not); how noise and text are cut into spans is uniform among all
    ways to cut them into so many parts of at least one token. They take turns, text first. Source: the text with a sentinel
    for each span, and eos. Target: each sentinel and its span, and eos. The k-th sentinel is the k-th id from the last.
    """

    class Config(Objective.Config):
        name: Literal["span_corruption"] = "span_corruption"
        density: float = Field(0.15, gt=0, lt=1, description="share of the tokens that are noise")
        mean_span: float = Field(3.0, ge=1, description="tokens of a span, on average")

    paper = "Raffel et al. 2020, arXiv:1910.10683"
    architectures = ("encoder_decoder", "bert2bert")
    config: Config

    def counts(self, n: int) -> tuple[int, int]:
        """(tokens of noise, spans) of n tokens."""
        noise = min(max(round(n * self.config.density), 1), n - 1)
        return noise, max(1, min(round(noise / self.config.mean_span), n - noise))

    def window(self, context: int, tokenizer: Tokenizer) -> int:
        """The most tokens whose source and whose target, sentinels and eos included, fill no more than `context` each."""
        n = context
        while self._length(n + 1) <= context:
            n += 1
        while n > 2 and self._length(n) > context:
            n -= 1
        if n < 2 or self._length(n) > context:
            raise DataError(
                f"context: {context} tokens are too few to leave out spans of; the nearest valid value is 3"
            )
        spans = self.counts(n)[1]
        if tokenizer.config.sentinels < spans:
            raise DataError(
                f"tokenizer.sentinels: {tokenizer.config.sentinels} are too few for the {spans} spans of {n} tokens; use "
                f"tokenizer.sentinels={max(100, spans)}"
            )
        return n

    def _length(self, n: int) -> int:
        """Of the longer of source and target: the target where more than half is noise."""
        noise, spans = self.counts(n)
        return max(noise, n - noise) + spans + 1

    def row(self, tokens: np.ndarray, random: np.random.Generator, tokenizer: Tokenizer) -> Row:
        noise, spans = self.counts(len(tokens))
        texts, noises = parts(len(tokens) - noise, spans, random), parts(noise, spans, random)
        source: list[int] = []
        target: list[int] = []
        at = 0
        for number, (text, left_out) in enumerate(zip(texts, noises, strict=True)):
            sentinel = tokenizer.sentinel_id(number)
            source += [*tokens[at : at + text].tolist(), sentinel]
            target += [sentinel, *tokens[at + text : at + text + left_out].tolist()]
            at += text + left_out
        target.append(tokenizer.eos_id)
        source.append(tokenizer.eos_id)
        said = np.array(target, dtype=np.int64)
        return Row(
            np.array([tokenizer.bos_id, *target[:-1]], dtype=np.int64), said, (), np.array(source, dtype=np.int64)
        )


def parts(n: int, k: int, random: np.random.Generator) -> list[int]:
    """n as a sum of k numbers >= 1, every such sum in order as likely as every other; k <= n."""
    cuts = np.sort(random.choice(n - 1, size=k - 1, replace=False)) + 1 if k > 1 else np.empty(0, dtype=np.int64)
    return np.diff(np.concatenate([[0], cuts, [n]])).astype(int).tolist()
