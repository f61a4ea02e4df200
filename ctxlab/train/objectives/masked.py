"""Masked language modelling: some tokens are hidden or changed, and said from all that stands around them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.shown import basic_words, words_of
from ctxlab.data.windows import IGNORED, Row
from ctxlab.errors import DataError
from ctxlab.train.objectives.base import OBJECTIVES, Objective
from ctxlab.train.objectives.windows import Denoising


@OBJECTIVES.register("masked")
class Masked(Denoising):
    """BERT's: of n tokens max(1, round(0.15 n)) are chosen; of these 80% become the mask, 10% a random token, 10% stay.

    Devlin et al. 2019, arXiv:1810.04805, section 3.1 and appendix A.1; as in create_pretraining_data.py a random token is
    any of the vocabulary's, the same one too, n counts special tokens, and these are never chosen. The chance is another in
    each epoch (Liu et al. 2019, arXiv:1907.11692, section 4.1) instead of ten fixed ones.
    With `whole_words` the pieces of a word are chosen together, as long as they are no more than are left to choose; words are
    those of BERT's basic tokenizer. Where every word has more pieces than that, BERT chooses none; here a stretch of one is.
    """

    class Config(Objective.Config):
        name: Literal["masked"] = "masked"
        share: float = Field(0.15, gt=0, lt=1, description="of the tokens that are to be said")
        whole_words: bool = Field(False, description="the pieces of a word are chosen together")

    paper = "Devlin et al. 2019, arXiv:1810.04805"
    architectures = ("encoder",)
    config: Config

    def row(self, tokens: np.ndarray, random: np.random.Generator, tokenizer: Tokenizer) -> Row:
        if tokenizer.mask_id is None:
            raise DataError(f"tokenizer: {tokenizer.config.name} has no mask token; use unigram, bpe or byte")
        wanted = max(1, round(self.config.share * len(tokens)))
        chosen: list[int] = []
        groups = self._groups(tokens, tokenizer)
        for group in random.permutation(np.arange(len(groups))):
            if len(chosen) == wanted:
                break
            if len(chosen) + len(groups[group]) <= wanted:
                chosen += groups[group]
        if groups and not chosen:
            word = groups[random.integers(len(groups))]
            first = random.integers(len(word) - wanted + 1)
            chosen = word[first : first + wanted]
        places = np.array(sorted(chosen), dtype=np.int64)
        targets = np.full_like(tokens, IGNORED)
        targets[places] = tokens[places]
        fate = random.random(len(places))
        changed = tokens.copy()
        changed[places[fate < 0.8]] = tokenizer.mask_id
        other = places[fate >= 0.9]
        changed[other] = random.integers(tokenizer.vocab_size, size=len(other))
        return Row(changed, targets, ())

    def _groups(self, tokens: np.ndarray, tokenizer: Tokenizer) -> list[list[int]]:
        """Places that are chosen together: each alone, or those of a word."""
        places = np.flatnonzero(tokenizer.token_bytes[tokens]).tolist()
        if not self.config.whole_words:
            return [[place] for place in places]
        words = words_of(tokenizer, tokens.tolist(), basic_words)
        groups: dict[int, list[int]] = {}
        for place in places:
            groups.setdefault(words[place], []).append(place)
        return list(groups.values())
