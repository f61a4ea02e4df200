"""What a model answers to the examples of a task: at labelled places in one pass, or by greedy generation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from torch.nn import functional as F

from ctxlab.data.by_length import Examples
from ctxlab.data.prepare import TextDataset
from ctxlab.data.stream import padded, sources_of
from ctxlab.data.tasks.base import TokenTask
from ctxlab.data.tasks.dataset import TaskDataset
from ctxlab.data.windows import IGNORED, Row
from ctxlab.model.base import Model
from ctxlab.model.generation import DecodingConfig, decode
from ctxlab.train.objectives.prefix import prefix_lengths
from ctxlab.train.objectives.windows import Denoising
from ctxlab.train.precision import Precision, autocast

_LOGITS = 1 << 14  # labelled places whose logits exist at once


class Labels(NamedTuple):
    """Of every example (n,): labelled places, how many of them come out right, and their nats."""

    labels: np.ndarray
    right: np.ndarray
    nats: np.ndarray


@torch.inference_mode()
def answer_labels(
    model: Model,
    rows: Sequence[Row],
    *,
    pad_id: int,
    device: torch.device,
    precision: Precision,
    batch_tokens: int,
    part: tuple[int, int] = (0, 1),
    advance: Callable[[int], None] = lambda _: None,
) -> Labels:
    """The likeliest token at every labelled place, given the example's own tokens: those before it, or all of an encoder's.
    What stands before the first label is the prefix of a model that has one. Of a model with a task head: its likeliest choices.

    A model that is right at every label of an answer is one whose greedy generation is that answer.
    `part` = (rank, world) takes every world-th batch; the others stay zero, so a sum over ranks is the whole.
    """
    found = np.zeros((3, len(rows)))
    by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
    first = number = 0
    while first < len(by_length):
        width = len(rows[by_length[first]].tokens)
        chosen = by_length[first : first + max(1, batch_tokens // width)]
        first += len(chosen)
        if number % part[1] == part[0]:
            tokens, sizes = padded([rows[i].tokens for i in chosen], pad_id)
            targets, _ = padded([rows[i].targets for i in chosen], IGNORED)
            labelled = torch.from_numpy(targets != IGNORED).to(device)  # (B,T), or (B,k) of a task's head
            wanted = torch.from_numpy(targets).to(device)[labelled]  # (n,)
            lengths = torch.from_numpy(sizes).to(device)
            source, source_lengths = sources_of([rows[i] for i in chosen], pad_id)
            read: Any = {}
            if source is not None and source_lengths is not None:
                read = {"source": source.to(device), "source_lengths": source_lengths.to(device)}
            if model.prefix:
                read["prefix"] = prefix_lengths(torch.from_numpy(targets)).to(device)
            with autocast(precision, device):
                hidden = model.hidden(torch.from_numpy(tokens).to(device), lengths=lengths, **read)  # (B,T,d)
                if model.task_head is not None:
                    logits = list(model.task_head.scores(hidden, lengths)[labelled].split(_LOGITS))
                else:
                    logits = [model.logits(some).float() for some in hidden[labelled].split(_LOGITS)]
            right = torch.cat([some.argmax(-1) for some in logits]) == wanted
            parts = zip(logits, wanted.split(_LOGITS))
            nats = torch.cat([F.cross_entropy(some, goal, reduction="none") for some, goal in parts])
            owners = labelled.nonzero()[:, 0].cpu().numpy()
            values = torch.stack([torch.ones_like(nats), right.float(), nats]).double().cpu().numpy()  # (3, n)
            for row, value in zip(found, values):
                np.add.at(row, np.array(chosen)[owners], value)
        advance(len(chosen))
        number += 1
    return Labels(*found)


@torch.inference_mode()
def answer_freely(
    model: Model,
    prompts: Sequence[Sequence[int]],
    new_tokens: Sequence[int],
    *,
    stop_id: int,
    device: torch.device,
    precision: Precision,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """What greedy generation says to each prompt, up to its `new_tokens` or to `stop_id` (left out).

    Prompts of one length are answered together.
    """
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (prompt, most) in enumerate(zip(prompts, new_tokens, strict=True)):
        alike[len(prompt), most].append(index)
    answers: list[list[int]] = [[] for _ in prompts]
    for (length, most), members in sorted(alike.items()):
        rows = max(1, batch_tokens // (length + most))
        for first in range(0, len(members), rows):
            chosen = members[first : first + rows]
            with autocast(precision, device):
                config = DecodingConfig(temperature=0.0, max_new_tokens=most)
                said = decode(model, [prompts[i] for i in chosen], config, stop_ids=(stop_id,))
            for index, ids in zip(chosen, said, strict=True):
                answers[index] = ids
            advance(len(chosen))
    return answers


class RowValidation:
    """Scores a fixed set of rows, shared by the ranks. The accuracy is of labelled places, or with `whole` of rows."""

    def __init__(self, rows: Sequence[Row], *, pad_id: int, precision: Precision, whole: bool) -> None:
        self.rows, self.pad_id, self.precision, self.whole = rows, pad_id, precision, whole

    def __call__(self, trainer: lightning.Trainer, model: Model, device: torch.device) -> dict[str, float]:
        """nats per scored token, and accuracy; every rank returns the same numbers."""
        model.eval()
        found: Any = np.stack(
            answer_labels(
                model,
                self.rows,
                pad_id=self.pad_id,
                device=device,
                precision=self.precision,
                batch_tokens=16_384,
                part=(trainer.global_rank, trainer.world_size),
            )
        )
        model.train()
        if trainer.world_size > 1:
            found = trainer.strategy.reduce(torch.tensor(found, device=device), reduce_op="sum").cpu().numpy()
        count, right, nats = found
        accuracy = (right == count).mean() if self.whole else right.sum() / count.sum()
        return {"nats_per_token": float(nats.sum() / count.sum()), "accuracy": float(accuracy)}


def task_validation(dataset: TaskDataset, context: int, *, max_tokens: int, precision: Precision) -> RowValidation:
    """Of the task's validation examples at the trained context: labelled places where an example has many questions, whole
    answers where it has one."""
    rows = [dataset.row("validation", context, (index,), None) for index in range(max(1, max_tokens // context))]
    whole = not (isinstance(dataset.task, TokenTask) and not dataset.task.generated)
    return RowValidation(rows, pad_id=dataset.tokenizer.pad_id, precision=precision, whole=whole)


def objective_validation(
    objective: Denoising, dataset: TextDataset, context: int, *, max_tokens: int, precision: Precision
) -> RowValidation:
    """Of text of the validation split, spoilt as the objective does: the tokens that are to be said."""
    longest = int(np.diff(dataset.splits["validation"].starts).max(initial=0)) - 1
    rows, _ = objective.held_out(dataset, "validation", min(context, longest), max(1, max_tokens // context))
    return RowValidation(rows, pad_id=dataset.tokenizer.pad_id, precision=precision, whole=False)


def example_validation(examples: Examples, *, max_tokens: int, pad_id: int, precision: Precision) -> RowValidation:
    """Of what people have labelled: the first examples of the validation split that `max_tokens` hold, right as a whole."""
    kept = examples.kept
    short = kept[: max(1, int(np.searchsorted(np.cumsum(examples.tokens[kept]), max_tokens, side="right")))]
    rows = [examples.row(int(index)) for index in short]
    return RowValidation(rows, pad_id=pad_id, precision=precision, whole=True)
