"""What is printed of every way of scoring, of several runs in pairs, and of what context was worth."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ctxlab.evaluation.perplexity import DocumentScores
from ctxlab.records.schema import DocumentSums, Measurement
from ctxlab.report.ways import context_notes, position_grid, show_context_use, side_by_side, way_text, ways
from tests.records.builders import make_run, result
from tests.report.builders import text_of, written


def nats(value: float, context: int, run: str, *, less: float | None = None, **axes: Any) -> Measurement:
    facts = (
        {} if less is None else {"compared_with": "a", "less": less, "less_low": less - 0.01, "less_high": less + 0.01}
    )
    return result(
        "nats_per_token", value, context, low=value - 0.05, high=value + 0.05, axes={"run": run, **axes}, facts=facts
    )


@pytest.mark.parametrize(
    ("way", "text"),
    [
        ({}, "windows that follow one another"),
        ({"stride": 2048}, "windows that move on by 2k"),
        ({"sinks": 4}, "streaming over a moving cache, 4 sinks in it"),
        ({"stride": 64, "bos": True}, "windows that move on by 64, bos first"),
        ({"bos": True}, "windows that follow one another, bos first"),
    ],
)
def test_a_way_in_words(way: dict[str, Any], text: str) -> None:
    assert way_text(way) == text


def test_runs_side_by_side_for_every_way_with_what_they_have_more_than_the_first(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, stem=name) for name in ("a", "b")]
    one, other = (run.id for run in runs)
    rows = [
        nats(3.5, 256, one), nats(3.4, 512, one), nats(3.3, 256, one, stride=64), nats(3.45, 256, one, sinks=4),
        nats(3.6, 256, other, less=0.1), nats(3.2, 512, other, less=-0.2), nats(3.3, 256, other, less=0.0, stride=64),
        nats(3.5, 256, other, less=0.05, sinks=4), result("accuracy", 0.5, 256, axes={"run": one, "task": "mqar"}),
    ]  # fmt: skip
    assert ways(rows) == [{}, {"stride": 64}, {"sinks": 4}]
    printed = text_of(*side_by_side(rows, runs)).splitlines()
    assert [line.split() for line in printed] == [
        ["nats/token", "by", "context,", "windows", "that", "follow", "one", "another"],
        ["run", "256", "512"], [one, "3.500", "±0.050", "3.400", "±0.050"], [other, "3.600", "±0.050", "3.200", "±0.050"],
        f"less {one}, on the same targets".split(),
        ["run", "256", "512"], [other, "+0.100", "±0.010", "-0.200", "±0.010"],
        ["nats/token", "by", "context,", "windows", "that", "move", "on", "by", "64"],
        ["run", "256"], [one, "3.300", "±0.050"], [other, "3.300", "±0.050"],
        f"less {one}, on the same targets".split(), ["run", "256"], [other, "+0.000", "±0.010"],
        ["nats/token", "by", "context,", "streaming", "over", "a", "moving", "cache,", "4", "sinks", "in", "it"],
        ["run", "256"], [one, "3.450", "±0.050"], [other, "3.500", "±0.050"],
        f"less {one}, on the same targets".split(), ["run", "256"], [other, "+0.050", "±0.010"],
    ]  # fmt: skip


def test_runs_of_other_targets_are_told_apart_by_bytes(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, stem=name) for name in ("a", "b")]
    rows = [nats(3.5, 256, run.id) for run in runs]
    rows += [result("bits_per_byte", 2.0 + n, 256, axes={"run": run.id}) for n, run in enumerate(runs)]
    grids = side_by_side(rows, runs)
    assert [grid.heading.split()[0] for grid in grids] == ["nats/token", "bits/byte"]
    assert [row[1] for row in grids[1].rows] == ["2.000", "3.000"]


def by_position(run: str | None = None, shift: float = 0.0) -> list[Measurement]:
    axes = {} if run is None else {"run": run}
    return [
        result(
            "nats_per_token", value + shift, None, split="test", n_targets=10 * (last - first + 1),
            axes={"segment": 4, "length": 4, "from": first, "to": last, **axes},
        )
        for (first, last), value in {(1, 1): 5.0, (2, 2): 4.0, (3, 4): 3.0}.items()
    ]  # fmt: skip


def test_loss_by_position_is_drawn_and_said() -> None:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    show_context_use(by_position(), 4, console)
    lines = written(console).splitlines()
    assert lines[1] == "nats/token by tokens seen in the window"
    assert any("trained" in line for line in lines)
    assert lines[-1] == "by position: test split, windows of 4 that follow one another, 40 tokens"
    console = Console(width=80, file=io.StringIO(), color_system=None)
    show_context_use(by_position("one") + by_position("two", 1.0), None, console)
    text = written(console)
    assert "● one" in text
    assert "■ two" in text
    assert text.splitlines()[-1].endswith("40 tokens")


def test_nothing_is_said_where_nothing_was_measured() -> None:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    show_context_use([nats(3.0, 256, "a")], 256, console)
    assert written(console) == ""


def test_the_numbers_of_context_in_words() -> None:
    changes = {"512": {"change": 0.0123, "low": 0.01, "high": 0.02}, "1024": {"change": 0.2, "low": None, "high": None}}
    ratio = result(
        "extrapolation_ratio", 2.0, None, axes={"trained": 256, "epsilon": 0.05, "last": 64},
        facts={"longest": 1024, "changes": changes},
    )  # fmt: skip
    rows = [
        result(
            "in_context_score", -0.4, None, low=-0.5, high=-0.3, facts={"scaled_from": 512},
            axes={"length": 256, "early": 25, "late": 250},
        ),
        ratio,
        ratio.model_copy(update={"value": 4.0}),
        ratio.model_copy(update={"value": 1.0, "facts": {"longest": 256, "changes": {}}}),
        result("effective_context", 512.0, None, axes={"stride": 64}, facts={"lengths": [128, 512, 2048]}),
        *(
            result(
                "relative_effective_context", reached, None, axes={"run": "a", "top": top},
                facts={"group": ["a", "b"], "lengths": [512, 1024]},
            )
            for top, reached in ((0.1, 1024.0), (1.0, 512.0))
        ),
        *(result("word_perplexity", 100.0 * n, 256 * n, axes={"segment": 512}) for n in (1, 2)),
        result("word_perplexity", 90.0, 256, axes={"stride": 64}),
    ]  # fmt: skip
    said = "the last 64 tokens of a window, against the same at 256"
    by_length = "+0.012 ±0.005 at 512, +0.200 at 1k"
    assert context_notes(rows) == [
        "in-context learning score -0.400 ±0.100 nats/token: index 250 less index 25 (50 and 500 of 512, scaled to the "
        "context) in windows of 256",
        f"extrapolation ratio 2 (ε = 0.05 nats): {said}: {by_length}",
        f"extrapolation ratio 4 or more (ε = 0.05 nats): {said}: {by_length}",
        f"extrapolation ratio 1 (ε = 0.05 nats): {said}; no longer window was scored",
        "effective context 512: the shortest of 128, 512, 2k within 1% of the perplexity at the longest, windows that move "
        "on by 64",
        "a: relative effective context 1k (10%), 512 (100%) on the hardest so many tokens, among 2 runs at 512, 1k",
        "perplexity per word of the text: 100.00 at 256, 200.00 at 512",
    ]  # fmt: skip


def test_two_records_by_index_in_pairs(tmp_path: Path) -> None:
    runs = []
    for shift in (0.0, 0.5):
        run = make_run(tmp_path)
        for (first, last), n in {(1, 1): 10, (2, 4): 30}.items():
            run.add_documents(
                DocumentSums(
                    context=4, split="test", axes={"from": first, "to": last}, names=("x", "y"), targets=(n, n),
                    nats=(n * (3.0 + shift), n * (4.0 + shift)), n_bytes=(n, n),
                )
            )  # fmt: skip
        run.write_documents({4: DocumentScores(["x", "y"], [1.0, 2.0], [40, 40], [40, 40], [9, 9])})
        runs.append(run)
    grid = position_grid(*runs)
    assert grid is not None
    assert grid.rows == [["1", "3.500", "4.000", "+0.500 ±0.000"], ["2-4", "3.500", "4.000", "+0.500 ±0.000"]]
    assert position_grid(runs[0], make_run(tmp_path)) is None
