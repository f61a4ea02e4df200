"""Perplexity at many lengths over the same target tokens: sums of nats, every target scored exactly once.

The test documents are cut into segments of one length (`wanted_segment`, as far as enough documents fill it). At length c a
segment is scored in windows of c inputs t[i:i+c] and c targets t[i+1:i+c+1] that follow one another without overlap. So
every length scores every target of every segment once, and a difference between lengths is due to context alone.

There the first targets of a window see next to nothing (Press et al. 2022, arXiv:2108.12409, appendix B, the early-token
curse). With strides the same targets are scored again in windows that overlap: each moves on by S tokens and scores those S, so
that all but a segment's first c targets see at least c - S tokens. Streaming reads a segment token by token over a cache of
c tokens that moves on with it, its first ones kept as sinks: a way of its own, whose cached keys have seen what has left the
cache. And each of these with bos before every window, which only one at a document's start has by itself.

Loss by index and what is made of it are in by_position.py, how far context helps in reach.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field

from ctxlab.data.prepare import TextDataset
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokens import Split
from ctxlab.data.windows import EvalSegments, longest_length
from ctxlab.errors import IncompatibleError, UndefinedBeyondTraining
from ctxlab.evaluation.by_position import (
    PositionSums,
    extrapolation_ratio,
    in_context_score,
    position_documents,
    position_measurements,
)
from ctxlab.evaluation.intervals import paired_interval, ratio_interval
from ctxlab.evaluation.reach import TokenNats, effective_context
from ctxlab.evaluation.words import segment_words
from ctxlab.fields import Count, Length, OrAuto, OrNone
from ctxlab.model.base import Model
from ctxlab.records.run import axes_key
from ctxlab.records.schema import WAY_AXES, DocumentSums, Measurement
from ctxlab.registry import ComponentConfig
from ctxlab.train.precision import Precision
from ctxlab.train.scoring import Watch, score_streaming, score_windows

AUTO_MULTIPLES = (0.5, 1, 2, 4, 8)
MOVING_WINDOWS = (
    8  # in a segment, of those that overlap or of a cache that moves: of one alone nothing would be seen to move
)
_LARGEST_NATS = math.log(sys.float_info.max)


class PerplexityConfig(ComponentConfig):
    """Which lengths are scored, on what cut of the split."""

    lengths: OrAuto | tuple[Length, ...] = Field(
        "auto", description="auto: 1/2, 1, 2, 4 and 8 times the trained context"
    )
    segment: OrAuto | Length = Field(
        "auto", description="tokens of one segment; auto: the longest length asked for, or 8 windows that move"
    )
    strides: tuple[Length, ...] = Field((), description="scored again in windows that move on by so many tokens")
    streaming: tuple[Length, ...] = Field((), description="scored again over a moving cache of so many tokens")
    sinks: int = Field(4, ge=0, description="first tokens that the moving cache keeps, among its own")
    bos: bool = Field(False, description="scored again, each way, with bos before every window")
    min_documents: int = Field(8, ge=1, description="a length is scored when this many test documents fill it")
    max_tokens: OrNone | Count = Field(131_072, description="scored at each length, shared by the documents; none: all")
    batch_tokens: int = Field(16_384, ge=1, json_schema_extra={"identity": False})


@dataclass(frozen=True)
class Way:
    """One way of scoring all targets: in windows of `length`, that follow one another or move on by `stride`; or with `sinks`
    over a moving cache of `length` tokens. `bos`: with that token before every window."""

    length: int
    stride: int | None = None
    sinks: int | None = None
    bos: bool = False

    @property
    def protocol(self) -> str:
        kind = "streaming" if self.sinks is not None else "non-overlapping" if self.stride is None else "sliding"
        return f"{kind}, bos first" if self.bos else kind

    @property
    def axes(self) -> dict[str, Any]:
        """What tells it from windows of this length that follow one another."""
        given = {"stride": self.stride, "sinks": self.sinks, "bos": self.bos or None}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def beside(self) -> Way:
        """What it is compared with: the same without bos, else windows of this length that follow one another."""
        return replace(self, bos=False) if self.bos else Way(self.length)

    @property
    def base(self) -> Way:
        """Where this is impossible, so is the other."""
        return self.beside if self.sinks is None or self.bos else self

    def __str__(self) -> str:
        moving = "" if self.stride is None else f", moving on by {self.stride}"
        streaming = "" if self.sinks is None else f", streaming, {self.sinks} sinks"
        return f"at {self.length}{moving}{streaming}{', bos first' if self.bos else ''}"


@dataclass
class DocumentScores:
    """Sums per document, in document order: nats, scored targets, UTF-8 bytes and words of the targets' text."""

    names: list[str] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    n_bytes: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)


Scores = DocumentScores | DocumentSums


class Evaluated(NamedTuple):
    """What `evaluate_perplexity` found."""

    measurements: list[Measurement]
    documents: dict[int, DocumentScores]  # by length, of windows that follow one another
    sums: list[DocumentSums]  # of everything that was scored, for the record


def auto_lengths(context: int) -> tuple[int, ...]:
    """1/2, 1, 2, 4 and 8 times the trained context."""
    return tuple(sorted({max(1, int(context * multiple)) for multiple in AUTO_MULTIPLES}))


def document_scores(segments: EvalSegments, nats: np.ndarray, tokenizer: Tokenizer) -> DocumentScores:
    """Segment sums gathered by document."""
    scores = DocumentScores()
    last = -1
    for index in range(segments.n):
        document, tokens = segments.segment(index)
        if document != last:  # told apart by number: two documents may have one name
            last = document
            scores.names.append(segments.split.names[document])
            for sums in (scores.nats, scores.targets, scores.n_bytes, scores.words):
                sums.append(0)
        scores.nats[-1] += float(nats[index])
        scores.targets[-1] += len(tokens) - 1
        scores.n_bytes[-1] += int(tokenizer.token_bytes[np.asarray(tokens[1:])].sum())
        scores.words[-1] += segment_words(segments, index, tokenizer.pieces)
    return scores


def score_measurements(
    scores: DocumentScores,
    *,
    split: str,
    protocol: str,
    context: int | None = None,
    axes: dict[str, Any],
    facts: dict[str, Any] | None = None,
) -> list[Measurement]:
    """nats per token and per word, the two perplexities, bits per byte: of the same sums, with 95% intervals over documents.

    With N nats, T targets, W words and Y bytes over all documents: nats per token N / T, per word N / W, their perplexities
    exp(N / T) and exp(N / W), bits per byte N / (Y ln 2). The interval of a perplexity is the exponential of that of the
    nats. A text without a word has no numbers per word.
    """
    in_bits = [n / math.log(2) for n in scores.nats]
    common: dict[str, Any] = {
        "context": context,
        "split": split,
        "protocol": protocol,
        "n_targets": sum(scores.targets),
        "n_docs": len(scores.names),
        "axes": axes,
        "facts": facts or {},
    }

    def rows(sums: Sequence[float], per: Sequence[int], normaliser: str, *names: str) -> list[Measurement]:
        """The ratio under the first name, its exponential under the second."""
        ratio = [sum(sums) / sum(per), *(ratio_interval(sums, per) or (math.nan, math.nan))]
        found = []
        for name, unit, (value, low, high) in zip(
            names, (f"{'bits' if normaliser == 'byte' else 'nats'}/{normaliser}", "1"), (ratio, map(exp, ratio))
        ):
            found.append(
                Measurement(
                    name=name, value=value, unit=unit, low=low, high=high, normaliser=normaliser, **common
                )
            )  # fmt: skip
        return found

    return [
        *rows(scores.nats, scores.targets, "token", "nats_per_token", "perplexity"),
        *rows(in_bits, scores.n_bytes, "byte", "bits_per_byte"),
        *(rows(scores.nats, scores.words, "word", "nats_per_word", "word_perplexity") if sum(scores.words) else []),
    ]


def difference_facts(scores: Scores | None, other: Scores | None) -> dict[str, float]:
    """By how many nats per token one is above the other on the same targets, with the interval paired over documents."""
    if scores is None or other is None or (scores.names, scores.targets) != (other.names, other.targets):
        return {}
    difference = (sum(scores.nats) - sum(other.nats)) / sum(scores.targets)
    if not math.isfinite(difference):
        return {}
    bounds = paired_interval(scores.nats, other.nats, scores.targets)
    ends = {} if bounds is None else {"difference_low": bounds[0], "difference_high": bounds[1]}
    return {"difference": difference, **ends}


def compared(
    measurements: Sequence[Measurement], sums: Sequence[DocumentSums], other: str, others: Sequence[DocumentSums]
) -> list[Measurement]:
    """The measurements of a run with, among their facts, by how many nats per token each is above another run's.

    Only where both scored the same targets, with the interval paired over documents.
    """
    theirs = {(d.context, axes_key(d.axes)): d for d in others}
    found: dict[tuple[int | None, str], dict[str, Any]] = {}
    for ours in sums:
        against = theirs.get((ours.context, axes_key(ours.axes)))
        facts = difference_facts(ours, against)
        if facts:
            less = {name.replace("difference", "less"): value for name, value in facts.items()}
            found[ours.context, axes_key(ours.axes)] = {"compared_with": other, **less}
    told = (*WAY_AXES, "from", "to")
    rows = []
    for m in measurements:
        key = m.context or m.axes.get("length"), axes_key({name: m.axes[name] for name in told if name in m.axes})
        is_one = m.name == "nats_per_token" and m.value is not None and key in found
        rows.append(m.model_copy(update={"facts": {**m.facts, **found[key]}}) if is_one else m)
    return rows


def exp(nats: float) -> float:
    """exp, infinite where it has no number: the record says so, the other lengths go on."""
    return math.exp(nats) if nats < _LARGEST_NATS else math.nan if math.isnan(nats) else math.inf


def missing_measurements(way: Way, split: str, status: str, reason: str) -> list[Measurement]:
    """The rows of a way of scoring that has no number, and why."""
    names = (("nats_per_token", "nats/token"), ("perplexity", "1"), ("bits_per_byte", "bits/byte"))
    return [
        Measurement(
            name=name, value=None, unit=unit, context=way.length, split=split, protocol=way.protocol,
            status=status, reason=reason, axes=way.axes,
        )
        for name, unit in names
    ]  # fmt: skip


def segment_length(config: PerplexityConfig, lengths: Sequence[int], dataset: TextDataset, split: str) -> int | None:
    """The length of the segments: the longest of the lengths asked for that enough documents fill; None if none is.

    A given length that too few documents fill gives way to the longest one that enough of them do, whatever lengths are
    asked for: the cells of a sweep share that setting, not their lengths, and have to cut the text alike.
    """
    text = dataset.splits[split]
    targets = np.sort(text.sizes - 1)[::-1]
    filled = int(targets[config.min_documents - 1]) if len(targets) >= config.min_documents else 0
    if config.segment != "auto":
        return min(config.segment, filled) if filled > 0 else None
    longest = longest_length(text, lengths, min_docs=config.min_documents)
    if longest is None:
        return None
    return max(longest, min(filled, wanted_segment(config, [n for n in lengths if n <= longest])))


def wanted_segment(config: PerplexityConfig, lengths: Sequence[int]) -> int:
    """The longest of the lengths, or MOVING_WINDOWS of the longest that is scored in windows that overlap, or streamed."""
    moving = [way.length for way in _ways(config, lengths) if way.axes.keys() & {"stride", "sinks"}]
    return max(*lengths, *(MOVING_WINDOWS * length for length in moving), 1)


def _segments(config: PerplexityConfig, split: Split, length: int) -> EvalSegments:
    """All segments of the split, or as many of each document as `max_tokens` allows; one of each at least."""
    if config.max_tokens == "none":
        return EvalSegments(split, length)
    return EvalSegments(split, length, max_segments=max(config.max_tokens // length, config.min_documents))


def asked_segments(
    config: PerplexityConfig, dataset: TextDataset, trained_context: int, split: str = "test"
) -> tuple[tuple[int, ...], EvalSegments | None]:
    """The lengths asked for, and the cut of the split whose targets all of them score; None where no document fills one."""
    lengths = auto_lengths(trained_context) if config.lengths == "auto" else tuple(sorted(set(config.lengths)))
    longest = segment_length(config, lengths, dataset, split)
    return lengths, None if longest is None else _segments(config, dataset.splits[split], longest)


def evaluate_perplexity(
    model: Model,
    dataset: TextDataset,
    config: PerplexityConfig,
    *,
    trained_context: int,
    device: torch.device,
    precision: Precision,
    split: str = "test",
    progress: Callable[[str, int], Callable[[int], None]] = lambda *_: lambda _: None,
    keep: TokenNats | None = None,
) -> Evaluated:
    """Perplexity of `model` at every length of the config, and the sums by document behind it (to compare in pairs).

    `keep` takes the nats of single targets at every length.
    """
    lengths, segments = asked_segments(config, dataset, trained_context, split)
    if segments is None:
        reasons = {n: f"fewer than {config.min_documents} {split} documents have {n + 1} tokens" for n in lengths}
        rows = [m for n in lengths for m in missing_measurements(Way(n), split, "no_document", reasons[n])]
        return Evaluated(rows, {}, [])
    was_training = model.training
    model.eval()
    measurements: list[Measurement] = []
    scored: dict[Way, DocumentScores] = {}  # where the sums are numbers
    positions: dict[int, PositionSums] = {}
    impossible: set[Way] = set()
    text = document_scores(segments, np.zeros(segments.n), dataset.tokenizer)
    for way in _ways(config, lengths):
        if way.base in impossible:
            impossible.add(way)
            continue
        if way.length > segments.length:
            impossible.add(way)
            measurements += missing_measurements(way, split, "no_document", _too_long(config, segments, way, split))
            continue
        watching: list[Watch] = []
        if not way.axes:
            positions[way.length] = PositionSums(segments, way.length, trained=trained_context)
            watching.append(positions[way.length])
        if keep is not None and way == _in_comparison(config, way.length):
            watching.append(keep.at(way.length, way.protocol, segments))
        try:
            nats = _score(
                model, segments, way, dataset.tokenizer, config, device=device, precision=precision, watching=watching,
                advance=progress(f"scoring {split} {way}", segments.n * segments.length),
            )  # fmt: skip
        except (UndefinedBeyondTraining, IncompatibleError) as no:
            impossible.add(way)
            reason = str(no).removeprefix("decoding.cache: ")
            measurements += missing_measurements(way, split, "undefined", reason)
            if not way.axes:
                del positions[way.length]
            continue
        scores = replace(text, nats=np.bincount(segments.rows, weights=nats).tolist())
        if math.isfinite(sum(scores.nats)):
            scored[way] = scores
        elif not way.axes:
            del positions[way.length]
        measurements += score_measurements(
            scores, split=split, protocol=way.protocol, context=way.length,
            axes={"segment": segments.length, **way.axes},
            facts=difference_facts(scores, scored.get(way.beside)) if way.axes else {},
        )  # fmt: skip
    model.train(was_training)
    sums = [_document_sums(way, scores, split) for way, scores in scored.items()]
    where: dict[str, Any] = {"split": split, "segment": segments.length}
    measurements += _effective_context(config, scored, **where)
    if positions:
        longest = positions[max(positions)]
        measurements += position_measurements(longest, **where)
        measurements += in_context_score(positions, **where)
        measurements += extrapolation_ratio(positions, trained_context, **where)
        sums += position_documents(longest, segments, text.names, dataset.tokenizer.token_bytes, split=split)
    return Evaluated(measurements, {way.length: s for way, s in scored.items() if not way.axes}, sums)


def _ways(config: PerplexityConfig, lengths: Sequence[int]) -> list[Way]:
    """All ways of scoring that a config asks for, each behind the one that it is compared with."""
    strides = sorted(set(config.strides))
    ways = [Way(length, stride) for length in lengths for stride in (None, *(s for s in strides if s < length))]
    ways += [Way(size, sinks=config.sinks) for size in sorted(set(config.streaming))]
    return [replace(way, bos=bos) for way in ways for bos in ((False, True) if config.bos else (False,))]


def _in_comparison(config: PerplexityConfig, length: int) -> Way:
    """The way in which lengths are compared: in windows that move on by the smallest stride."""
    return Way(length, min((s for s in config.strides if s < length), default=None))


def _score(
    model: Model,
    segments: EvalSegments,
    way: Way,
    tokenizer: Tokenizer,
    config: PerplexityConfig,
    *,
    device: torch.device,
    precision: Precision,
    watching: Sequence[Watch],
    advance: Callable[[int], None],
) -> np.ndarray:
    common: dict[str, Any] = {
        "device": device, "precision": precision, "batch_tokens": config.batch_tokens,
        "bos_id": tokenizer.bos_id if way.bos else None, "advance": advance,
    }  # fmt: skip
    if way.sinks is not None:
        return score_streaming(model, segments, sinks=way.sinks, window=way.length - way.sinks, **common)

    def watch(owners: np.ndarray, firsts: np.ndarray, nats: np.ndarray) -> None:
        for each in watching:
            each(owners, firsts, nats)

    return score_windows(model, segments, way.length, stride=way.stride, watch=watch, **common)


def _effective_context(
    config: PerplexityConfig, scored: dict[Way, DocumentScores], *, split: str, segment: int
) -> list[Measurement]:
    ways = [way for way in scored if way == _in_comparison(config, way.length)]
    nats = {way.length: sum(scored[way].nats) / sum(scored[way].targets) for way in ways}
    moving = {"stride": min(config.strides)} if any(way.stride for way in ways) else {}
    protocol = "sliding" if moving else "non-overlapping"
    return effective_context(nats, protocol=protocol, split=split, axes={"segment": segment, **moving})


def _too_long(config: PerplexityConfig, segments: EvalSegments, way: Way, split: str) -> str:
    if segments.length == config.segment:
        return f"longer than the segments, eval.perplexity.segment={config.segment}"
    return f"fewer than {config.min_documents} {split} documents have {way.length + 1} tokens"


def _document_sums(way: Way, scores: DocumentScores, split: str) -> DocumentSums:
    return DocumentSums(
        context=way.length, split=split, axes=way.axes, names=tuple(scores.names), nats=tuple(scores.nats),
        targets=tuple(scores.targets), n_bytes=tuple(scores.n_bytes),
    )  # fmt: skip
