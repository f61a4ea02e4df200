"""Loss against index: what a target costs by how many tokens of its window it has seen, and two numbers made of that.

Index p of a window t[0:c] is the target t[p], which has seen p tokens, p = 1 ... c. Only windows of full length count. The
in-context-learning score is l(500) - l(50) (Olsson et al. 2022, arXiv:2209.11895); below a trained context of 512 both indices
shrink with it. The extrapolation ratio is a rule of this house, there being no canonical one:

    rho = max { c / L : l over the last L / 4 indices of windows of c  <=  the same at L, plus epsilon },   epsilon = 0.05 nats

over the scored multiples c of the trained context L, each compared with L on the targets that both end in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctxlab.data.windows import EvalSegments
from ctxlab.evaluation.intervals import paired_interval, ratio_interval
from ctxlab.records.schema import DocumentSums, Measurement

PROTOCOL = "by position"
EPSILON = 0.05  # nats that the last tokens of a longer window may lose
_LATE, _EARLY, _FULL = 500, 50, 512  # indices of the in-context-learning score, and the context from which on they hold


def position_bins(length: int) -> list[tuple[int, int]]:
    """(first, last) index of each bin, two an octave: every power of two ends one, and so does the length."""
    ends = {round(2 ** (k / 2)) for k in range(2 * length.bit_length())}
    ends = {end for end in ends if end < length} | {length}
    ordered = sorted(ends)
    return list(zip([1, *(end + 1 for end in ordered)], ordered))


def score_indices(trained: int) -> tuple[int, int]:
    """(early, late) of the in-context-learning score at a trained context."""
    if trained >= _FULL:
        return _EARLY, _LATE
    return max(1, _EARLY * trained // _FULL), max(1, _LATE * trained // _FULL)


class PositionSums:
    """Sums of nats by document and index over windows of one length that follow one another. Hears of them as a `Watch`."""

    def __init__(self, segments: EvalSegments, length: int, *, trained: int) -> None:
        self.length, self.trained = length, trained
        self.bins = position_bins(length)
        self.rows = segments.rows
        per_segment = segments.length // length
        self.windows = np.bincount(self.rows) * per_segment  # of each document, (D,)
        n_documents = len(self.windows)
        self.nats = np.zeros((n_documents, len(self.bins)))
        early, late = score_indices(trained)
        self.has_score = early < late <= length
        self.points = np.zeros((n_documents, 2))  # at the early and the late index
        self.last = max(1, trained // 4)
        # What the last tokens before every multiple of the trained context cost, where a window ends there.
        self.tails = np.zeros((n_documents, segments.length // trained)) if length % trained == 0 else None

    def __call__(self, owners: np.ndarray, firsts: np.ndarray, nats: np.ndarray) -> None:
        if nats.shape[1] != self.length:  # what is left over at the end of a segment
            return
        rows = self.rows[owners]
        np.add.at(self.nats, rows, np.add.reduceat(nats, [first - 1 for first, _ in self.bins], axis=1))
        if self.has_score:
            np.add.at(self.points, rows, nats[:, [index - 1 for index in score_indices(self.trained)]])
        if self.tails is not None:
            ends = (firsts + self.length) // self.trained - 1
            np.add.at(self.tails, (rows, ends), nats[:, -self.last :].sum(axis=1))


def position_measurements(sums: PositionSums, *, split: str, segment: int) -> list[Measurement]:
    """nats per token in every bin of indices, with its 95% interval over documents."""
    found = []
    for column, (first, last) in enumerate(sums.bins):
        nats, targets = sums.nats[:, column].tolist(), (sums.windows * (last - first + 1)).tolist()
        low, high = ratio_interval(nats, targets) or (None, None)
        found.append(
            Measurement(
                name="nats_per_token", value=sum(nats) / sum(targets), unit="nats/token", low=low, high=high, split=split,
                protocol=PROTOCOL, normaliser="token", n_targets=sum(targets), n_docs=len(nats),
                axes={"segment": segment, "length": sums.length, "from": first, "to": last},
            )
        )  # fmt: skip
    return found


def position_documents(
    sums: PositionSums, segments: EvalSegments, names: Sequence[str], token_bytes: np.ndarray, *, split: str
) -> list[DocumentSums]:
    """The sums behind every bin, document by document: two runs are compared in pairs of these."""
    n_bytes = np.zeros(sums.nats.shape, dtype=np.int64)
    starts = [first - 1 for first, _ in sums.bins]
    whole = segments.length // sums.length * sums.length
    for index, row in enumerate(sums.rows):
        widths = token_bytes[np.asarray(segments.segment(index)[1][1 : whole + 1])].reshape(-1, sums.length)
        n_bytes[row] += np.add.reduceat(widths.sum(axis=0), starts)
    return [
        DocumentSums(
            context=sums.length, split=split, axes={"from": first, "to": last}, names=tuple(names),
            nats=tuple(sums.nats[:, column].tolist()), targets=tuple((sums.windows * (last - first + 1)).tolist()),
            n_bytes=tuple(n_bytes[:, column].tolist()),
        )
        for column, (first, last) in enumerate(sums.bins)
    ]  # fmt: skip


def in_context_score(by_length: Mapping[int, PositionSums], *, split: str, segment: int) -> list[Measurement]:
    """l(late) - l(early) over the shortest windows that reach the late index: the most windows. None of them: no row."""
    reaching = [length for length, sums in by_length.items() if sums.has_score]
    if not reaching:
        return []
    sums = by_length[min(reaching)]
    early, late = score_indices(sums.trained)
    change, windows = (sums.points[:, 1] - sums.points[:, 0]).tolist(), sums.windows.tolist()
    low, high = ratio_interval(change, windows) or (None, None)
    return [
        Measurement(
            name="in_context_score", value=sum(change) / sum(windows), unit="nats/token", low=low, high=high, split=split,
            protocol=PROTOCOL, normaliser="token", n_targets=2 * sum(windows), n_docs=len(windows),
            axes={"segment": segment, "length": sums.length, "early": early, "late": late},
            facts={"scaled_from": _FULL} if sums.trained < _FULL else {},
        )
    ]  # fmt: skip


def extrapolation_ratio(
    by_length: Mapping[int, PositionSums], trained: int, *, split: str, segment: int
) -> list[Measurement]:
    """How many trained contexts long a window may be until its last tokens lose more than epsilon. No row without the first.

    Its facts have, for every multiple of the trained context, by how many nats a token the last quarter of a context is above
    the same targets at the trained length, with the interval paired over documents.
    """
    multiples = {length: sums for length, sums in by_length.items() if sums.tails is not None}
    if trained not in multiples:
        return []
    own = multiples[trained]
    assert own.tails is not None
    changes: dict[str, Any] = {}
    reached = 1
    per_segment = np.bincount(own.rows)  # segments of each document
    for length, sums in sorted(multiples.items()):
        if length == trained:
            continue
        assert sums.tails is not None
        each = length // trained
        ours, theirs = (part[:, each - 1 :: each].sum(axis=1).tolist() for part in (sums.tails, own.tails))
        targets = (per_segment * (segment // length) * own.last).tolist()
        change = (sum(ours) - sum(theirs)) / sum(targets)
        low, high = paired_interval(ours, theirs, targets) or (None, None)
        changes[str(length)] = {"change": change, "low": low, "high": high}
        if change <= EPSILON:
            reached = each
    return [
        Measurement(
            name="extrapolation_ratio", value=float(reached), unit="1", split=split, protocol=PROTOCOL,
            n_docs=len(per_segment), axes={"segment": segment, "trained": trained, "epsilon": EPSILON, "last": own.last},
            facts={"longest": max(multiples), "changes": changes},
        )
    ]  # fmt: skip
