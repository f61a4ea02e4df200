"""Answers and labels in the terminal: each score beside its baselines, what is taken for what, and some of the items."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from ctxlab.records.schema import Measurement, TaskItem
from ctxlab.report.labelled import Scored, labelled_rows, show_labelled


def shown(*runs: Scored) -> list[str]:
    console = Console(width=110, file=io.StringIO(), color_system=None, highlight=False, _environ={})
    show_labelled(runs, console)
    assert isinstance(console.file, io.StringIO)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def row(name: str, value: float, low: float = 0.0, **more: Any) -> Measurement:
    common = {"unit": "1", "split": "test", "protocol": "extractive", "n_targets": 40, "n_docs": 8, "context": 64}
    return Measurement(name=name, value=value, low=low, high=2 * value - low, **{**common, **more})


ANSWERED = [
    row("exact_match", 0.5, 0.4),
    row("f1", 0.6, 0.5, facts={"cut": 3}),
    row("exact_match", 0.7, 0.6, axes={"questions": "answerable"}, n_targets=30),
    row("f1", 0.8, 0.7, axes={"questions": "answerable"}, n_targets=30),
    row("exact_match", 0.1, axes={"baseline": "majority"}),
    row("f1", 0.2, axes={"baseline": "majority"}),
]


def item(number: int, answer: str, *wanted: str) -> TaskItem:
    return TaskItem(task="qa", context=64, item=number, score=1.0, wanted=wanted, answer=answer)


def test_a_run_stands_above_its_parts_and_baselines() -> None:
    items = [item(0, "", "Who?"), item(1, "Ann", "Who is it?", "Ann", "Ann", "Anna")]
    lines = shown(("this one", ANSWERED, items))
    assert "this one 0.500 ±0.100 0.600 ±0.100" in lines
    assert "answerable (30) 0.700 ±0.100 0.800 ±0.100" in lines
    assert "training's most frequent 0.100 ±0.100 0.200 ±0.200" in lines
    assert any("test split, 40 questions of 8 texts held out; extractive; SQuAD's rules" in line for line in lines)
    assert "3 prompts were cut to fit the context" in lines
    assert lines[-7:] == [
        "asked Who?", "said (no answer)", "wanted (no answer)", "", "asked Who is it?", "said Ann", "wanted Ann | Anna",
    ]  # fmt: skip


def test_several_runs_have_a_row_each_and_no_items() -> None:
    lines = shown(("a", ANSWERED[:2], [item(0, "x", "Who?", "y")]), ("b", ANSWERED[:2], []))
    assert [line for line in lines if line.startswith(("a ", "b "))] == [
        f"{name} 0.500 ±0.100 0.600 ±0.100" for name in ("a", "b")
    ]
    assert not any(line.startswith("asked") for line in lines)


def counts(found: dict[tuple[str, str], int]) -> list[Measurement]:
    return [row("accuracy", 0.9), row("macro_f1", 0.8)] + [
        row("examples", value, axes={"label": label, "said": said}) for (label, said), value in found.items()
    ]


def test_labels_are_shown_with_what_they_were_taken_for() -> None:
    lines = shown(("this one", counts({("bad", "bad"): 5, ("bad", "good"): 2, ("good", "good"): 1200}), []))
    assert "label bad good" in lines
    assert "bad 5 2" in lines
    assert "good 0 1,200" in lines


def test_of_many_labels_the_commonest_mistakes_are_shown() -> None:
    found = {(f"l{n:02}", f"l{n:02}"): 9 for n in range(20)} | {("l03", "l04"): 7, ("l05", "l01"): 8}
    lines = shown(("this one", counts(found), []))
    assert "the commonest mistakes of 20 labels" in lines
    start = lines.index("label said texts")
    assert lines[start + 1 : start + 3] == ["l05 l01 8", "l03 l04 7"]


def test_scores_of_tasks_and_objectives_are_none_of_these() -> None:
    others = [row("accuracy", 0.5, axes={"task": "mqar"}), row("accuracy", 0.5, axes={"objective": "masked"})]
    others.append(row("accuracy", 0.5, axes={"harness": "arc_easy"}))
    assert labelled_rows(others) == []
    assert labelled_rows([*others, *ANSWERED]) == ANSWERED
