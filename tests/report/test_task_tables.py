"""Scores on tasks in tables, maps and pictures, from rows made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ctxlab.records.run import Run
from ctxlab.records.schema import Measurement, TaskItem
from ctxlab.report.task_tables import (
    compared_tasks,
    depth_map,
    length_grid,
    map_figure,
    save_task_maps,
    show_tasks,
    task_notes,
    task_rows,
)
from tests.records.builders import make_run, result, scores
from tests.report.builders import text_of

FACTS = {"items": 64, "chance": 0.25, "oracle": 1.0, "examples": "aa"}


def score(
    task: str, context: int, value: float | None, depth: float | None = None, half: float = 0.1, **fields: Any
) -> Measurement:
    axes = {"task": task} | ({} if depth is None else {"depth": depth})
    ends = {} if value is None else {"low": max(0.0, value - half), "high": min(1.0, value + half)}
    return result(
        "accuracy", value, context,
        **{"axes": axes, "facts": {} if value is None else FACTS, "protocol": "labelled places", **ends, **fields},
    )  # fmt: skip


def short(task: str, context: int, depth: float | None = None) -> Measurement:
    reason = f"{task} does not fit in {context} tokens"
    return score(task, context, None, depth, status="does_not_fit", reason=reason, protocol="")


def test_a_line_a_task_with_half_of_its_interval_and_why_there_is_none() -> None:
    rows = [
        score("mqar", 128, 0.5),
        short("mqar", 64),
        score("copy", 64, 1.0, half=0.3),
        score("mqar", 2048, 0.123, half=0.02),
    ]
    assert text_of(length_grid(rows)).splitlines() == [
        "share of right answers by length",
        "task            64           128            2k",
        "mqar  does not fit  0.500 ±0.100  0.123 ±0.020",
        "copy  1.000 ±0.150             -             -",
    ]


def test_depths_down_lengths_across_then_their_mean_and_the_least() -> None:
    rows = [
        *(score("needle", 256, value, depth) for value, depth in ((1.0, 0.0), (0.25, 0.5), (0.75, 1.0))),
        *(short("needle", 64, depth) for depth in (0.0, 0.5, 1.0)),
        score("needle", 1024, 0.5, 0.5),
        score("needle", 1024, None, 0.0, status="undefined", reason="the table has 256 rows"),
    ]
    lines = text_of(depth_map(rows, heading="needle")).splitlines()
    assert lines[0] == "needle: share of right answers by depth and length"
    assert [line.split() for line in lines[1:]] == [
        ["depth", "64", "256", "1k"],
        ["0%", "does", "not", "fit", "1.00", "undefined"],
        ["50%", "does", "not", "fit", "0.25", "0.50"],
        ["100%", "does", "not", "fit", "0.75", "-"],
        ["mean", "-", "0.67", "0.50"],
        ["least", "-", "0.25", "0.50"],
    ]


@pytest.mark.parametrize("value", [0.0, 0.16, 1 / 6, 0.5, 0.99, 1.0])
def test_every_score_has_a_colour_that_its_number_can_be_read_on(value: float) -> None:
    cell = depth_map([score("needle", 64, value, 0.0)], heading="needle").renderables[1].columns[1]._cells[0]  # type: ignore[union-attr]
    ink, _, ground = str(cell.style).partition(" on ")  # type: ignore[union-attr]

    def light(colour: str) -> float:
        """Relative luminance, WCAG 2.1."""
        channels = {"black": (0, 0, 0), "white": (255, 255, 255)}.get(colour) or tuple(
            int(colour[n : n + 2], 16) for n in (1, 3, 5)
        )
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in channels)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((light(ink), light(ground)), reverse=True)
    assert (bright + 0.05) / (dark + 0.05) >= 4.5


def test_what_the_scores_are_stands_below_once() -> None:
    rows = [
        score("mqar", 64, 0.5, facts={**FACTS, "chance": 0.0625}),
        score("mqar", 128, 0.5, facts={**FACTS, "items": 32, "chance": 0.125}),
        score("copy", 128, 0.0, protocol="greedy generation", facts={**FACTS, "chance": 2.0**-20, "oracle": 0.98}),
        short("mqar", 8), short("mqar", 8), short("copy", 2),
    ]  # fmt: skip
    assert task_notes(rows) == [
        "labelled places: 32 to 64 examples a cell, the same for every run with these settings; ± is 95% (Wilson)",
        "greedy generation: 64 examples a cell, the same for every run with these settings; ± is 95% (Wilson)",
        "mqar: chance 0.062 to 0.12, oracle 1",
        "copy: chance 9.5e-07, oracle 0.98",
        "does not fit at 8: mqar does not fit in 8 tokens",
        "does not fit at 2: copy does not fit in 2 tokens",
    ]


def test_one_run_shows_lengths_then_a_map_a_task_then_the_notes() -> None:
    rows = [score("copy", 64, 0.5), score("needle", 64, 0.5, 0.0), score("needle", 64, 0.5, 1.0), *scores(64, 2.0)]
    assert [m.axes["task"] for m in task_rows(rows)] == ["copy", "needle", "needle"]
    console = Console(width=80, file=__import__("io").StringIO(), color_system=None)
    show_tasks(rows, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    heads = [n for n, line in enumerate(lines) if "share of right answers" in line]
    assert [lines[n].rstrip() for n in heads] == [
        "share of right answers by length", "needle: share of right answers by depth and length",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[heads[0] + 2 : heads[1]]] == ["copy"]


def answers(task: str, context: int, right: list[float], depth: float | None = None) -> list[TaskItem]:
    return [TaskItem(task=task, context=context, depth=depth, item=n, score=one) for n, one in enumerate(right)]


def test_runs_side_by_side_differ_in_pairs_over_the_same_examples() -> None:
    first = ("rope", [score("copy", 64, 0.5), short("copy", 2)], answers("copy", 64, [1, 1, 0, 0]))
    second = ("alibi", [score("copy", 64, 0.75), score("copy", 128, 0.25)],
              [*answers("copy", 64, [1, 1, 1, 0]), *answers("copy", 128, [0, 0, 0, 1])])  # fmt: skip
    (grid,) = compared_tasks([first, second])
    # differences 0, 0, 1, 0: mean 1/4, standard error sqrt(3/16 * 4/3 / 4) = 1/4, t(0.975, 3) = 3.182446
    half = 3.182446305 / 4
    assert text_of(grid).splitlines() == [
        "copy: share of right answers by length",
        "run               2                     64    128",
        "rope   does not fit                  0.500      -",
        f"alibi             -  0.750 (+0.250 ±{half:.3f})  0.250",
    ]


def test_depths_are_one_score_and_pairs_stay_in_their_depth() -> None:
    rows = [score("needle", 64, 0.5, depth) for depth in (0.0, 1.0)]
    first = ("a", rows, [*answers("needle", 64, [1, 0], 0.0), *answers("needle", 64, [0, 1], 1.0)])
    second = ("b", rows, [*answers("needle", 64, [1, 0], 1.0), *answers("needle", 64, [0, 1], 0.0)])
    grid = compared_tasks([first, second])[0]
    assert grid.rows[0] == ["a", "0.500"]
    # differences -1, 1, 1, -1: standard error sqrt(4/3 / 4)
    assert grid.rows[1] == ["b", f"0.500 (+0.000 ±{3.182446305 * math.sqrt(1 / 3):.3f})"]


def test_other_examples_are_not_compared() -> None:
    first = ("a", [score("mqar", 64, 0.5)], answers("mqar", 64, [1, 0]))
    other = ("b", [score("mqar", 64, 0.5, facts={**FACTS, "examples": "bb"})], answers("mqar", 64, [1, 0]))
    fewer = ("c", [score("mqar", 64, 1.0)], answers("mqar", 64, [1]))
    (grid,) = compared_tasks([first, other, fewer])
    assert [row[1] for row in grid.rows] == ["0.500", "0.500 (other examples)", "1.000 (other examples)"]


def test_a_table_a_task_and_none_where_no_task_was_asked() -> None:
    rows = [score("mqar", 64, 0.5), score("copy", 64, 0.5)]
    items = [*answers("mqar", 64, [1, 0]), *answers("copy", 64, [1, 0])]
    assert [grid.heading.split(":")[0] for grid in compared_tasks([("a", rows, items)])] == ["mqar", "copy"]
    assert compared_tasks([("a", scores(64, 2.0), [])]) == []


# Pictures


def with_maps(root: Path, name: str = "rope", *, low: float = 0.0) -> Run:
    run = make_run(root, config={"position": {"name": name}})
    for context in (128, 256, 512, 1024):
        for step in range(5):
            depth = step / 4
            value = max(low, 1 - (context / 1024) * depth)
            run.measure(score("needle", context, value, depth, half=0.04))
    for step in range(5):
        run.measure(short("needle", 64, step / 4))
    return run


def test_a_picture_of_one_run_and_of_two(tmp_path: Path) -> None:
    runs = [with_maps(tmp_path / "runs"), with_maps(tmp_path / "runs", "alibi", low=0.3)]
    for number in (1, 2):
        path = tmp_path / f"{number}.png"
        assert save_task_maps(runs[:number], path) == path
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    plain = make_run(tmp_path / "runs")
    plain.measure(*scores(256, 2.0), score("copy", 256, 0.5))
    assert save_task_maps([plain], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_the_map_holds_every_cell_with_its_number(tmp_path: Path) -> None:
    rows = [
        {"map": "needle, rope", "length": 128, "depth": 0, "score": 0.5, "text": "0.50", "interval": "0.40-0.60"},
        {"map": "needle, rope", "length": 64, "depth": 0, "score": None, "text": "does not fit", "interval": ""},
    ]
    drawn = map_figure(rows).to_dict()
    assert drawn["data"]["values"] == rows
    layers = drawn["spec"]["layer"]
    coloured = next(layer for layer in layers if layer["encoding"].get("color", {}).get("field") == "score")
    assert coloured["encoding"]["color"]["scale"]["domain"] == [0, 1]
    assert {layer["encoding"]["text"]["field"] for layer in layers if "text" in layer["encoding"]} == {
        "text",
        "interval",
    }
    assert {layer["transform"][0]["filter"] for layer in layers} == {"datum.score != null", "datum.score == null"}
