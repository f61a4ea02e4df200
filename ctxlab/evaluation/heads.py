"""What heads attend to: the weights of a text pooled to what can be drawn, and a line of numbers for each head.

Weights come in rows of one head at a time (`ctxlab.model.seeing`) and are summed as they come, so that a long text costs time
and never a matrix of tokens by tokens. Layers and heads count from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctxlab.errors import ConfigError
from ctxlab.model.attention.weights import HeadRows
from ctxlab.model.base import Model
from ctxlab.model.seeing import Kind, Seen, attentions, look

Groups = tuple[Sequence[int], Sequence[int]]
"""Which part of a drawing each query and each key belongs to, parts counted from 0."""


@dataclass(frozen=True)
class Summary:
    """One head in numbers, means over the queries i of a text of its weights p_ij; None where a number has no meaning.

    entropy: -sum_j p_ij ln p_ij in nats, the sink's share as one more p. 0: one key has it all; ln n: n keys have the same.
    distance: sum_j p_ij |i - j| / sum_j p_ij in tokens; not of cross-attention, whose two texts have places of their own.
    previous: p_{i,i-1} over i >= 1, the previous-token score (Elhage et al. 2021, transformer-circuits.pub/2021/framework).
    first: p_{i,0} over the queries that could look elsewhere: i >= 1, and all of cross-attention. Where there is nothing to
    look for, heads rest there (Xiao et al. 2024, arXiv:2309.17453).
    induction: see `induction_scores`.
    sink: 1 - sum_j p_ij, of mechanisms that have one.
    """

    entropy: float
    distance: float | None
    previous: float | None
    first: float | None
    induction: float | None = None
    sink: float | None = None


class HeadSums:
    """The sums over queries that a `Summary` is made of; `add` takes rows of weights in any order."""

    def __init__(self, n_queries: int, n_keys: int, *, crosses: bool, has_sink: bool) -> None:
        self.n_queries, self.n_keys = n_queries, n_keys
        self.crosses, self.has_sink = crosses, has_sink
        self.entropy = self.distance = self.previous = self.first = self.sink = 0.0

    def add(self, rows: slice, weights: Tensor) -> None:
        """Weights (m,S) of these rows."""
        p = weights.double()
        share = p.sum(1)  # (m,)
        self.entropy += float(torch.special.entr(p).sum())
        if self.has_sink:
            rest = (1 - share).clamp(min=0)
            self.sink += float(rest.sum())
            self.entropy += float(torch.special.entr(rest).sum())
        if self.crosses:
            self.first += float(p[:, 0].sum())
            return
        before = self.n_keys - self.n_queries
        i = torch.arange(before + rows.start, before + rows.stop, device=p.device)
        j = torch.arange(self.n_keys, device=p.device)
        far = (p * (i[:, None] - j).abs()).sum(1)
        self.distance += float((far / share.masked_fill(share == 0, 1.0)).sum())
        late = i >= 1
        self.previous += float(p[late].gather(1, i[late, None] - 1).sum())
        self.first += float(p[late, 0].sum())

    def summary(self, induction: float | None = None) -> Summary:
        n = self.n_queries
        sink = self.sink / n if self.has_sink else None
        if self.crosses:
            return Summary(self.entropy / n, None, None, self.first / n, None, sink)
        late = n - (self.n_keys == n)  # queries with a token before them
        previous, first = (self.previous / late, self.first / late) if late else (None, None)
        return Summary(self.entropy / n, self.distance / n, previous, first, induction, sink)


class Pool:
    """Weights from parts of the queries to parts of the keys: the mean over a part's queries of the sum over a part's keys.

    So Clark et al. 2019 (arXiv:1906.04341, section 4.1) have words of several pieces; parts of one token are the weights.
    """

    def __init__(self, queries: Sequence[int], keys: Sequence[int]) -> None:
        self.queries, self.keys = torch.tensor(queries), torch.tensor(keys)
        self.sums = torch.zeros(max(queries) + 1, max(keys) + 1, dtype=torch.float64)

    def add(self, rows: slice, weights: Tensor) -> None:
        """Weights (m,S) of these rows."""
        by_key = weights.new_zeros(weights.shape[0], self.sums.shape[1], dtype=torch.float64)
        by_key.index_add_(1, self.keys.to(weights.device), weights.double())
        self.sums.index_add_(0, self.queries[rows], by_key.cpu())

    def weights(self) -> np.ndarray:
        """(parts of queries, parts of keys)."""
        return (self.sums / torch.bincount(self.queries)[:, None]).numpy()


@dataclass(frozen=True)
class Head:
    """One head: its numbers, and its weights pooled for each drawing that was asked for."""

    kind: Kind
    layer: int
    head: int
    summary: Summary
    maps: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Step:
    """One step of decoding: what was read, what was chosen and how likely it was, what else was likely, where it looked."""

    read: int
    chosen: int
    p: float
    others: tuple[tuple[int, float], ...]  # tokens and their probabilities, the likeliest first
    sources: tuple[tuple[int, float], ...]  # places in the source and their weights, the heaviest first


def see(
    model: Model,
    tokens: Sequence[int],
    drawings: Mapping[str, Mapping[Kind, Groups]],
    *,
    kinds: Collection[Kind],
    layers: Collection[int] | None = None,
    heads: Sequence[int] | None = None,
    source: Sequence[int] | None = None,
    induction: Mapping[tuple[int, int], float] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[list[Head], Tensor, np.ndarray | None]:
    """Every head that is asked for, in one forward of a text, each of its rows made once and kept by none.

    drawings: for each its parts by kind. Returns the heads, encoder first; the hidden states (T,d); and of a model with a
    source the last layer's cross-attention, mean over all its heads, (T,S).
    """
    device = model.embedding.weight.device
    found: list[Head] = []
    crossing = [layer for kind, layer, _ in attentions(model) if kind == "cross"]
    mean: list[np.ndarray] = []

    def visit(seen: Seen) -> None:
        if seen.kind == "cross" and seen.layer == crossing[-1]:
            mean.append(np.zeros((seen.q.shape[2], seen.k.shape[2]), dtype=np.float32))
            for _, rows, weights in seen.rows():
                mean[0][rows] += weights[0].float().cpu().numpy() / seen.n_heads
        if seen.kind not in kinds or (layers is not None and seen.layer not in layers):
            return
        T, S = seen.q.shape[2], seen.k.shape[2]
        asked = list(range(seen.n_heads) if heads is None else heads)
        sums = {
            head: HeadSums(T, S, crosses=seen.kind == "cross", has_sink=seen.mechanism.sink is not None)
            for head in asked
        }
        pools = {head: {name: Pool(*groups[seen.kind]) for name, groups in drawings.items()} for head in asked}
        for head, rows, weights in seen.rows(asked):
            p = weights[0].double()  # once for all sums
            sums[head].add(rows, p)
            for pool in pools[head].values():
                pool.add(rows, p)
            advance(rows.stop - rows.start)
        for head in asked:
            score = None if induction is None or seen.kind != "self" else induction.get((seen.layer, head))
            maps = {name: pool.weights() for name, pool in pools[head].items()}
            found.append(Head(seen.kind, seen.layer, head, sums[head].summary(score), maps))

    inputs: dict[str, Any] = {} if source is None else {"source": torch.tensor([list(source)], device=device)}
    if model.prefix:  # a text is read as a prompt is
        inputs["prefix"] = "all"
    hidden = look(model, torch.tensor([list(tokens)], device=device), visit, **inputs)
    assert hidden is not None
    order = {"encoder": 0, "self": 1, "cross": 2}
    found.sort(key=lambda one: (order[one.kind], one.layer, one.head))
    return found, hidden[0], mean[0] if mean else None


@torch.inference_mode()
def steps(
    model: Model, hidden: Tensor, cross: np.ndarray, tokens: Sequence[int], *, others: int = 3, sources: int = 3
) -> list[Step]:
    """The steps by which `tokens`, the start token first, were written, from what one forward of all but the last gave.

    hidden (T,d); cross (T,S), mean over the heads of the last layer. A step's probability is that of the token in the
    model's whole distribution, whatever chose it; `others` leaves that token out.
    """
    p = model.logits(hidden[None])[0].double().softmax(-1).cpu()  # (T,V)
    found = []
    for place, chosen in enumerate(tokens[1:]):
        top = p[place].topk(min(others + 1, p.shape[1])).indices.tolist()
        rest = [token for token in top if token != chosen][:others]
        heaviest = np.argsort(-cross[place], kind="stable")[:sources]
        found.append(
            Step(
                read=tokens[place],
                chosen=chosen,
                p=float(p[place, chosen]),
                others=tuple((token, float(p[place, token])) for token in rest),
                sources=tuple((int(j), float(cross[place, j])) for j in heaviest),
            )
        )
    return found


def induction_scores(
    model: Model, vocabulary: Sequence[int], *, length: int, rows: int = 4, seed: int = 0
) -> dict[tuple[int, int], float]:
    """(layer, head) -> its induction score: on random tokens t_0..t_{n-1} read twice, what the second copy gives to the token
    behind the first occurrence of its own.

        mean over i = n..2n-1 of p_{i, i-n+1}

    Olsson et al. 2022, arXiv:2209.11895 (the prefix-matching score), for causal attention: a head near 1 looks up what
    followed last time. The n = `length` tokens are drawn from `vocabulary` without repetition, `rows` times; each copy is as
    likely a text as any, so nothing but the repetition can be followed.
    Raises ConfigError where the vocabulary has too few tokens.
    """
    if not 1 <= length <= len(vocabulary):
        raise ConfigError(f"induction: expected 1 to {len(vocabulary)} different tokens, got {length}")
    random = torch.Generator().manual_seed(seed)
    known = torch.tensor(vocabulary)
    once = torch.stack([known[torch.randperm(len(known), generator=random)[:length]] for _ in range(rows)])
    sums: dict[tuple[int, int], float] = {}

    def visit(seen: Seen) -> None:
        for part in seen.rows():
            key = (seen.layer, part.head)
            sums[key] = sums.get(key, 0.0) + _looked_up(part, length)

    look(model, torch.cat([once, once], dim=1).to(model.embedding.weight.device), visit)
    return {key: total / (rows * length) for key, total in sums.items()}


def _looked_up(part: HeadRows, n: int) -> float:
    """sum over the rows i >= n of p_{i,i-n+1}, over all the batch."""
    i = torch.arange(max(part.rows.start, n), max(part.rows.stop, n), device=part.weights.device)
    return float(part.weights[:, i - part.rows.start, i - n + 1].double().sum())


def parts(words: Sequence[int], most: int) -> list[int]:
    """The part of each token, given its word: at most `most` parts, of equally many words (the last may have fewer)."""
    size = -(-(max(words) + 1) // most)
    return [word // size for word in words]
