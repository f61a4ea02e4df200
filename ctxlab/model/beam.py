"""Beam search: the likeliest continuation, as far as following a few at a time finds it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctxlab.model.base import Model
from ctxlab.model.generation import DecodingConfig, Reader, begun_together, check_prompts, penalized


class Hypothesis(NamedTuple):
    """A continuation: its tokens without the one that ended it, its ln p with that one, and its score."""

    tokens: list[int]
    log_p: float
    score: float


def beam_search(
    model: Model,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    *,
    stop_ids: Collection[int] = (),
    limits: Sequence[int] | None = None,
    is_over: Callable[[list[int]], bool] = lambda _: False,
    encoded: Any = None,
) -> list[list[Hypothesis]]:
    """The num_beams best continuations of each prompt, the best first; score ln p / lp(length), lp(n) = ((5 + n) / 6)^a.

    Length penalty: Wu et al. 2016 (GNMT), arXiv:1609.08144, eq. 14, a = length_penalty; the length counts the token that
    ends a hypothesis: one of `stop_ids`, or, kept, the one after which `is_over` says so of its tokens. At each step a
    prompt's live hypotheses are continued by every token; of the K = num_beams best continuations those that end are put
    aside, and the K best of those that go on live. A prompt is done when none lives, or K are aside and none that lives can
    come to a higher score than the best of them; at max_new_tokens (or its own of `limits`), where fewer are aside, what
    lives joins them as it is. With K = 1 that is greedy decoding: the first that ends is the only one followed. A repetition
    penalty acts on the logits, as there: p is of the softmax behind it.
    Prompts are searched side by side, each as if alone.
    Raises ConfigError on an empty prompt, UndefinedBeyondTraining when the scheme has no meaning for one of the positions.
    """
    check_prompts(prompts)
    if len(groups := begun_together(model, prompts)) > 1:
        found: list[list[Hypothesis]] = [[] for _ in prompts]
        for alike in groups:
            some = None if limits is None else [limits[i] for i in alike]
            best = beam_search(
                model, [prompts[i] for i in alike], config, stop_ids=stop_ids, limits=some, is_over=is_over
            )
            for i, hypotheses in zip(alike, best, strict=True):
                found[i] = hypotheses
        return found
    K = config.num_beams
    reader = Reader(model, config, encoded=encoded)
    limits = [config.max_new_tokens] * len(prompts) if limits is None else limits
    searches = [_Search(list(p), config, stop_ids, is_over, most) for p, most in zip(prompts, limits, strict=True)]
    active = list(searches)
    read = min(len(prompt) for prompt in prompts)
    new = torch.tensor([prompt[:read] for prompt in (search.prompt for search in searches)])
    first = torch.arange(len(searches))  # the first row of each active search
    while True:
        logits = reader.read(new)  # (R,V), the rows of one search together
        if config.repetition_penalty != 1.0:
            texts = [text for search in active for text in search.texts]
            logits = torch.stack([penalized(row, text, config) for row, text in zip(logits, texts, strict=True)])
        log_p = logits.double().log_softmax(-1)
        rows: list[int] = []
        tokens: list[int] = []
        going_on, starts = [], []
        for search, start in zip(active, first.tolist(), strict=True):
            parents, said = search.step(log_p[start : start + search.n_live], read)
            if parents:
                going_on.append(search)
                starts.append(len(rows))
                rows += [start + parent for parent in parents]
                tokens += said
        if not rows:
            break
        active, first = going_on, torch.tensor(starts)
        if rows != list(range(len(log_p))):
            reader.keep(torch.tensor(rows))
        new = torch.tensor(tokens)[:, None]
        read += 1
    return [sorted(search.aside, key=lambda h: -h.score)[:K] for search in searches]


class _Search:
    """The hypotheses of one prompt."""

    def __init__(
        self,
        prompt: list[int],
        config: DecodingConfig,
        stop_ids: Collection[int],
        is_over: Callable[[list[int]], bool],
        limit: int,
    ) -> None:
        self.prompt, self.config, self.limit = prompt, config, limit
        self.stop_ids, self.is_over = frozenset(stop_ids), is_over
        self.live: list[tuple[list[int], float]] = [([], 0.0)]  # tokens and ln p
        self.aside: list[Hypothesis] = []

    @property
    def n_live(self) -> int:
        return len(self.live)

    @property
    def texts(self) -> list[list[int]]:
        """The prompt and what each live hypothesis has behind it."""
        return [self.prompt + tokens for tokens, _ in self.live]

    def step(self, log_p: Tensor, read: int) -> tuple[list[int], list[int]]:
        """Log-probabilities (n_live,V) of what follows -> of each hypothesis that now lives, its parent and its last token."""
        if read < len(self.prompt):
            return [0], [self.prompt[read]]
        K, V = self.config.num_beams, log_p.shape[1]
        total = log_p + torch.tensor([p for _, p in self.live], dtype=log_p.dtype)[:, None]
        length = len(self.live[0][0]) + 1
        live: list[tuple[list[int], float]] = []
        parents: list[int] = []
        for rank, (p, index) in enumerate(_best_first(total.flatten(), 2 * K)):
            parent, token = divmod(index, V)
            before = self.live[parent][0]
            tokens = before if token in self.stop_ids else [*before, token]
            if tokens is not before and not self.is_over(tokens):
                live.append((tokens, p))
                parents.append(parent)
                if len(live) == K:
                    break
            elif rank < K:
                self._put_aside(tokens, p, length)
        self.live = live
        if length == self.limit or self._is_done(length):
            if len(self.aside) < K:
                for tokens, p in live:
                    self._put_aside(tokens, p, length)
            return [], []
        return parents, [tokens[-1] for tokens, _ in live]

    def _put_aside(self, tokens: list[int], log_p: float, length: int) -> None:
        self.aside.append(Hypothesis(tokens, log_p, log_p / self._penalty(length)))

    def _is_done(self, length: int) -> bool:
        """Whether none lives, or K are aside and no live one can come to score higher than the best of them.

        ln p only falls; the penalty is largest at one end of what lengths are left.
        """
        K = self.config.num_beams
        if not self.live:
            return True
        if len(self.aside) < K:
            return False
        if K == 1:
            return True
        most = max(self._penalty(length + 1), self._penalty(self.limit))
        reachable = max(p for _, p in self.live) / most
        return reachable <= max(h.score for h in self.aside)

    def _penalty(self, length: int) -> float:
        return float(((5 + length) / 6) ** self.config.length_penalty)


def _best_first(scores: Tensor, many: int) -> Iterator[tuple[float, int]]:
    """The scores (n,) and their places, the highest first; found `many` at once, and twice as many where those are not enough."""
    left = len(scores)
    while left:
        best, places = scores.topk(min(many, left))
        yield from zip(best.tolist(), places.tolist(), strict=True)
        scores = scores.scatter(0, places, -torch.inf)
        left -= len(places)
        many *= 2
