"""Text classification: how many labels are right, how well each is told from the others, and which are taken for which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field

from ctxlab.data.by_length import even_parts
from ctxlab.data.labelled.texts import LabelDataset
from ctxlab.data.progress import Progress, silent
from ctxlab.data.stream import row_batch
from ctxlab.evaluation.tasks import wilson_interval
from ctxlab.fields import Count, OrNone
from ctxlab.model.base import Model
from ctxlab.model.heads import LabelHead
from ctxlab.records.schema import Measurement, TaskItem
from ctxlab.registry import ComponentConfig
from ctxlab.train.objectives.base import Objective
from ctxlab.train.objectives.classification import TextRows
from ctxlab.train.precision import Precision, autocast

TASK = "classification"
_RESAMPLED = 1000  # of the test set, for the interval of the mean F1
_SHOWN = 200  # characters of a text that an item keeps


class ClassificationConfig(ComponentConfig):
    """Which test texts are labelled."""

    max_texts: OrNone | Count = Field("none", description="test texts, evenly from all; none: all")
    batch_tokens: int = Field(16_384, ge=1, description="tokens read at once", json_schema_extra={"identity": False})


def evaluate_classification(
    model: Model,
    dataset: LabelDataset,
    objective: Objective,
    config: ClassificationConfig,
    *,
    context: int,
    device: torch.device,
    precision: Precision,
    learned: Mapping[str, Any],
    split: str = "test",
    progress: Progress = silent,
) -> tuple[list[Measurement], list[TaskItem]]:
    """accuracy, macro_f1 and the counts of the split's texts by their label and the one that was chosen; every choice.

    Beside them stands the label that is most frequent in training, for every text (`learned`: the facts of the data that the
    model was trained on). Labels are compared by name: one that training has not cannot be chosen. Intervals: Wilson's for
    the accuracy, 1,000 resampled test sets for the mean F1.
    """
    head = model.task_head
    assert isinstance(head, LabelHead)
    texts = dataset.splits[split]
    rows = objective.examples(dataset, split, context)
    assert isinstance(rows, TextRows)
    chosen = np.arange(texts.n)
    if config.max_texts != "none" and texts.n > config.max_texts:
        chosen = chosen[np.arange(config.max_texts) * texts.n // config.max_texts]
    advance = progress("labelling", len(chosen))
    choices = _chosen(model, head, rows, chosen, dataset, config, device=device, precision=precision, advance=advance)
    names = sorted({*dataset.labels, *head.labels})
    place = {name: number for number, name in enumerate(names)}
    wanted = np.array([place[dataset.labels[int(label)]] for label in texts.label[chosen]])
    said = np.array([place[head.labels[choice]] for choice in choices])
    common = {"context": context, "split": split, "n_docs": len(chosen)}
    protocol = f"{objective.config.name}, {head.pooling} place" + ("s" if head.pooling == "mean" else "")
    facts = {"cut": int(rows.cut[chosen].sum())}
    counts = confusion(wanted, said, len(names))
    measurements = summary(counts, protocol=protocol, axes={}, facts=facts, **common)
    if "majority_label" in learned and learned["majority_label"] in place:
        always = confusion(wanted, np.full_like(wanted, place[learned["majority_label"]]), len(names))
        measurements += summary(
            always, protocol="training's majority", axes={"baseline": "majority"}, facts={}, **common
        )
    measurements += [
        Measurement(
            name="examples", value=float(counts[i, j]), unit="1", axes={"label": names[i], "said": names[j]},
            protocol=protocol, **common,
        )
        for i, j in np.argwhere(counts).tolist()
    ]  # fmt: skip
    items = [
        TaskItem(
            task=TASK, context=context, item=index, score=float(a == b), answer=names[b],
            wanted=(dataset.tokenizer.decode(texts.text.sentence(index).tolist())[:_SHOWN], names[a]),
        )
        for index, a, b in zip(chosen.tolist(), wanted.tolist(), said.tolist(), strict=True)
    ]  # fmt: skip
    return measurements, items


def confusion(wanted: np.ndarray, said: np.ndarray, n: int) -> np.ndarray:
    """How many of each label (row) were given each label (column), (n,n)."""
    return np.bincount(wanted * n + said, minlength=n * n).reshape(n, n)


def macro_f1(hits: np.ndarray, either: np.ndarray) -> np.ndarray:
    """The mean over labels of F1 = 2 hits / (texts of the label + texts given it), both (...,n).

    Labels that no text has and none was given are left out (as in scikit-learn's f1_score with average="macro").
    """
    return (2 * hits / np.maximum(either, 1)).sum(-1) / np.maximum((either > 0).sum(-1), 1)


def summary(counts: np.ndarray, *, axes: dict[str, Any], **common: Any) -> list[Measurement]:
    """accuracy and macro_f1 of counts by label and choice (n,n)."""
    total, right = int(counts.sum()), float(np.trace(counts))
    values = {"accuracy": right / total, "macro_f1": float(macro_f1(np.diag(counts), counts.sum(0) + counts.sum(1)))}
    bounds = {"accuracy": wilson_interval(right, total), "macro_f1": _resampled(counts)}
    return [
        Measurement(name=name, value=value, unit="1", low=bounds[name][0], high=bounds[name][1], axes=axes, **common)
        for name, value in values.items()
    ]


def _resampled(counts: np.ndarray) -> tuple[float, float]:
    """The middle 95% of the mean F1 of test sets that are drawn with replacement from this one, always the same draws."""
    rows, columns = np.nonzero(counts)
    drawn = np.random.default_rng(0).multinomial(counts.sum(), counts[rows, columns] / counts.sum(), size=_RESAMPLED)
    hits, either = np.zeros((2, _RESAMPLED, len(counts)), dtype=np.int64)
    for number, (row, column) in enumerate(zip(rows, columns, strict=True)):
        either[:, row] += drawn[:, number]
        either[:, column] += drawn[:, number]
        if row == column:
            hits[:, row] += drawn[:, number]
    low, high = np.quantile(macro_f1(hits, either), (0.025, 0.975)).tolist()
    return low, high


@torch.inference_mode()
def _chosen(
    model: Model,
    head: LabelHead,
    rows: TextRows,
    chosen: np.ndarray,
    dataset: LabelDataset,
    config: ClassificationConfig,
    *,
    device: torch.device,
    precision: Precision,
    advance: Any,
) -> np.ndarray:
    """Which of the head's labels each text is given, (n,)."""
    found = np.zeros(len(chosen), dtype=np.int64)
    order = np.argsort(rows.tokens[chosen], kind="stable")
    for some in even_parts(order, rows.tokens[chosen[order]], config.batch_tokens):
        batch = row_batch([rows.row(int(chosen[place])) for place in some], dataset.tokenizer.pad_id, 0)
        lengths = batch.lengths.to(device)
        with autocast(precision, device):
            scores = head.scores(model.hidden(batch.tokens.to(device), lengths=lengths), lengths)  # (B,1,C)
        found[some] = scores[:, 0].argmax(-1).cpu().numpy()
        advance(len(some))
    return found
