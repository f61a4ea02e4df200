"""Objectives that take something of a stretch of text away, by chance, and have it said."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ctxlab.data.corpora.base import Corpus
from ctxlab.data.prepare import TextDataset
from ctxlab.data.source import Source
from ctxlab.data.tasks.base import generator
from ctxlab.data.tasks.dataset import TaskDataset
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.windows import EvalSegments, MadeRows, Row, Rows
from ctxlab.errors import DataError
from ctxlab.train.objectives.base import Objective


class Denoising(Objective):
    """A row is made of a window's tokens by chance, by another chance each epoch; held-out rows always by the same."""

    implies: ClassVar[Mapping[str, str]] = {"eval": "[objective]"}
    continues: ClassVar[bool] = False
    """Whether what it trains says what follows a text, so that it may be scored by perplexity and asked for an answer."""

    @classmethod
    def why_not(cls, data: type[Source]) -> str:
        return "" if issubclass(data, Corpus) else "it reads text"

    def window(self, context: int, tokenizer: Tokenizer) -> int:
        """Tokens of text that a row of `context` is made of. Raises DataError where the tokenizer does not do."""
        return context

    @abstractmethod
    def row(self, tokens: np.ndarray, random: np.random.Generator, tokenizer: Tokenizer) -> Row:
        """A row made of a stretch of text (n,)."""

    def rows(self, dataset: TextDataset | TaskDataset, context: int, *, seed: int, packed: bool) -> Rows:
        assert isinstance(dataset, TextDataset)
        windows = dataset.rows(self.window(context, dataset.tokenizer), seed=seed, packed=False)

        def make(index: int, epoch: int) -> Row:
            random = generator(self.config.name, "train", seed, index, epoch)
            return self.row(windows.row(index, epoch).tokens.astype(np.int64), random, dataset.tokenizer)

        return MadeRows(windows.n, make)

    def held_out(self, dataset: TextDataset, split: str, context: int, most: int) -> tuple[list[Row], list[str]]:
        """At most `most` rows of a split, evenly from its documents, and the name of each row's document.

        Raises DataError where no document is that long.
        """
        part, length = dataset.splits[split], self.window(context, dataset.tokenizer)
        segments = EvalSegments(part, length, max_segments=most)
        if not segments.n:
            raise DataError(f"context: no document of the {split} split fills {length} tokens")
        rows, names = [], []
        for index in range(segments.n):
            document, tokens = segments.segment(index)
            random = generator(self.config.name, split, index)
            rows.append(self.row(tokens[:length].astype(np.int64), random, dataset.tokenizer))
            names.append(part.names[document])
        return rows, names
