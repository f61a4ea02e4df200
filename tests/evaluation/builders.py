"""Splits and datasets out of lists of token ids, and models whose nats are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ctxlab.data.prepare import TextDataset
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.byte import Byte
from ctxlab.data.tokens import Split
from ctxlab.model.cache import KVCache


def split_of(documents: Sequence[Sequence[int]], name: str = "test", names: Sequence[str] = ()) -> Split:
    """A split of these documents, token by token."""
    sizes = [len(document) for document in documents]
    return Split(
        name,
        np.array([token for document in documents for token in document], dtype=np.uint32),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        list(names) or [f"document {number}" for number in range(len(documents))],
    )


def dataset_of(split: Split, tokenizer: Tokenizer | None = None) -> TextDataset:
    return TextDataset({split.name: split}, tokenizer or Byte(Byte.Config()), {})


def random_documents(sizes: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, vocab_size, size).tolist() for size in sizes]


def unique_documents(sizes: Sequence[int]) -> list[list[int]]:
    """Documents in which no token comes twice: an id tells its place in the split."""
    ends = np.cumsum(sizes)
    return [list(range(end - size, end)) for end, size in zip(ends.tolist(), sizes, strict=True)]


class Known(nn.Module):
    """Stands for a model: nats by a rule of (inputs, targets), and a list of all that it was asked."""

    def __init__(self, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule
        self.asked: list[tuple[list[int], list[int]]] = []  # (inputs, targets) of each window, in order
        self.batches: list[tuple[int, ...]] = []

    def new_cache(self) -> KVCache:
        return KVCache(n_layers=1)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        return tokens

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        self.asked += list(zip(hidden.tolist(), targets.tolist(), strict=True))
        self.batches.append(tuple(targets.shape))
        return self.rule(hidden, targets)


def bigram(vocab_size: int, seed: int = 0) -> tuple[Known, Any]:
    """A model that knows the token before only, and its table of nats, float64 (vocab_size, vocab_size)."""
    logits = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    table = -logits.log_softmax(dim=1)
    return Known(lambda inputs, targets: table[inputs, targets]), table.numpy()
