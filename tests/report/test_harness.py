"""The table of a harness's tasks, as text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from ctxlab.records.schema import Measurement
from ctxlab.report.harness import harness_notes, harness_table
from ctxlab.report.screens import difference_table
from ctxlab.report.tables import show_evaluation
from tests.records.builders import make_run, result, scores
from tests.report.builders import text_of, written


def row(
    task: str, metric: str, value: float, half: float | None, *, name: str = "accuracy", **axes: Any
) -> Measurement:
    bounds = {} if half is None else {"low": value - half, "high": value + half}
    facts = {"num_fewshot": 5, "max_length": 256, "requests": 9501, "cut_requests": 0, "shortened_answers": 0}
    return result(
        name, value, None, n_docs=2376, protocol="lm-evaluation-harness 1.2.3", facts=facts, **bounds,
        axes={"harness": task, "metric": metric, "filter": "none"} | axes,
    )  # fmt: skip


ROWS = [
    row("arc_easy", "acc", 0.31164, 0.0186),
    row("gsm8k", "exact_match", 0.0, None, filter="strict-match"),
    row("wikitext", "word_perplexity", 3940.6, 431.98, name="perplexity"),
    result(
        "score", None, None, status="no_document", reason="its data are not on this machine",
        protocol="lm-evaluation-harness 1.2.3", axes={"harness": "piqa"},
    ),
]  # fmt: skip


def test_the_table_of_tasks() -> None:
    assert text_of(harness_table(ROWS)) == (
        "task      metric                     items  shots             score\n"
        "arc_easy  acc                        2,376      5      0.312 ±0.019\n"
        "gsm8k     exact_match, strict-match  2,376      5             0.000\n"
        "wikitext  word_perplexity            2,376      5  3.94e+03 ±431.98\n"
        "piqa      -                              -      -           no text"
    )


def test_runs_stand_side_by_side() -> None:
    rows = [row("arc_easy", "acc", value, 0.02, run=run) for run, value in (("a", 0.25), ("b", 0.5))]
    rows.append(row("piqa", "acc", 0.5, None, run="b"))
    assert text_of(harness_table(rows)) == (
        "task      metric  items  shots             a             b\n"
        "arc_easy  acc     2,376      5  0.250 ±0.020  0.500 ±0.020\n"
        "piqa      acc     2,376      5             -         0.500"
    )


def test_the_notes_say_what_the_numbers_are_and_what_gave_way() -> None:
    limited = row("boolq", "acc", 0.5, 0.1, limit=10, run="a")
    limited = limited.model_copy(update={"facts": limited.facts | {"cut_requests": 12, "shortened_answers": 3}})
    assert harness_notes([*ROWS, limited, limited]) == [
        "lm-evaluation-harness 1.2.3, requests of at most 256 tokens; ± is 95%: 1.96 standard errors, "
        "of perplexities over documents",
        "of each task the first 10 items only: comparable with nothing else",
        "piqa: its data are not on this machine",
        "boolq (a): 12 of 9,501 contexts were longer and lost their beginning",
        "boolq (a): 3 of 9,501 answers ended at the last position there is",
    ]
    assert harness_notes(ROWS[3:]) == ["piqa: its data are not on this machine"]


def test_an_evaluation_by_a_harness_alone_has_no_table_of_lengths(tmp_path: Path) -> None:
    parent, run = make_run(tmp_path), make_run(tmp_path)
    run.measure(*ROWS)
    console = Console(width=100, file=io.StringIO(), color_system=None)
    show_evaluation(run, [parent], console)
    said = written(console)
    assert "arc_easy" in said
    assert "context" not in said.split("run ")[0].replace("contexts", "")
    run.measure(*scores(256, 3.5))
    show_evaluation(run, [parent], console)
    assert "context  trained" in written(console)


def test_a_difference_names_the_task(tmp_path: Path) -> None:
    first, second = make_run(tmp_path), make_run(tmp_path)
    first.measure(ROWS[0], ROWS[1])
    second.measure(row("arc_easy", "acc", 0.41164, 0.0186))
    table = text_of(difference_table(first, second), width=120).splitlines()
    assert [" ".join(line.split()[:-3]) for line in table[2:]] == [
        "accuracy, arc_easy acc", "accuracy, gsm8k exact_match, strict-match",
    ]  # fmt: skip
    assert [line.split()[-1] for line in table[2:]] == ["+0.100", "-"]
