"""Translation: BLEU and chrF of what beam search says, and the nats of what was to be said."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from ctxlab.data.pairs.dataset import PairDataset
from ctxlab.data.pairs.parallel import Pair
from ctxlab.data.progress import Progress, silent
from ctxlab.errors import DataError
from ctxlab.evaluation.perplexity import DocumentScores, score_measurements
from ctxlab.fields import Count, OrNone
from ctxlab.model.base import Model
from ctxlab.model.beam import beam_search
from ctxlab.model.generation import DecodingConfig
from ctxlab.records.schema import Measurement, TaskItem
from ctxlab.registry import ComponentConfig
from ctxlab.train.pairs import encode, score_pairs
from ctxlab.train.precision import Precision, autocast

TASK = "translation"
_RESAMPLED = 1000  # of the test set, for the interval of a corpus score (Koehn 2004, W04-3250)


class TranslationConfig(ComponentConfig):
    """How test sentences are translated, and which."""

    num_beams: int = Field(4, ge=1, description="hypotheses that are followed; 1: the likeliest token each time")
    length_penalty: float = Field(0.6, description="a in the score of a hypothesis, ln p / ((5 + length) / 6)^a")
    extra_tokens: int = Field(50, ge=1, description="a translation has at most so many tokens more than its source")
    max_words: OrNone | int = Field("none", description="only pairs with no more words than this on either side")
    max_pairs: OrNone | Count = Field(2000, description="test pairs, evenly from all; none: all")
    batch_tokens: int = Field(8192, ge=1, description="tokens at once", json_schema_extra={"identity": False})


class _Plain:
    """sacrebleu's resampling fails where some scores are numpy's and others, those of 0, are Python's: all are Python's here."""

    def _compute_score_from_stats(self, stats: Any) -> Any:
        score = super()._compute_score_from_stats(stats)  # type: ignore[misc]
        score.score = float(score.score)
        return score


class _Bleu(_Plain, BLEU):
    pass


class _Chrf(_Plain, CHRF):
    pass


class Translated(NamedTuple):
    """A test pair and what the model made of its source."""

    pair: Pair
    said: str


def evaluate_translation(
    model: Model,
    dataset: PairDataset,
    config: TranslationConfig,
    *,
    device: torch.device,
    precision: Precision,
    split: str = "test",
    progress: Progress = silent,
) -> tuple[list[Measurement], list[TaskItem]]:
    """bleu and chrf of the split's pairs, nats per target token, and every translation with its own chrF.

    Of a model whose positions end, pairs with a side longer than they reach are left out, and counted in the facts.
    BLEU (Papineni et al. 2002, P02-1040) and chrF2 (Popovic 2015, W15-3049) are sacrebleu's over the whole set, of text as it
    is written; the protocol is its signature. Intervals are of 1,000 resampled test sets, those of nats over pairs.
    """
    model.eval()
    asked = chosen_pairs(dataset, config, split)
    chosen = asked[_fitting(model, dataset, asked, split)]
    if not len(chosen):
        raise DataError(f"context: no {split} pair is as short as the {model.n_positions} positions that the model has")
    pairs = [dataset.text(split, index) for index in chosen.tolist()]
    tokens = int((dataset.splits[split].target.sizes[chosen] - 1).sum())
    nats = score_pairs(
        model, dataset.splits[split], chosen, pad_id=dataset.tokenizer.pad_id,
        device=device, precision=precision, batch_tokens=config.batch_tokens, advance=progress("scoring the pairs", tokens),
    )  # fmt: skip
    said = translate(
        model, dataset, chosen, config, split=split, device=device, precision=precision,
        advance=progress("translating", len(chosen)),
    )  # fmt: skip
    scores = DocumentScores(
        names=[str(index) for index in chosen.tolist()],
        nats=nats.tolist(),
        targets=(dataset.splits[split].target.sizes[chosen] - 1).tolist(),
        n_bytes=[len(pair.target.encode()) for pair in pairs],
        words=[len(pair.target.split()) for pair in pairs],
    )
    axes: dict[str, Any] = {} if config.max_words == "none" else {"max_words": config.max_words}
    measurements = score_measurements(scores, split=split, protocol="teacher forcing, eos scored", axes=axes)
    measurements += corpus_scores([Translated(p, s) for p, s in zip(pairs, said, strict=True)], config, split, axes)
    if left_out := len(asked) - len(chosen):
        measurements = [m.model_copy(update={"facts": {**m.facts, "too_long": left_out}}) for m in measurements]
    sentence = CHRF()
    items = [
        TaskItem(
            task=TASK, context=len(dataset.splits[split].source.sentence(index)), item=index,
            score=sentence.sentence_score(text, [pair.target]).score / 100, wanted=(pair.source, pair.target), answer=text,
        )
        for index, pair, text in zip(chosen.tolist(), pairs, said, strict=True)
    ]  # fmt: skip
    return measurements, items


def corpus_scores(
    translated: Sequence[Translated], config: TranslationConfig, split: str, axes: dict[str, Any]
) -> list[Measurement]:
    """BLEU and chrF of translations, one reference each."""
    said, references = [one.said for one in translated], [[one.pair.target for one in translated]]
    found = []
    for name, metric in (("bleu", _Bleu()), ("chrf", _Chrf())):
        score = metric.corpus_score(said, references, n_bootstrap=_RESAMPLED if len(said) > 1 else 1)
        middle, half = getattr(score, "_mean", -1.0), getattr(score, "_ci", -1.0)
        found.append(
            Measurement(
                name=name, value=score.score, unit="1", low=middle - half if half >= 0 else None,
                high=middle + half if half >= 0 else None, split=split, protocol=str(metric.get_signature()),
                n_docs=len(said), axes=axes,
                facts={"num_beams": config.num_beams, "length_penalty": config.length_penalty},
            )
        )  # fmt: skip
    return found


def chosen_pairs(dataset: PairDataset, config: TranslationConfig, split: str) -> np.ndarray:
    """Which pairs of a split are translated: those short enough, thinned out evenly to `max_pairs`."""
    indices = np.arange(dataset.splits[split].n)
    if config.max_words != "none":
        most = config.max_words
        short = [all(len(text.split()) <= most for text in dataset.text(split, index)) for index in indices.tolist()]
        indices = indices[np.array(short, dtype=bool)]
    if config.max_pairs != "none" and len(indices) > config.max_pairs:
        indices = indices[np.arange(config.max_pairs) * len(indices) // config.max_pairs]
    return indices


def _fitting(model: Model, dataset: PairDataset, indices: np.ndarray, split: str) -> np.ndarray:
    """Which of some pairs a model has positions for, both of whose sides it reads."""
    most = model.n_positions
    sides = dataset.splits[split]
    if most is None:
        return np.ones(len(indices), dtype=bool)
    found: np.ndarray = np.maximum(sides.source.sizes[indices], sides.target.sizes[indices] - 1) <= most
    return found


@torch.no_grad()
def translate(
    model: Model,
    dataset: PairDataset,
    indices: np.ndarray,
    config: TranslationConfig,
    *,
    split: str,
    device: torch.device,
    precision: Precision,
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The best hypothesis for each source, as text."""
    side, tokenizer = dataset.splits[split].source, dataset.tokenizer
    decoding = DecodingConfig(
        num_beams=config.num_beams,
        length_penalty=config.length_penalty,
        temperature=1.0 if config.num_beams > 1 else 0.0,
    )
    order = np.argsort(side.sizes[indices], kind="stable")
    most = model.n_positions or sys.maxsize
    said = [""] * len(indices)
    start = 0
    while start < len(order):
        longest = side.sizes[indices[order[start:]]]
        rows = max(
            1, int(np.searchsorted(longest * np.arange(1, len(longest) + 1) * config.num_beams, config.batch_tokens))
        )
        chosen = order[start : start + rows]
        sentences = [side.sentence(int(index)).tolist() for index in indices[chosen]]
        with autocast(precision, device):
            encoded = encode(model, sentences, dataset.tokenizers.source.pad_id)
            found = beam_search(
                model, [[tokenizer.bos_id]] * len(chosen), decoding, stop_ids=(tokenizer.eos_id,),
                limits=[min(len(sentence) + config.extra_tokens, most) for sentence in sentences], encoded=encoded,
            )  # fmt: skip
        for place, hypotheses in zip(chosen.tolist(), found, strict=True):
            said[place] = tokenizer.decode(hypotheses[0].tokens)
        advance(len(chosen))
        start += rows
    return said
