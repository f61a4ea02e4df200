"""A corpus in memory, and the tools that text tasks make their examples with."""

from __future__ import annotations

import functools
from collections.abc import Container, Sequence

import numpy as np

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import Part, TextTask, Tools
from ctxlab.data.tasks.haystack import CorpusHaystack
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokens import Split
from tests.data.builders import prose, trained

TEXTS = tuple(prose(seed, 30 + 20 * seed) for seed in range(12))


def split_of(texts: Sequence[str], tokenizer: Tokenizer) -> Split:
    """A split as `write_tokens` writes it: bos, the tokens, eos of each text."""
    documents = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    starts = np.cumsum([0, *map(len, documents)])
    return Split("test", np.concatenate([np.array(ids, dtype=np.uint16) for ids in documents]), starts, ())


@functools.cache
def haystack(kind: str) -> CorpusHaystack:
    return CorpusHaystack(split_of(TEXTS, trained(kind)), trained(kind))


@functools.cache
def counter(kind: str) -> functools.partial[int]:
    return functools.partial(_count, trained(kind))


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text))


def tools(kind: str, part: Part = "test", taken: Container[str] = frozenset()) -> Tools:
    return Tools(counter(kind), haystack(kind), part, taken)


def text_tasks() -> list[str]:
    return [name for name in SOURCES.names() if issubclass(SOURCES.get(name), TextTask)]
