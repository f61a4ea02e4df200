"""Repetitions: means and intervals against a hand computation, differences paired by seed, evaluations with their runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ctxlab.records.store import RunStore
from ctxlab.report.repeats import (
    curves_with_means,
    mean_curves,
    repeats,
    repeats_tables,
    save_compared,
    with_differences,
)
from ctxlab.report.results import labels
from tests.records.builders import CONFIG, make_run, result, scores
from tests.report.builders import repetitions, text_of

T_2 = 4.302652729911275  # Student's t, 0.975, two degrees of freedom


def test_means_and_intervals_are_those_of_the_textbook(tmp_path: Path) -> None:
    groups = repeats(repetitions(tmp_path))
    assert [(group.label, len(group.runs)) for group in groups] == [("rope", 3), ("alibi", 3)]
    (mean,) = (m for m in groups[0].means() if (m.name, m.context) == ("nats_per_token", 256))
    half = T_2 * 0.2 / math.sqrt(3)  # 3.0, 3.2, 3.4: standard deviation 0.2
    assert mean.value == pytest.approx(3.2, abs=1e-12)
    assert (mean.low, mean.high) == (pytest.approx(3.2 - half, abs=1e-9), pytest.approx(3.2 + half, abs=1e-9))
    assert (mean.facts["of"], mean.facts["seeds"], len(mean.facts["runs"])) == ("rope", 3, 3)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """-0.05, -0.06, -0.07: their own spread is a twentieth of the seeds'."""
    (_, first), (group, second) = with_differences(repeats(repetitions(tmp_path)))
    assert not any("difference" in m.facts for m in first)
    (mean,) = (m for m in second if (m.name, m.context) == ("nats_per_token", 256))
    half = T_2 * 0.01 / math.sqrt(3)
    assert mean.facts["difference"] == pytest.approx(-0.06, abs=1e-12)
    assert mean.facts["difference_low"] == pytest.approx(-0.06 - half, abs=1e-9)
    assert mean.facts["difference_high"] == pytest.approx(-0.06 + half, abs=1e-9)
    assert (mean.facts["difference_from"], group.label) == ("rope", "alibi")


def test_other_seeds_are_not_paired(tmp_path: Path) -> None:
    runs = repetitions(tmp_path)
    runs[-1].update(config={**runs[-1].record.config, "seed": 7})
    (_, _), (_, second) = with_differences(repeats(runs))
    assert second
    assert not any("difference" in m.facts for m in second)


def test_what_was_done_once_is_no_repetition(tmp_path: Path) -> None:
    runs = repetitions(tmp_path)
    assert repeats([runs[0], runs[3]]) == []
    assert [group.label for group in repeats([*runs[:2], runs[3]])] == [""]


def test_trainings_that_start_from_one_run_are_repetitions_of_each_other_and_not_of_it(tmp_path: Path) -> None:
    first = make_run(tmp_path, config={"seed": 1})
    first.measure(result("accuracy", 0.1, 64))
    children = [make_run(tmp_path, config={"seed": seed, "init": first.id}, parent=first.id) for seed in (1, 2, 3)]
    for run, value in zip(children, (0.5, 0.6, 0.7), strict=True):
        run.measure(result("accuracy", value, 64))
    (group,) = repeats([first, *children])
    assert sorted(group.runs) == [1, 2, 3]
    (mean,) = group.means()
    assert mean.value == pytest.approx(0.6, abs=1e-12)


def test_a_value_that_is_missing_counts_for_nothing(tmp_path: Path) -> None:
    runs = repetitions(tmp_path)[:2]
    for run, value in zip(runs, (0.5, None), strict=True):
        run.measure(
            result("accuracy", value, 64, status="done" if value else "undefined", reason="" if value else "why")
        )
    assert not [m for m in repeats(runs)[0].means() if m.name == "accuracy"]


def test_the_baseline_of_a_text_is_no_result_of_a_seed(tmp_path: Path) -> None:
    runs = repetitions(tmp_path)
    for run in runs:
        run.measure(result("nats_per_token", 3.1, None, axes={"baseline": "ngram"}))
    assert all("baseline" not in m.axes for group in repeats(runs) for m in group.means())


def test_evaluations_are_repetitions_of_their_runs(tmp_path: Path) -> None:
    """One record that scores all six, and a record for each: by scheme, three seeds each."""
    runs = repetitions(tmp_path)
    store = RunStore(tmp_path)
    together = store.create("eval", "together", config={"seed": 1, "run": [run.id for run in runs]}, line="")
    for run in runs:
        together.measure(result("accuracy", 0.1 * run.record.config["seed"], 64, axes={"run": run.id, "depth": 0.5}))
    together.finish("done")
    alone = []
    for run in runs:
        each = store.create("eval", "alone", config={"seed": 1, "run": [run.id], "again": 1}, line="", parent=run.id)
        each.measure(*scores(128, 2.0 * run.record.config["seed"]))
        each.finish("done")
        alone.append(each)
    groups = [group for group in repeats([*runs, together, *alone]) if group.command == "eval"]
    assert [len(group.runs) for group in groups] == [3, 3, 3, 3]
    (accuracy,) = groups[0].means()
    assert accuracy.value == pytest.approx(0.2)
    assert (accuracy.axes, accuracy.facts["runs"]) == ({"depth": 0.5}, [run.id for run in runs[:3]])
    (nats,) = (m for m in groups[2].means() if m.name == "nats_per_token")
    assert (nats.value, nats.facts["runs"]) == (pytest.approx(4.0), [run.id for run in runs[:3]])


def test_the_table_and_the_curves(tmp_path: Path) -> None:
    groups = repeats(repetitions(tmp_path))
    assert (
        text_of(*repeats_tables(groups))
        == """\
nats/token, mean over seeds ±95%
             seeds            256            512
rope             3   3.200 ±0.497   3.300 ±0.497
alibi            3   3.140 ±0.472   3.240 ±0.472
  less rope         -0.060 ±0.025  -0.060 ±0.025"""
    )
    curves, bands = mean_curves(groups)
    assert {name: [c for c, _ in points] for name, points in curves.items()} == {
        "rope": [256, 512],
        "alibi": [256, 512],
    }
    assert bands["rope"][0] == (256, pytest.approx(3.2 - 0.496827, abs=1e-6), pytest.approx(3.2 + 0.496827, abs=1e-6))


def test_curves_of_a_sweep_are_means_where_seeds_alone_differ_and_single_runs_elsewhere(tmp_path: Path) -> None:
    once = make_run(tmp_path, status="done", config={"position": {"name": "nope"}})
    once.measure(*scores(256, 4.0), *scores(512, 4.1))
    runs = [*repetitions(tmp_path), once]
    curves, bands = curves_with_means(runs)
    assert {name: [value for _, value in points] for name, points in curves.items()} == {
        "rope": pytest.approx([3.2, 3.3]),
        "alibi": pytest.approx([3.14, 3.24]),
        labels(runs)[-1]: [4.0, 4.1],
    }
    assert bands.keys() == {"rope", "alibi"}
    drawn = save_compared(runs, tmp_path / "figure.svg")
    assert drawn is not None
    text = drawn.read_text(encoding="utf-8")
    assert "mean over seeds and 95%" in text
    assert all(f">{name}</text>" in text for name in curves)
    assert save_compared([make_run(tmp_path, status="failed")], tmp_path / "none.svg") is None


def test_columns_say_what_was_varied_and_units_are_read(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, status="done", config={**CONFIG, "seed": seed}) for seed in (1, 2)]
    for n, run in enumerate(runs):
        for depth in (0, 1):
            run.measure(result("accuracy", 0.5 + 0.1 * n, 64, axes={"depth": depth, "task": "needle"}))
        run.measure(result("peak_memory_bytes", (100 + n) * 2**20, 64))
    accuracy, memory = (text_of(grid).splitlines() for grid in repeats_tables(repeats(runs)))
    assert accuracy[1].split() == ["seeds", "64", "depth=0", "64", "depth=1"]
    assert memory[2].split() == ["2", "100", "MiB", "±6.35", "MiB"]
