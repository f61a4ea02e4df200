"""Answers to the examples of a task by length, and by where in the text the answer stands; chance and the oracle beside them.

Every example is one question that the model answers by itself: by greedy generation, or, for tasks whose questions stand in
the sequence, at the labelled places. Nothing of an answer is ever shown.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field

from ctxlab.data.corpora.base import Corpus
from ctxlab.data.prepare import TextDataset
from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import DoesNotFit, Task, TextTask, TokenTask, generator
from ctxlab.data.tasks.dataset import TaskDataset
from ctxlab.data.windows import IGNORED, Row
from ctxlab.errors import DataError, IncompatibleError, UndefinedBeyondTraining
from ctxlab.evaluation.perplexity import auto_lengths
from ctxlab.fields import Length, OrAuto, OrNone
from ctxlab.model.base import Model
from ctxlab.records.schema import Measurement, TaskItem
from ctxlab.registry import ComponentConfig
from ctxlab.train.answers import answer_freely, answer_labels
from ctxlab.train.precision import Precision

GENERATED = "greedy generation"
LABELLED = "labelled places"
_RULER = "task/ruler/"


class TaskEvaluation(ComponentConfig):
    """Which cells of a task are asked, and how often."""

    lengths: OrAuto | tuple[Length, ...] = Field(
        "auto", description="auto: 1/2, 1, 2, 4 and 8 times the trained context"
    )
    depths: int = Field(1, ge=1, description="places of the answer, evenly from start to end; 1: anywhere")
    items: int = Field(64, ge=2, description="examples of a cell")
    batch_tokens: int = Field(16_384, ge=1, json_schema_extra={"identity": False})


class OwnTask(TaskEvaluation):
    """The task that the run was trained on, with its own settings."""

    def check_numbers(self, task: str) -> None:
        """A task in numbers has no place of the answer to choose. Raises IncompatibleError where one is asked for."""
        if self.depths > 1:
            raise IncompatibleError(f"eval.task.depths: {task} has no depth to choose; the nearest valid value is 1")


class NeedleGrid(TaskEvaluation):
    """Short needles, at every length and depth."""

    depths: int = Field(5, ge=1, description="places of the needle, evenly from start to end; 1: anywhere")


class PasskeyGrid(TaskEvaluation):
    """The pass key of Mohtashami and Jaggi 2023, at every length and depth."""

    depths: int = Field(5, ge=1, description="places of the pass key, evenly from start to end; 1: anywhere")


class Ruler(TaskEvaluation):
    """RULER's thirteen tasks."""

    tasks: OrAuto | tuple[str, ...] = Field("auto", description="auto: all that have what they need; or [vt,cwe]")
    squad: OrNone | str = Field("none", min_length=1, description="file of qa_1's questions: SQuAD's JSON")
    hotpotqa: OrNone | str = Field("none", min_length=1, description="file of qa_2's questions: HotpotQA's JSON")


class Cell(NamedTuple):
    """One length, and where the answer stands: a share from 0 to 1, None: anywhere."""

    length: int
    depth: float | None


def wilson_interval(total: float, n: int) -> tuple[float, float]:
    """The 95% interval of a mean of n scores from 0 to 1 whose sum is `total` (Wilson 1927, for a share).

    (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96. For scores between 0 and 1 it is cautious: no
    distribution on [0, 1] with mean p has a larger variance than p (1 - p). Unlike a normal interval it has a width where
    all scores are equal.
    """
    z, p = 1.959963984540054, total / n
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def asked_tasks(
    dataset: TaskDataset | TextDataset,
    *,
    own: OwnTask | None,
    named: Mapping[str, TaskEvaluation],
    learned: tuple[Corpus.Config, ...] = (),
) -> Iterator[tuple[TaskDataset, TaskEvaluation]]:
    """Each task that is asked for, over the text that a run has: its own, and those of `named` (needle, passkey, ruler).

    No value is asked for that occurs in the training text of the `learned` corpora. Raises DataError where a run has no task
    of its own, or no text to hide things in.
    """
    if own is not None:
        if not isinstance(dataset, TaskDataset):
            raise DataError(
                "eval.task: the run was trained on text and has no task of its own; use eval=needle or ruler"
            )
        if isinstance(dataset.task, TokenTask):
            own.check_numbers(dataset.task.config.name)
        yield replace(dataset, learned=learned), own
    for name, config in named.items():
        text = dataset if isinstance(dataset, TextDataset) else dataset.text
        if text is None:
            raise DataError(f"eval.{name}: asks in words, and this run speaks the numbers of {dataset.facts['task']}")
        for settings in _settings(name, config):
            task = SOURCES.get(settings["name"])(SOURCES.config(settings))
            assert isinstance(task, Task)
            yield TaskDataset(task, text.tokenizer, text.facts, text, learned), config


def _settings(name: str, config: TaskEvaluation) -> Iterator[dict[str, Any]]:
    """The settings of each task that an evaluation asks."""
    if not isinstance(config, Ruler):
        yield {"name": f"task/{name}"}
        return
    files = {"qa_1": config.squad, "qa_2": config.hotpotqa}
    for task in ruler_names() if config.tasks == "auto" else config.tasks:
        file = files.get(task)
        if file is None:
            yield {"name": f"task/ruler/{task}"}
        elif file != "none":
            yield {"name": f"task/ruler/{task}", "path": file}
        elif config.tasks != "auto":
            missing = "squad" if task == "qa_1" else "hotpotqa"
            raise DataError(f"eval.ruler.{missing}: {task} reads a file of yours; give its path")


def ruler_names() -> list[str]:
    """RULER's tasks, by their own names."""
    return [name.removeprefix(_RULER) for name in SOURCES.names() if name.startswith(_RULER)]


def cells(config: TaskEvaluation, trained_context: int) -> list[Cell]:
    """Every length with every depth."""
    lengths = auto_lengths(trained_context) if config.lengths == "auto" else tuple(sorted(set(config.lengths)))
    depths = [None] if config.depths == 1 else [i / (config.depths - 1) for i in range(config.depths)]
    return [Cell(length, depth) for length in lengths for depth in depths]


def evaluate_task(
    model: Model,
    dataset: TaskDataset,
    config: TaskEvaluation,
    *,
    trained_context: int,
    device: torch.device,
    precision: Precision,
    progress: Callable[[str, int], Callable[[int], None]] = lambda *_: lambda _: None,
) -> tuple[list[Measurement], list[TaskItem]]:
    """The share of right answers in every cell, and every example with what was answered.

    The examples are those of the test part: a function of task, length, depth and number, so all runs answer the same.
    """
    was_training = model.training
    model.eval()
    measurements: list[Measurement] = []
    items: list[TaskItem] = []
    for cell in cells(config, trained_context):
        try:
            asked = ask(dataset, cell, config.items)
        except DoesNotFit as short:
            measurements.append(_missing(dataset, cell, "does_not_fit", str(short)))
            continue
        except DataError as error:
            measurements.append(_missing(dataset, cell, "failed", str(error)))
            continue
        at = "" if cell.depth is None else f", {cell.depth:.0%} deep"
        advance = progress(f"{dataset.task.label} at {cell.length}{at}", config.items)
        try:
            answered = asked.answer(
                model, device=device, precision=precision, batch_tokens=config.batch_tokens, advance=advance
            )
        except UndefinedBeyondTraining as undefined:
            measurements.append(_missing(dataset, cell, "undefined", str(undefined)))
            continue
        scores = [item.score for item in answered]
        items += answered
        low, high = wilson_interval(sum(scores), len(scores))
        measurements.append(
            Measurement(
                name="accuracy", value=sum(scores) / len(scores), unit="1", low=low, high=high, context=cell.length,
                split="test", protocol=asked.protocol, n_targets=asked.n_targets, axes=_axes(dataset, cell),
                facts={
                    "items": len(scores), "chance": asked.chance, "oracle": asked.oracle, "examples": asked.sha256,
                },
            )
        )  # fmt: skip
    model.train(was_training)
    return measurements, items


class LabelledItems:
    """Examples whose questions stand at labelled places of the sequence."""

    protocol = LABELLED

    def __init__(self, dataset: TaskDataset, cell: Cell, count: int) -> None:
        task = dataset.task
        assert isinstance(task, TokenTask)
        self.dataset, self.cell = dataset, cell
        self.rows = [dataset.row("test", cell.length, (index,), None) for index in range(count)]
        self.n_targets = sum(int((row.targets != IGNORED).sum()) for row in self.rows)
        self.sha256 = _sha256([[row.tokens.tolist(), row.targets.tolist()] for row in self.rows])
        self.chance = _guess(dataset, cell.length)
        self.oracle = float(np.mean([_solved(task, row) for row in self.rows]))

    def answer(self, model: Model, **options: Any) -> list[TaskItem]:
        found = answer_labels(model, self.rows, pad_id=self.dataset.tokenizer.pad_id, **options)
        shares = found.right / found.labels
        return [_item(self.dataset, self.cell, i, float(share)) for i, share in enumerate(shares)]


class GeneratedItems:
    """Examples that are a prompt and an answer to be generated."""

    protocol = GENERATED

    def __init__(self, dataset: TaskDataset, cell: Cell, count: int) -> None:
        self.dataset, self.cell = dataset, cell
        self.n_targets = count
        task = dataset.task
        self.prompts: list[list[int]] = []
        self.room: list[int] = []
        self.wanted: list[tuple[str, ...]] = []
        self.places: list[float | None] = []
        oracle: list[float] = []
        asked: list[Any] = []
        for index in range(count):
            if isinstance(task, TokenTask):
                row = dataset.row("test", cell.length, (index,), None)
                first = int(np.flatnonzero(row.targets != IGNORED)[0])
                answer = row.targets[first:].tolist()
                self.prompts.append(row.tokens[: first + 1].tolist())
                self.room.append(len(answer))
                self.places.append(None)
                self.wanted.append((dataset.tokenizer.decode(answer),))
                asked.append(self.prompts[-1])
                oracle.append(_solved(task, row))
            else:
                assert isinstance(task, TextTask)
                # The depth is part of no key: a cell's example number i has the same words wherever they stand.
                random = generator(task.config.name, "test", cell.length, index)
                example = dataset.example(random, cell.length, "test", depth=cell.depth)
                self.prompts.append(dataset.encoded(example)[0])
                self.room.append(task.new_tokens)
                self.wanted.append(example.answers)
                self.places.append(example.depth)
                asked.append(example.prompt)
                oracle.append(task.score(task.solve(example.prompt), example.answers))
        self.sha256 = _sha256([asked, self.wanted])
        self.oracle = float(np.mean(oracle))
        self.chance = _guess(dataset, cell.length)

    def answer(self, model: Model, **options: Any) -> list[TaskItem]:
        tokenizer, task = self.dataset.tokenizer, self.dataset.task
        said = answer_freely(model, self.prompts, self.room, stop_id=tokenizer.eos_id, **options)
        items = []
        for index, (ids, wanted) in enumerate(zip(said, self.wanted, strict=True)):
            text = tokenizer.decode(ids)
            score = task.score(text, wanted) if isinstance(task, TextTask) else float(text == wanted[0])
            items.append(_item(self.dataset, self.cell, index, score, wanted, text, self.places[index]))
        return items


def ask(dataset: TaskDataset, cell: Cell, count: int) -> LabelledItems | GeneratedItems:
    """The examples of a cell. Raises DoesNotFit, or DataError where they cannot be made."""
    labelled = isinstance(dataset.task, TokenTask) and not dataset.task.generated
    return (LabelledItems if labelled else GeneratedItems)(dataset, cell, count)


def _guess(dataset: TaskDataset, length: int) -> float:
    task = dataset.task
    if isinstance(task, TokenTask):
        return task.guess(length)
    assert isinstance(task, TextTask)
    return task.guess(length, dataset.tools("test"))


def _solved(task: TokenTask, row: Row) -> float:
    """The share of the labelled places that the oracle, which sees the tokens alone, gets right."""
    labelled = row.targets != IGNORED
    last = 1 + int(np.flatnonzero(labelled)[0]) if task.generated else len(row.tokens)
    answers = np.array(task.solve(row.tokens[:last].tolist()))
    return float((answers[labelled] == row.targets[labelled]).mean())


def _sha256(examples: Any) -> str:
    """Of all that a cell asks and wants: runs are compared in pairs of examples where it is the same."""
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()


def _item(
    dataset: TaskDataset,
    cell: Cell,
    index: int,
    score: float,
    wanted: Sequence[str] = (),
    answer: str | None = None,
    place: float | None = None,
) -> TaskItem:
    return TaskItem(
        task=dataset.task.label, context=cell.length, depth=cell.depth, item=index, score=score,
        wanted=tuple(wanted), answer=answer, place=place,
    )  # fmt: skip


def _axes(dataset: TaskDataset, cell: Cell) -> dict[str, Any]:
    return {"task": dataset.task.label} | ({} if cell.depth is None else {"depth": cell.depth})


def _missing(dataset: TaskDataset, cell: Cell, status: str, reason: str) -> Measurement:
    return Measurement(
        name="accuracy", value=None, unit="1", context=cell.length, split="test", status=status, reason=reason,
        axes=_axes(dataset, cell),
    )  # fmt: skip
