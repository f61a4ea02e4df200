"""Question answering: exact match and F1 of what a model points at in a passage, or says in words of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ctxlab.data.by_length import even_parts
from ctxlab.data.labelled.prompts import Prompts
from ctxlab.data.labelled.questions import QuestionDataset
from ctxlab.data.progress import Progress, silent
from ctxlab.data.stream import row_batch
from ctxlab.evaluation.intervals import ratio_interval
from ctxlab.evaluation.squad_scores import Scores, score
from ctxlab.fields import Count, OrAuto, OrNone
from ctxlab.model.base import Model
from ctxlab.model.generation import DecodingConfig, decode
from ctxlab.model.heads import SpanHead
from ctxlab.records.schema import Measurement, TaskItem
from ctxlab.registry import ComponentConfig
from ctxlab.train.objectives.base import Objective
from ctxlab.train.objectives.extractive import Extractive, Segments
from ctxlab.train.pairs import encode
from ctxlab.train.precision import Precision, autocast

TASK = "qa"


class QAConfig(ComponentConfig):
    """Which test questions are answered, and how."""

    max_questions: OrNone | Count = Field("none", description="test questions, evenly from all; none: all")
    max_answer: int = Field(30, ge=1, description="tokens of an answer, at most")
    no_answer: OrAuto | bool = Field(
        "auto", description="whether a pointer may say that there is no answer; auto: where training has such questions"
    )
    threshold: float = Field(
        0.0, description="nats by which no answer has to be likelier than the likeliest span, to be said"
    )
    untuned: bool = Field(True, description="training also scores the model as it was before the first step")
    batch_tokens: int = Field(16_384, ge=1, description="tokens read at once", json_schema_extra={"identity": False})


class Answers(NamedTuple):
    """What was said to each question, and how many prompts were cut to fit the context."""

    texts: list[str]
    cut: int


def evaluate_qa(
    model: Model,
    dataset: QuestionDataset,
    objective: Objective,
    config: QAConfig,
    *,
    context: int,
    device: torch.device,
    precision: Precision,
    learned: Mapping[str, Any],
    untuned: Model | None = None,
    split: str = "test",
    progress: Progress = silent,
) -> tuple[list[Measurement], list[TaskItem]]:
    """exact_match and f1 of the split's questions, and every answer.

    Beside them stand two baselines: the answer that is most frequent in training, whatever is asked (`learned`, the facts of
    the data that the model was trained on), and the model before it was tuned. Intervals are over what was held out as a
    whole, articles or passages, since questions about one text are not independent.
    """
    questions = dataset.splits[split]
    chosen = np.arange(questions.n)
    if config.max_questions != "none" and questions.n > config.max_questions:
        chosen = chosen[np.arange(config.max_questions) * questions.n // config.max_questions]
    golds = [questions.gold(index) for index in chosen.tolist()]
    units = questions.units[chosen].tolist()

    def answered(asked: Model, what: str) -> Answers:
        return answers(
            asked, dataset, objective, config, chosen, split=split, context=context, device=device, precision=precision,
            learned=learned, advance=progress(what, len(chosen)),
        )  # fmt: skip

    found = answered(model, "answering")
    said = {"": found.texts}
    protocol = f"{objective.config.name}, at most {config.max_answer} tokens"
    if "majority_answer" in learned:
        said["majority"] = [learned["majority_answer"]] * len(chosen)
    if untuned is not None:
        said["untuned"] = answered(untuned, "answering before training").texts
    measurements: list[Measurement] = []
    for baseline, texts in said.items():
        scores = [score(text, gold.answers) for text, gold in zip(texts, golds, strict=True)]
        common: dict[str, Any] = {
            "context": context, "split": split, "protocol": "training's majority" if baseline == "majority" else protocol,
            "facts": {"cut": found.cut} if not baseline else {},
        }  # fmt: skip
        axes = {"baseline": baseline} if baseline else {}
        measurements += summary(scores, units, axes=axes, **common)
        has = [bool(gold.answers) for gold in golds]
        if not baseline and not all(has):
            for name, wanted in (("answerable", True), ("unanswerable", False)):
                here = [place for place, one in enumerate(has) if one == wanted]
                if here:
                    measurements += summary(
                        [scores[place] for place in here], [units[place] for place in here],
                        axes={"questions": name}, **common,
                    )  # fmt: skip
    items = [
        TaskItem(
            task=TASK, context=context, item=index, score=score(text, gold.answers).f1, answer=text,
            wanted=(gold.question, *gold.answers), axes={"id": gold.id, "exact": score(text, gold.answers).exact},
        )
        for index, gold, text in zip(chosen.tolist(), golds, found.texts, strict=True)
    ]  # fmt: skip
    return measurements, items


def summary(
    scores: Sequence[Scores], units: Sequence[int], *, axes: dict[str, Any], **common: Any
) -> list[Measurement]:
    """The means over questions, with intervals over the units that they belong to."""
    places = np.unique(np.asarray(units), return_inverse=True)[1]
    counts = np.bincount(places).astype(float)
    measurements = []
    for name, values in (("exact_match", [one.exact for one in scores]), ("f1", [one.f1 for one in scores])):
        low, high = ratio_interval(np.bincount(places, weights=values).tolist(), counts.tolist()) or (None, None)
        measurements.append(
            Measurement(
                name=name, value=float(np.mean(values)), unit="1", low=low, high=high, n_targets=len(values),
                n_docs=len(counts), axes=axes, **common,
            )
        )  # fmt: skip
    return measurements


def answers(
    model: Model,
    dataset: QuestionDataset,
    objective: Objective,
    config: QAConfig,
    chosen: np.ndarray,
    *,
    split: str,
    context: int,
    device: torch.device,
    precision: Precision,
    learned: Mapping[str, Any] = MappingProxyType({}),
    advance: Callable[[int], None] = lambda _: None,
) -> Answers:
    """The model's answer to each of the `chosen` questions (n,) of a split; an empty text is no answer."""
    if isinstance(objective, Extractive):
        segments = objective.examples(dataset, split, context)
        may_have_none = _learned_none(learned, dataset) if config.no_answer == "auto" else config.no_answer
        return _pointed(
            model, dataset, segments, config, chosen, may_have_none, device=device, precision=precision, advance=advance
        )
    return _said(
        model, dataset, split, context, config, chosen, device=device, precision=precision, advance=advance
    )  # fmt: skip


def _learned_none(learned: Mapping[str, Any], dataset: QuestionDataset) -> bool:
    """Whether the model was trained to say that there is no answer; as `dataset` would have taught it, where `learned` is
    silent. A model that was not has logits at bos that mean nothing, whatever it is asked now."""
    unanswerable = learned.get("splits", {}).get("train", {}).get("unanswerable")
    return dataset.may_have_none if unanswerable is None else unanswerable > 0


class Span(NamedTuple):
    """The likeliest spans of rows, (B,) each: the sum of the logits of their ends, the first place and the last."""

    score: Tensor
    first: Tensor
    last: Tensor


def best_spans(scores: Tensor, begins: Tensor, ends: Tensor, longest: int) -> Span:
    """The span i..j with the largest start_i + end_j, of rows' logits (B,2,T).

    begins <= i <= j < ends, (B,) each, and j < i + `longest`. Memory stays linear in T. Of equal spans, the shortest that
    begins first.
    """
    B, _, T = scores.shape
    places = torch.arange(T, device=scores.device)
    outside = (places < begins[:, None]) | (places >= ends[:, None])
    start, end = scores.masked_fill(outside[:, None], -torch.inf).unbind(1)  # (B,T) each
    best = start.new_full((B,), -torch.inf)
    first, last = begins.clone(), begins.clone()
    for more in range(min(longest, T)):
        value, at = (start[:, : T - more] + end[:, more:]).max(-1)
        better = value > best
        best = torch.where(better, value, best)
        first, last = torch.where(better, at, first), torch.where(better, at + more, last)
    return Span(best, first, last)


@torch.inference_mode()
def _pointed(
    model: Model,
    dataset: QuestionDataset,
    segments: Segments,
    config: QAConfig,
    chosen: np.ndarray,
    may_have_none: bool,
    *,
    device: torch.device,
    precision: Precision,
    advance: Callable[[int], None],
) -> Answers:
    """The best span over the segments of each question, unless no answer is likelier.

    Of no answer a question has the least logit over its segments, start and end at bos (as in BERT's run_squad.py).
    """
    head = model.task_head
    assert isinstance(head, SpanHead)
    questions = segments.questions
    rows = np.flatnonzero(np.isin(segments.question, chosen))
    rows = rows[np.argsort(segments.tokens[rows], kind="stable")]
    best = np.full(questions.n, -np.inf)
    nothing = np.full(questions.n, np.inf)
    spans = np.zeros((questions.n, 2), dtype=np.int64)
    for some in even_parts(rows, segments.tokens[rows], config.batch_tokens):
        batch = row_batch([segments.row(int(row)) for row in some], dataset.tokenizer.pad_id, 0)
        lengths = batch.lengths.to(device)
        with autocast(precision, device):
            scores = head.scores(model.hidden(batch.tokens.to(device), lengths=lengths), lengths)  # (B,2,T)
        begins = torch.from_numpy(segments.front[some]).to(device)
        found = best_spans(scores, begins, lengths - 1, config.max_answer)
        values = torch.stack([found.score, scores[:, :, 0].sum(1)]).double().cpu().numpy()
        places = (
            torch.stack([found.first, found.last], dim=1).cpu().numpy() - (segments.front - segments.first)[some, None]
        )
        for question, score_here, none_here, span in zip(segments.question[some], *values, places, strict=True):
            nothing[question] = min(nothing[question], none_here)
            if score_here > best[question]:
                best[question], spans[question] = score_here, span
        advance(int((segments.first[some] == 0).sum()))
    texts = []
    for question in chosen.tolist():
        first, last = spans[question]
        if may_have_none and nothing[question] - best[question] > config.threshold:
            texts.append("")
        else:
            text = dataset.tokenizer.decode(questions.tokens_of_passage(question)[first : last + 1].tolist())
            texts.append(text.strip())
    return Answers(texts, 0)


@torch.no_grad()
def _said(
    model: Model,
    dataset: QuestionDataset,
    split: str,
    context: int,
    config: QAConfig,
    chosen: np.ndarray,
    *,
    device: torch.device,
    precision: Precision,
    advance: Callable[[int], None],
) -> Answers:
    """What greedy generation says to each prompt."""
    tokenizer = dataset.tokenizer
    prompts = Prompts(dataset, split, context, apart=model.reads_source)
    most = max(
        1, min(config.max_answer, context // 4, prompts.room)
    )  # a passage keeps the larger part of a short context
    begun = [prompts.prompt(index, most) for index in chosen.tolist()]
    sizes = np.array([len(prompt) for prompt, _ in begun])
    texts = [""] * len(chosen)
    decoding = DecodingConfig(temperature=0.0, max_new_tokens=most)
    order = np.argsort(sizes, kind="stable")
    for some in even_parts(order, sizes[order] + most, config.batch_tokens):
        read = [begun[place][0] for place in some.tolist()]
        with autocast(precision, device):
            encoded = encode(model, read, tokenizer.pad_id) if model.reads_source else None
            starts = [[tokenizer.bos_id]] * len(read) if model.reads_source else read
            said = decode(model, starts, decoding, stop_ids=(tokenizer.eos_id,), encoded=encoded)
        for place, ids in zip(some.tolist(), said, strict=True):
            texts[place] = tokenizer.decode(ids).strip()
        advance(len(read))
    return Answers(texts, sum(cut for _, cut in begun))
