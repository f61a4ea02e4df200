"""How far context helps: of one run by its own longest length, of several by the best of them at each length.

Lengths are compared in windows that move on by the smallest stride that was asked for, so that every target sees nearly as
much as the length says; without strides in windows that follow one another, whose first targets see next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ctxlab.data.windows import EvalSegments
from ctxlab.records.schema import Measurement

WITHIN = 0.01  # a share of the perplexity that does not count
TOPS = (0.1, 0.5, 1.0)  # of the targets, the hardest ones: Dai et al.'s r
_MOST = 1 << 20  # targets whose nats are kept one by one, at each length


def effective_context(
    nats: Mapping[int, float], *, protocol: str, split: str, axes: dict[str, Any]
) -> list[Measurement]:
    """The shortest length whose perplexity is at most 1% above that at the longest one, of nats per token by length.

    Khandelwal et al. 2018, arXiv:1805.04623, section 4, with the longest scored length for unlimited context: no more can be
    said than the lengths tell apart. No row for fewer than two.
    """
    if len(nats) < 2:
        return []
    longest = max(nats)
    shortest = min(n for n, value in nats.items() if value <= nats[longest] + math.log1p(WITHIN))
    return [
        Measurement(
            name="effective_context", value=float(shortest), unit="tokens", split=split, protocol=protocol,
            axes=axes, facts={"within": WITHIN, "lengths": sorted(nats)},
        )
    ]  # fmt: skip


class TokenNats:
    """The nats of single targets at every length: of all segments, or of as many, evenly spaced, as have 2^20 targets."""

    def __init__(self) -> None:
        self.by_length: dict[int, np.ndarray] = {}
        self.protocol = ""

    def at(self, length: int, protocol: str, segments: EvalSegments) -> _Keeper:
        """What hears of the targets of one length. Protocols other than that of the longest only stand in for it."""
        self.protocol = protocol
        every = max(1, -(-segments.n * segments.length // _MOST))
        kept = np.zeros((-(-segments.n // every), segments.length), dtype=np.float32)
        self.by_length[length] = kept
        return _Keeper(kept, every)


class _Keeper:
    def __init__(self, kept: np.ndarray, every: int) -> None:
        self.kept, self.every = kept, every

    def __call__(self, owners: np.ndarray, firsts: np.ndarray, nats: np.ndarray) -> None:
        for owner, first, row in zip(owners.tolist(), firsts.tolist(), nats, strict=True):
            if owner % self.every == 0:
                self.kept[owner // self.every, first : first + len(row)] = row


def relative_effective_contexts(
    group: Mapping[str, Mapping[int, np.ndarray]], top: float
) -> dict[str, tuple[int, dict[str, float]]]:
    """Of each run the relative effective context length, and the gains behind it: Dai et al. 2019, arXiv:1901.02860, app. C.

        b(c, t) = min_i l_i(c, t)        f_i(c, c') = mean over the top share of targets t by b(c, t) of min(b(c, t), l_i(c', t))
        g_i(c, c') = 1 - exp(f_i(c, c') - f_i(c, c))

    l_i(c, t) are the nats of target t under run i at length c. From the shortest length on, c grows to the next one c' while
    g_i(c, c') is at least 1%, and while the run has numbers at c'. The lengths that were scored take the place of a fixed step.
    """
    lengths = sorted(set().union(*group.values()))
    gains: dict[str, dict[str, float]] = {run: {} for run in group}
    reached = dict.fromkeys(group, lengths[0])
    going = {run for run, nats in group.items() if lengths[0] in nats}
    for short, long in pairwise(lengths):
        best = np.minimum.reduce([nats[short].ravel() for nats in group.values() if short in nats])
        hardest = np.argsort(-best, kind="stable")[: max(1, round(top * len(best)))]
        for run in sorted(going):
            if long not in group[run]:
                going.discard(run)
                continue
            before, after = (
                np.minimum(best[hardest], group[run][n].ravel()[hardest]).mean(dtype=np.float64) for n in (short, long)
            )
            gains[run][f"{short}-{long}"] = gain = float(-np.expm1(after - before))
            if gain < WITHIN:
                going.discard(run)
            else:
                reached[run] = long
    return {run: (reached[run], gains[run]) for run in group}


def relative_effective_context(group: Mapping[str, TokenNats], *, split: str) -> list[Measurement]:
    """The rows of a group of runs that were scored on the same targets, for the hardest tenth, half, and all of them."""
    by_length: dict[str, Mapping[int, np.ndarray]] = {r: nats.by_length for r, nats in group.items() if nats.by_length}
    protocols = sorted({nats.protocol for nats in group.values()})
    runs: Sequence[str] = list(by_length)
    lengths = sorted(set().union(*by_length.values()))
    if len(runs) < 2 or len(lengths) < 2:
        return []
    return [
        Measurement(
            name="relative_effective_context", value=float(reached), unit="tokens", split=split,
            protocol=", ".join(protocols), n_targets=next(iter(by_length[run].values())).size, axes={"run": run, "top": top},
            facts={"within": WITHIN, "lengths": lengths, "gains": gains, "group": runs},
        )
        for top in TOPS
        for run, (reached, gains) in relative_effective_contexts(by_length, top).items()
    ]  # fmt: skip
