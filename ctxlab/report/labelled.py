"""Answers to questions and labels of texts in the terminal: scores beside their baselines, what is taken for what, examples."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from ctxlab.records.schema import Measurement, TaskItem
from ctxlab.report.grid import Grid
from ctxlab.report.results import cell, title

_SCORES = (("exact_match", "f1"), ("accuracy", "macro_f1"))
_SHOWN = 4  # items, evenly from all
_LABELS = 12  # labels up to which their counts are shown
_BASELINES = {"majority": "training's most frequent", "untuned": "before training"}

Scored = tuple[str, Sequence[Measurement], Sequence[TaskItem]]
"""A run's name, its measurements and its items."""


def labelled_rows(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The scores of answers and labels among others."""
    return [m for m in measurements if m.name in ("exact_match", "f1", "macro_f1") or _is_accuracy(m)]


def _is_accuracy(m: Measurement) -> bool:
    return m.name == "accuracy" and not {"task", "objective", "harness"} & m.axes.keys()


def show_labelled(runs: Sequence[Scored], console: Console) -> None:
    """One row a run and one a baseline, what the numbers are; of one run alone also the counts and some of its items."""
    rows = [m for _, measurements, _ in runs for m in labelled_rows(measurements)]
    names = next(pair for pair in _SCORES if any(m.name == pair[1] for m in rows))
    asked = names[0] == "exact_match"
    grid = Grid(["run", *map(title, names)], heading="test questions answered" if asked else "test texts labelled")
    for name, measurements, _ in runs:
        here = labelled_rows(measurements)
        for kind in dict.fromkeys((m.axes.get("baseline", ""), m.axes.get("questions", "")) for m in here):
            found = {m.name: m for m in here if (m.axes.get("baseline", ""), m.axes.get("questions", "")) == kind}
            baseline, questions = kind
            what = name if not questions else f"  {questions} ({found[names[0]].n_targets:,})"
            grid.add(
                [f"  {_BASELINES.get(baseline, baseline)}" if baseline else what]
                + [cell(found.get(one), interval=True) for one in names]
            )
    console.print(grid)
    for line in _notes(rows, asked=asked):
        console.print(Text(line, style="dim"))
    if len(runs) > 1:
        return
    _, measurements, items = runs[0]
    counts = [m for m in measurements if m.name == "examples"]
    if counts:
        _show_counts(counts, console)
    step = max(1, len(items) // _SHOWN)
    for item in items[step // 2 :: step][:_SHOWN]:
        asked_text, *right = item.wanted
        console.print()
        wanted = " | ".join(dict.fromkeys(right)) or "(no answer)"
        parts = (("asked" if asked else "text", asked_text), ("said", item.answer or "(no answer)"), ("wanted", wanted))
        for name, text in parts:
            console.print(Text(f"{name:<8}{text}", style="bold" if name == "said" else ""), soft_wrap=True)


def _show_counts(counts: Sequence[Measurement], console: Console) -> None:
    """How often each label, down, was given each label, across; where there are many, the commonest mistakes."""
    labels = sorted({m.axes["label"] for m in counts} | {m.axes["said"] for m in counts})
    found = {(m.axes["label"], m.axes["said"]): m.value for m in counts}
    console.print()
    if len(labels) <= _LABELS:
        grid = Grid(["label", *labels], heading="texts by label (down) and what was said (across)")
        for label in labels:
            grid.add([label, *(f"{found.get((label, said), 0):,.0f}" for said in labels)])
        console.print(grid)
        return
    wrong = sorted((pair for pair in found if pair[0] != pair[1]), key=lambda pair: (-(found[pair] or 0), pair))
    grid = Grid(["label", "said", "texts"], keys=2, heading=f"the commonest mistakes of {len(labels)} labels")
    for pair in wrong[:_LABELS]:
        grid.add([*pair, f"{found[pair]:,.0f}"])
    console.print(grid)


def _notes(rows: Sequence[Measurement], *, asked: bool) -> list[str]:
    """What the numbers are, each once."""
    lines = []
    for m in rows:
        if m.axes.get("baseline") == "majority" or m.axes.get("questions"):
            continue
        cut = m.facts.get("cut", 0)
        if asked:
            lines.append(
                f"{m.split} split, {m.n_targets:,} questions of {m.n_docs:,} texts held out; {m.protocol}; SQuAD's rules; "
                "± is 95% over texts"
            )
            lines += [f"{cut:,} prompts were cut to fit the context"] if cut else []
        else:
            lines.append(
                f"{m.split} split, {m.n_docs:,} texts; {m.protocol}; ± is 95%: Wilson's for accuracy, resampled for macro f1"
            )
            lines += [f"{cut:,} texts were cut to fit the context"] if cut else []
    return list(dict.fromkeys(lines))
