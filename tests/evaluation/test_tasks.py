"""Scores on tasks: of models whose answers are known beforehand, cell by cell; and the interval of a share."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ctxlab.data.corpora.text import Text
from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import TokenTask
from ctxlab.data.tasks.dataset import TaskDataset, prepare_task
from ctxlab.data.tokenizers.ids import Ids
from ctxlab.data.windows import IGNORED
from ctxlab.errors import DataError, IncompatibleError
from ctxlab.evaluation.tasks import (
    GENERATED,
    LABELLED,
    Cell,
    GeneratedItems,
    NeedleGrid,
    OwnTask,
    Ruler,
    TaskEvaluation,
    ask,
    asked_tasks,
    cells,
    evaluate_task,
    wilson_interval,
)
from ctxlab.records.schema import Measurement, TaskItem
from tests.data.tasks.tools import needles
from tests.model.builders import build

TOKEN_TASKS = [name for name in SOURCES.names() if issubclass(SOURCES.get(name), TokenTask)]
SMALL: dict[str, dict[str, Any]] = {"task/mqar": {"pairs": (3,)}, "task/induction": {"shortest": 3, "longest": 6}}


class Says(nn.Module):
    """Stands for a Transformer: what comes behind each token, by a rule of all tokens up to it."""

    prefix = False
    task_head = None

    def __init__(self, vocab_size: int, rule: Callable[[list[int]], int]) -> None:
        super().__init__()
        self.vocab_size, self.rule = vocab_size, rule
        self.prompts: list[list[int]] = []
        self.embedding = nn.Embedding(vocab_size, 1)  # says where it is

    def new_cache(self) -> SimpleNamespace:
        return SimpleNamespace()

    def hidden(self, tokens: Tensor, *, lengths: Tensor | None = None, cache: Any = None) -> Tensor:
        before = getattr(cache, "read", None)
        whole = tokens if before is None else torch.cat([before, tokens], dim=1)
        if cache is not None:
            if before is None:
                self.prompts += tokens.tolist()
            cache.read = whole
        said = [[self.rule(row[: n + 1]) for n in range(len(row))] for row in whole.tolist()]
        logits = torch.nn.functional.one_hot(torch.tensor(said), self.vocab_size).float()
        return logits[:, -tokens.shape[1] :]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def numbers(name: str, **settings: Any) -> TaskDataset:
    return prepare_task(SOURCES.get(name).Config(name=name, **settings), Ids.Config())


def knowing(data: TaskDataset) -> Says:
    """Says what the oracle does, and 0 where that has no answer."""

    def rule(tokens: list[int]) -> int:
        task = data.task
        assert isinstance(task, TokenTask)
        if task.generated and task.vocab_size - 2 not in tokens:
            return 0
        try:
            answer = task.solve(tokens)[len(tokens) - 1]
        except (IndexError, KeyError):  # half an expression
            return 0
        return answer if 0 <= answer < task.vocab_size else 0

    return Says(data.tokenizer.vocab_size, rule)


def constant(data: TaskDataset, number: int) -> Says:
    return Says(data.tokenizer.vocab_size, lambda _: number)


def evaluate(
    model: Any, data: TaskDataset, *, trained: int = 16, config: TaskEvaluation | None = None, **settings: Any
) -> tuple[list[Measurement], list[TaskItem]]:
    return evaluate_task(
        model,
        data,
        config or OwnTask(**settings),
        trained_context=trained,
        device=torch.device("cpu"),
        precision="fp32",
    )


# Cells


def test_cells_are_lengths_by_depths() -> None:
    assert cells(OwnTask(lengths=(64, 16, 64)), 8) == [Cell(16, None), Cell(64, None)]
    assert cells(NeedleGrid(lengths=(8,), depths=3), 8) == [Cell(8, 0.0), Cell(8, 0.5), Cell(8, 1.0)]
    assert cells(NeedleGrid(lengths=(8, 9), depths=2), 8) == [Cell(8, 0.0), Cell(8, 1.0), Cell(9, 0.0), Cell(9, 1.0)]
    assert [cell.length for cell in cells(OwnTask(), 64)] == [32, 64, 128, 256, 512]
    with pytest.raises(ValidationError):
        OwnTask(items=1)


# Tasks in numbers


@pytest.mark.parametrize("name", TOKEN_TASKS)
def test_who_knows_the_answers_is_always_right(name: str) -> None:
    data = numbers(name, **SMALL.get(name, {}))
    rows, items = evaluate(knowing(data), data, lengths=(12, 21), items=5)
    assert [(m.context, m.value, m.status) for m in rows] == [(12, 1.0, "done"), (21, 1.0, "done")]
    generated = name in ("task/copy", "task/reverse", "task/repeat")
    for m in rows:
        assert (m.name, m.split, m.axes) == ("accuracy", "test", {"task": name.removeprefix("task/")})
        assert m.protocol == (GENERATED if generated else LABELLED)
        assert m.facts["items"] == 5
        assert m.facts["oracle"] == 1.0
        assert m.facts["chance"] == data.task.guess(m.context)  # type: ignore[attr-defined]
        assert (m.low, m.high) == pytest.approx((5 / (5 + 1.959963984540054**2), 1.0), abs=1e-12)
        labels = [data.row("test", m.context, (index,), None).targets for index in range(5)]  # type: ignore[arg-type]
        assert m.n_targets == (5 if generated else sum(int((targets != IGNORED).sum()) for targets in labels))
    assert [(item.context, item.item, item.score) for item in items] == [
        (n, i, 1.0) for n in (12, 21) for i in range(5)
    ]


def test_who_says_one_number_is_right_where_that_is_the_answer() -> None:
    """Three values of 4 to 7 in each example: 5 is one of them in some, and never twice."""
    data = numbers("task/mqar", vocab_size=8, pairs=(3,))
    rows, items = evaluate(constant(data, 5), data, lengths=(12,), items=40)
    told = [set(data.row("test", 12, (index,), None).tokens[1:6:2].tolist()) for index in range(40)]
    expected = [1 / 3 if 5 in values else 0.0 for values in told]
    assert [item.score for item in items] == expected
    assert rows[0].value == pytest.approx(sum(expected) / 40, abs=1e-12)
    assert 0.15 < sum(expected) / 40 < 1 / 3
    assert (rows[0].low, rows[0].high) == pytest.approx(wilson_interval(sum(expected), 40), abs=1e-12)
    assert rows[0].n_targets == 120
    assert {item.answer for item in items} == {None}


def test_an_answer_is_right_as_a_whole() -> None:
    """Copies of 3 symbols of 2: who says 1 and the end in time is right where all three are 1."""
    data = numbers("task/copy", symbols=2)
    says = Says(data.tokenizer.vocab_size, lambda tokens: 3 if len(tokens) == 7 else 1)
    rows, items = evaluate(says, data, lengths=(7,), items=60)
    prompts = [data.row("test", 7, (index,), None).tokens[:4].tolist() for index in range(60)]
    assert says.prompts == prompts, "nothing but the prompt is shown"
    right = [prompt == [1, 1, 1, 2] for prompt in prompts]
    assert 0 < sum(right) < 60
    assert [item.score for item in items] == [float(one) for one in right]
    assert rows[0].value == pytest.approx(sum(right) / 60)
    assert {item.answer for item in items} == {"1 1 1 3 "}
    assert Counter(item.wanted for item in items)[("1 1 1 3 ",)] == sum(right)
    assert all(item.score == 0 for item in evaluate(constant(data, 1), data, lengths=(7,), items=60)[1]), (
        "without its end"
    )
    stops = Says(data.tokenizer.vocab_size, lambda tokens: data.tokenizer.eos_id)
    assert {item.answer for item in evaluate(stops, data, lengths=(7,), items=4)[1]} == {""}


def test_what_is_too_short_says_so_and_the_other_lengths_stay() -> None:
    data = numbers("task/mqar", pairs=(1, 3))
    rows, items = evaluate(knowing(data), data, trained=12, items=4)
    assert [(m.context, m.status) for m in rows] == [
        (6, "does_not_fit"),
        (12, "done"),
        (24, "done"),
        (48, "done"),
        (96, "done"),
    ]
    assert rows[0].value is None
    assert rows[0].reason.startswith("mqar does not fit in 6 tokens")
    assert {item.context for item in items} == {12, 24, 48, 96}


def test_what_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctxlab.data.tasks.listops._TRIES", 2000)
    data = numbers("task/listops", depth=2, arguments=2)
    rows, _ = evaluate(knowing(data), data, lengths=(4, 64), items=2)
    assert [(m.context, m.status) for m in rows] == [(4, "done"), (64, "failed")]
    assert rows[1].reason.startswith("listops: 2000 drawn expressions of depth 2 and none with 16 to 64 tokens")


@pytest.mark.parametrize("name", ["task/mqar", "task/copy"])
def test_a_scheme_that_ends_is_undefined_beyond_its_end(name: str) -> None:
    data = numbers(name, **SMALL.get(name, {}))
    model = build("learned", context=16, vocab_size=data.tokenizer.vocab_size).train()
    rows, items = evaluate(model, data, lengths=(13, 16, 40), items=3)
    assert [(m.context, m.status) for m in rows] == [(13, "done"), (16, "done"), (40, "undefined")]
    assert "learned positions are defined up to 15 only" in rows[2].reason
    assert {item.context for item in items} == {13, 16}
    assert model.training, "left as it was"


@pytest.mark.parametrize("name", TOKEN_TASKS)
def test_every_run_answers_the_same_examples(name: str) -> None:
    settings = SMALL.get(name, {})
    one, again = numbers(name, **settings), numbers(name, **settings, examples=7, workers=1)
    first, _ = evaluate(knowing(one), one, lengths=(12, 24), items=3)
    other, _ = evaluate(constant(again, 1), again, trained=99, lengths=(24,), items=3, batch_tokens=1)
    more, _ = evaluate(constant(again, 1), again, lengths=(24,), items=4)
    assert first[1].facts["examples"] == other[0].facts["examples"]
    assert len({m.facts["examples"] for m in (*first, *more)}) == 3


def test_other_settings_are_other_examples() -> None:
    found = []
    for settings in ({}, {"pairs": (2,)}, {"power": 0.5}, {"vocab_size": 64}):
        data = numbers("task/mqar", **{"pairs": (3,), **settings})
        found.append(evaluate(constant(data, 1), data, lengths=(12,), items=3)[0][0].facts["examples"])
    assert len(set(found)) == 4


# Tasks in words


def reading(data: TaskDataset) -> Says:
    """Looks the thing that is asked for up in the text, says its number byte by byte, and then eos."""
    tokenizer = data.tokenizer

    def rule(tokens: list[int]) -> int:
        text = tokenizer.decode(tokens[1:])
        question = re.search(r"\nThe number of the (\w+) is( \d*)?$", text)
        told = question and re.search(rf"The number of the {question[1]} is( \d+)\.", text)
        if question is None or told is None:
            return 0
        left = told[1].removeprefix(question[2] or "")
        return tokenizer.encode(left)[0] if left else tokenizer.eos_id

    return Says(tokenizer.vocab_size, rule)


def test_a_needle_is_found_at_every_depth_in_the_same_words() -> None:
    data = needles()
    says = reading(data)
    rows, items = evaluate(says, data, config=NeedleGrid(lengths=(40, 400), depths=3, items=3))
    assert [(m.context, m.axes["depth"], m.status) for m in rows] == [
        *((40, depth, "does_not_fit") for depth in (0.0, 0.5, 1.0)),
        *((400, depth, "done") for depth in (0.0, 0.5, 1.0)),
    ]
    assert [m.value for m in rows[3:]] == [1.0] * 3
    assert {(m.protocol, m.facts["oracle"], m.n_targets) for m in rows[3:]} == {(GENERATED, 1.0, 3)}
    assert len({m.facts["examples"] for m in rows[3:]}) == 3
    assert all(item.place == pytest.approx(item.depth, abs=0.2) for item in items)
    answers = {(item.depth, item.item): item.wanted for item in items}
    assert len(answers) == 9
    for index in range(3):
        assert len({answers[depth, index] for depth in (0.0, 0.5, 1.0)}) == 1
    texts = [data.tokenizer.decode(prompt[1:]) for prompt in says.prompts]
    for answer in {wanted[0] for wanted in answers.values()}:
        first, second, third = sorted(
            text.index(f"is {answer}.") / len(text) for text in texts if f"is {answer}." in text
        )
        assert 0 < first < 0.15 < 0.3 < second < 0.6 < 0.75 < third < 1
    assert all(len(prompt) <= 400 for prompt in says.prompts)


def test_who_says_nothing_of_it_finds_no_needle() -> None:
    data = needles()
    rows, items = evaluate(constant(data, 65), data, config=NeedleGrid(lengths=(200,), depths=1, items=3))
    assert (rows[0].value, rows[0].axes) == (0.0, {"task": "needle"})
    assert {(item.depth, item.score) for item in items} == {(None, 0.0)}
    assert len({item.place for item in items if item.place is not None and 0 <= item.place <= 1}) == 3


# What is asked


def test_no_value_is_asked_for_that_the_model_has_read_in_any_of_its_texts(tmp_path: Path) -> None:
    """Two corpora, neither of them the haystack's, have all numbers of three digits between them but those of 700 to 799."""
    learned = []
    for name, has in (("first", range(100, 600)), ("second", [*range(600, 700), *range(800, 1000)])):
        (tmp_path / name).mkdir()
        for document in range(30):  # some are for validation and test: each has all of them
            words = [f"document {chr(97 + document)}", *map(str, has)]
            (tmp_path / name / f"{document}.txt").write_text("\n".join(words) + "\n")
        learned.append(Text.Config(path=str(tmp_path / name)))
    data = needles(digits=3)
    assert data.text is not None
    data = replace(data, text=replace(data.text, cache=tmp_path / "cache"))
    own = OwnTask(lengths=(300,), items=20)

    def firsts(learned: Sequence[Text.Config]) -> set[str]:
        ((found, _),) = asked_tasks(data, own=own, named={}, learned=tuple(learned))
        asked = ask(found, Cell(300, None), 20)
        assert isinstance(asked, GeneratedItems)
        return {wanted[0][0] for wanted in asked.wanted}

    assert firsts(learned) == {"7"}
    assert firsts(learned[:1]) <= set("6789")
    assert len(firsts([])) > 4


def test_a_run_is_asked_its_own_task_and_those_that_its_text_allows() -> None:
    own, grid = OwnTask(), NeedleGrid()
    data = numbers("task/copy")
    assert [(one.task.config.name, config) for one, config in asked_tasks(data, own=own, named={})] == [
        ("task/copy", own)
    ]
    text = needles(digits=7).text
    assert text is not None
    ((found, config),) = asked_tasks(text, own=None, named={"needle": grid})
    assert (found.task.config, config) == (SOURCES.get("task/needle").Config(name="task/needle"), grid)
    assert found.tokenizer is text.tokenizer
    both = list(asked_tasks(needles(digits=7), own=own, named={"needle": grid}))
    assert [getattr(one.task.config, "digits") for one, _ in both] == [7, 5], "its own has the run's settings"  # noqa: B009


def test_what_a_run_cannot_be_asked_is_one_line() -> None:
    text = needles().text
    assert text is not None
    with pytest.raises(DataError, match=r"eval.task: the run was trained on text and has no task of its own"):
        list(asked_tasks(text, own=OwnTask(), named={}))
    with pytest.raises(DataError, match=r"eval.needle: asks in words, and this run speaks the numbers of task/copy"):
        list(asked_tasks(numbers("task/copy"), own=None, named={"needle": NeedleGrid()}))
    with pytest.raises(
        IncompatibleError, match=r"eval.task.depths: task/copy has no depth to choose; the nearest valid"
    ):
        list(asked_tasks(numbers("task/copy"), own=OwnTask(depths=2), named={}))
    with pytest.raises(DataError, match=r"eval.ruler.squad: qa_1 reads a file of yours; give its path"):
        list(asked_tasks(text, own=None, named={"ruler": Ruler(tasks=("qa_1",))}))


# The interval


@pytest.mark.parametrize(
    ("total", "n", "low", "high"),
    [
        # (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n) with z^2 = 3.8414588
        (0, 10, 0.0, 0.2775328),  # z^2 / (n + z^2)
        (10, 10, 0.7224672, 1.0),
        (8, 10, 0.4901625, 0.9433178),
        (1, 2, 0.0945312, 0.9054688),  # 1/2 -+ z / 2 sqrt(n + z^2)
        (50, 100, 0.4038315, 0.5961685),
    ],
)
def test_wilsons_interval_by_hand(total: float, n: int, low: float, high: float) -> None:
    assert wilson_interval(total, n) == pytest.approx((low, high), abs=2e-7)


@pytest.mark.parametrize(("total", "n"), [(0, 3), (1, 3), (5, 64), (17, 64), (64, 64), (12.5, 40), (1999, 2000)])
def test_wilsons_interval_is_where_the_score_test_does_not_refuse(total: float, n: int) -> None:
    """The p0 with |p - p0| = 1.96 sqrt(p0 (1 - p0) / n), found by halving."""
    p, z = total / n, 1.959963984540054

    def excess(candidate: float) -> float:
        return abs(p - candidate) - z * math.sqrt(candidate * (1 - candidate) / n)

    def border(outside: float) -> float:
        if excess(outside) < 0 or outside == p:
            return outside
        inside = min(max(p, 1e-12), 1 - 1e-12)
        for _ in range(200):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if excess(middle) > 0 else (outside, middle)
        return outside

    assert wilson_interval(total, n) == pytest.approx((border(0.0), border(1.0)), abs=1e-9)
