"""Perplexity at many lengths over the same target tokens: sums of nats, every target scored exactly once.

The test documents are cut into segments of one length (the longest asked for that enough documents fill). At length c a
segment is scored in windows of c inputs t[i:i+c] and c targets t[i+1:i+c+1] that follow one another without overlap. So
every length scores every target of every segment once, and a difference between lengths is due to context alone.

There the first targets of a window see next to nothing (Press et al. 2022, arXiv:2108.12409, appendix B, the early-token
curse). With strides the same targets are scored again in windows that overlap: each moves on by S tokens and scores those S, so
that all but a segment's first c targets see at least c - S tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pydantic import Field

from ctxlab.data.prepare import TextDataset
from ctxlab.data.tokens import Split
from ctxlab.data.windows import EvalSegments, longest_length
from ctxlab.errors import UndefinedBeyondTraining
from ctxlab.evaluation.intervals import paired_interval, ratio_interval
from ctxlab.fields import Count, Length, OrAuto, OrNone
from ctxlab.model.transformer import Transformer
from ctxlab.records.schema import Measurement
from ctxlab.registry import ComponentConfig
from ctxlab.train.precision import Precision
from ctxlab.train.scoring import score_windows

PROTOCOL = "non-overlapping"
SLIDING = "sliding"
AUTO_MULTIPLES = (0.5, 1, 2, 4, 8)
_LARGEST_NATS = math.log(sys.float_info.max)


class PerplexityConfig(ComponentConfig):
    """Which lengths are scored, on what cut of the split."""

    lengths: OrAuto | tuple[Length, ...] = Field(
        "auto", description="auto: 1/2, 1, 2, 4 and 8 times the trained context"
    )
    segment: OrAuto | Length = Field("auto", description="tokens of one segment; auto: the longest length asked for")
    strides: tuple[Length, ...] = Field((), description="scored again in windows that move on by so many tokens")
    min_documents: int = Field(8, ge=1, description="a length is scored when this many test documents fill it")
    max_tokens: OrNone | Count = Field(131_072, description="scored at each length, shared by the documents; none: all")
    batch_tokens: int = Field(16_384, ge=1, json_schema_extra={"identity": False})


@dataclass
class DocumentScores:
    """Sums per document, in document order: nats, scored targets, UTF-8 bytes of the targets' text."""

    names: list[str] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    n_bytes: list[int] = field(default_factory=list)


def auto_lengths(context: int) -> tuple[int, ...]:
    """1/2, 1, 2, 4 and 8 times the trained context."""
    return tuple(sorted({max(1, int(context * multiple)) for multiple in AUTO_MULTIPLES}))


def document_scores(segments: EvalSegments, nats: np.ndarray, token_bytes: np.ndarray) -> DocumentScores:
    """Segment sums gathered by document."""
    scores = DocumentScores()
    last = -1
    for index in range(segments.n):
        document, tokens = segments.segment(index)
        if document != last:  # told apart by number: two documents may have one name
            last = document
            scores.names.append(segments.split.names[document])
            scores.nats.append(0.0)
            scores.targets.append(0)
            scores.n_bytes.append(0)
        scores.nats[-1] += float(nats[index])
        scores.targets[-1] += len(tokens) - 1
        scores.n_bytes[-1] += int(token_bytes[np.asarray(tokens[1:])].sum())
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
    """nats per token, perplexity and bits per byte of the same sums, each with its 95% interval over documents.

    With N nats, T targets and Y bytes over all documents: nats per token N / T, perplexity exp(N / T), bits per byte
    N / (Y ln 2). The interval of the perplexity is the exponential of that of the nats.
    """
    n_targets, n_docs = sum(scores.targets), len(scores.names)
    per_token = sum(scores.nats) / n_targets
    token_range = ratio_interval(scores.nats, scores.targets)
    in_bits = [n / math.log(2) for n in scores.nats]
    byte_range = ratio_interval(in_bits, scores.n_bytes)
    common: dict[str, Any] = {
        "context": context,
        "split": split,
        "protocol": protocol,
        "n_targets": n_targets,
        "n_docs": n_docs,
        "axes": axes,
        "facts": facts or {},
    }

    def row(name: str, unit: str, normaliser: str, value: float, bounds: tuple[float, float] | None) -> Measurement:
        low, high = bounds if bounds is not None else (None, None)
        return Measurement(name=name, value=value, unit=unit, low=low, high=high, normaliser=normaliser, **common)

    return [
        row("nats_per_token", "nats/token", "token", per_token, token_range),
        row(
            "perplexity", "1", "token", _exp(per_token),
            None if token_range is None else (_exp(token_range[0]), _exp(token_range[1])),
        ),
        row("bits_per_byte", "bits/byte", "byte", sum(in_bits) / sum(scores.n_bytes), byte_range),
    ]  # fmt: skip


def difference_facts(scores: DocumentScores | None, other: DocumentScores | None) -> dict[str, float]:
    """By how many nats per token one is above the other on the same targets, with the interval paired over documents."""
    if scores is None or other is None or (scores.names, scores.targets) != (other.names, other.targets):
        return {}
    difference = (sum(scores.nats) - sum(other.nats)) / sum(scores.targets)
    if not math.isfinite(difference):
        return {}
    bounds = paired_interval(scores.nats, other.nats, scores.targets)
    ends = {} if bounds is None else {"difference_low": bounds[0], "difference_high": bounds[1]}
    return {"difference": difference, **ends}


def _exp(nats: float) -> float:
    """exp, infinite where it has no number: the record says so, the other lengths go on."""
    return math.exp(nats) if nats < _LARGEST_NATS else math.nan if math.isnan(nats) else math.inf


def missing_measurements(context: int, split: str, status: str, reason: str) -> list[Measurement]:
    """The rows of a length that has no number, and why."""
    names = (("nats_per_token", "nats/token"), ("perplexity", "1"), ("bits_per_byte", "bits/byte"))
    return [
        Measurement(
            name=name, value=None, unit=unit, context=context, split=split, protocol=PROTOCOL,
            status=status, reason=reason,
        )
        for name, unit in names
    ]  # fmt: skip


def segment_length(config: PerplexityConfig, lengths: Sequence[int], dataset: TextDataset, split: str) -> int | None:
    """The length of the segments: the longest of the lengths asked for that enough documents fill; None if none is.

    A given length that too few documents fill gives way to the longest one that enough of them do, whatever lengths are
    asked for: the cells of a sweep share that setting, not their lengths, and have to cut the text alike.
    """
    if config.segment == "auto":
        return longest_length(dataset.splits[split], lengths, min_docs=config.min_documents)
    targets = np.sort(dataset.splits[split].sizes - 1)[::-1]
    filled = int(targets[config.min_documents - 1]) if len(targets) >= config.min_documents else 0
    return min(config.segment, filled) if filled > 0 else None


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
    model: Transformer,
    dataset: TextDataset,
    config: PerplexityConfig,
    *,
    trained_context: int,
    device: torch.device,
    precision: Precision,
    split: str = "test",
    progress: Callable[[str, int], Callable[[int], None]] = lambda *_: lambda _: None,
) -> tuple[list[Measurement], dict[int, DocumentScores]]:
    """Perplexity of `model` at every length of the config, and the sums by document behind it (to compare in pairs)."""
    lengths, segments = asked_segments(config, dataset, trained_context, split)
    was_training = model.training
    model.eval()
    measurements: list[Measurement] = []
    documents: dict[int, DocumentScores] = {}
    for length in lengths:
        if segments is None or length > segments.length:
            if segments is not None and segments.length == config.segment:
                reason = f"longer than the segments, eval.perplexity.segment={config.segment}"
            else:
                reason = f"fewer than {config.min_documents} {split} documents have {length + 1} tokens"
            measurements += missing_measurements(length, split, "no_document", reason)
            continue
        for stride in (None, *(s for s in sorted(set(config.strides)) if s < length)):
            moving = "" if stride is None else f", moving on by {stride}"
            advance = progress(f"scoring {split} at {length}{moving}", segments.n * segments.length)
            try:
                nats = score_windows(
                    model, segments, length, device=device, precision=precision,
                    batch_tokens=config.batch_tokens, stride=stride, advance=advance,
                )  # fmt: skip
            except UndefinedBeyondTraining as undefined:
                measurements += missing_measurements(length, split, "undefined", str(undefined))
                break
            scores = document_scores(segments, nats, dataset.tokenizer.token_bytes)
            if stride is None and math.isfinite(sum(scores.nats)):
                documents[length] = scores
            measurements += score_measurements(
                scores,
                split=split,
                protocol=PROTOCOL if stride is None else SLIDING,
                context=length,
                axes={"segment": segments.length} | ({} if stride is None else {"stride": stride}),
                facts={} if stride is None else difference_facts(scores, documents.get(length)),
            )
    model.train(was_training)
    return measurements, documents
