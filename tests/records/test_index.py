"""The index of a folder of runs against the runs themselves: it may be stale, broken, gone or fought over, never wrong."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ctxlab.records.index import INDEX, POINTS, RunIndex, thin
from ctxlab.records.run import METRICS_FILE, RUN, Run
from ctxlab.records.store import RunStore
from tests.records.builders import make_run, result, scores
from tests.records.many import make_many


def as_files_say(root: Path) -> list[tuple[object, ...]]:
    """What the store, which reads files alone, says of every run."""
    return [
        (run.record, {(m.name, m.context): m.value for m in run.measurements()}) for run in RunStore(root).runs()
    ]  # fmt: skip


def as_index_says(root: Path) -> list[tuple[object, ...]]:
    found = RunIndex(root).summaries()
    return [(one.record, {key: result.value for key, result in one.results.items()}) for one in found]


def rows(steps: int, *, split: str = "train") -> list[dict[str, object]]:
    return [{"split": split, "step": n, "tokens": 64 * n, "seconds": n / 8, "loss": 1.0 + n % 7} for n in range(steps)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve runs, one of them at work, one that waits, one that is no run, one with results in other ways."""
    make_many(tmp_path / "runs", 10)
    make_run(tmp_path / "runs", stem="at-work")
    other = make_run(tmp_path / "runs", stem="waits", status="waiting")
    other.measure(*scores(256, 3.0), result("bleu", 30.0, None))
    (tmp_path / "runs" / "none").mkdir()
    return tmp_path / "runs"


def test_it_says_what_the_files_say(root: Path) -> None:
    for _ in range(2):  # once from the files, once from the index
        assert as_index_says(root) == as_files_say(root)
    assert (root / INDEX).is_file()
    assert [one.status for one in RunIndex(root).summaries() if one.id.startswith(("at-work", "waits"))] == [
        "running", "waiting",
    ]  # fmt: skip


def test_results_in_other_ways_and_parts_are_no_headline(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="done")
    run.measure(*scores(256, 3.0), result("nats_per_token", 2.0, axes={"stride": 64}))
    run.measure(result("part_bytes", 1.0, axes={"part": "weights"}), result("accuracy", 0.5, axes={"depth": 0.5}))
    (found,) = RunIndex(tmp_path).summaries()
    assert {key: one.value for key, one in found.results.items()} == {
        (m.name, m.context): m.value for m in scores(256, 3.0)
    }
    assert found.results["nats_per_token", 256].measurement() == scores(256, 3.0)[0].model_copy(
        update={"normaliser": None, "split": None, "protocol": "", "n_targets": None, "n_docs": None, "axes": {}}
    )


def test_what_changes_under_it_is_read_again(root: Path) -> None:
    index = RunIndex(root)
    first, second, third, *_ = [one.run() for one in index.summaries() if one.status == "done"]
    first.update(note="changed")
    second.measure(result("perplexity", 7.5, 64))
    RunStore(root).remove(third)
    make_run(root, stem="new", status="done")
    assert as_index_says(root) == as_files_say(root)
    # Another text of the same length, with the time of change put back: the inode still tells.
    file = first.path / RUN
    was = file.stat()
    first.update(note="CHANGED")
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert file.stat().st_size == was.st_size
    assert as_index_says(root) == as_files_say(root)


def test_a_run_whose_process_is_gone_is_killed_without_its_file_changing(root: Path) -> None:
    (busy,) = (one.run() for one in RunIndex(root).summaries() if one.status == "running")
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    busy.update(process={**busy.record.process, "pid": process.pid})
    (found,) = (one for one in RunIndex(root).summaries() if one.id == busy.id)
    assert (found.status, found.record.status, found.record.reason) == ("killed", "killed", "its process is gone")
    assert json.loads((busy.path / RUN).read_text(encoding="utf-8"))["status"] == "running"


@pytest.mark.parametrize("damage", ["deleted", "no database", "cut", "another version", "overwritten inside"])
def test_a_broken_index_is_made_again(root: Path, damage: str) -> None:
    expected = as_index_says(root)
    file = root / INDEX
    if damage == "deleted":
        file.unlink()
    elif damage == "no database":
        file.write_text("no database at all\n" * 999)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "another version":
        with sqlite3.connect(file) as table:
            table.executescript("DROP TABLE runs; CREATE TABLE runs (x TEXT); PRAGMA user_version = 99")
    else:
        content = bytearray(file.read_bytes())
        content[200:] = random.Random(0).randbytes(len(content) - 200)
        file.write_bytes(content)
    assert as_index_says(root) == expected
    assert as_index_says(root) == expected
    assert file.is_file()


def test_where_nothing_can_be_written_the_runs_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = as_files_say(root)
    (root / INDEX).mkdir()  # what no process may write, root's neither
    assert as_index_says(root) == expected
    assert RunIndex(root / "nowhere").summaries() == []
    assert not (root / "nowhere").exists()


def test_another_process_that_writes_is_not_waited_for_forever(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_index_says(root)
    monkeypatch.setattr("ctxlab.records.index._PATIENCE", 0.05)
    with sqlite3.connect(root / INDEX, isolation_level=None) as busy:
        busy.execute("BEGIN IMMEDIATE")
        Run(RunStore(root).runs()[0].path).update(note="meanwhile")
        assert as_index_says(root) == as_files_say(root)
        busy.execute("ROLLBACK")
    assert as_index_says(root) == as_files_say(root)


def test_many_processes_at_once(tmp_path: Path) -> None:
    """Readers and writers side by side, from nothing: each sees all runs, and what is left is whole."""
    root = tmp_path / "runs"
    make_many(root, 60, 20)
    code = (
        "import sys; from pathlib import Path; from ctxlab.records.index import RunIndex\n"
        "from ctxlab.records.run import Run\n"
        "root, me = Path(sys.argv[1]), int(sys.argv[2]); index = RunIndex(root)\n"
        "for turn in range(5):\n"
        "    found = index.summaries(); assert len(found) == 60\n"
        "    assert len(index.curves(found, 'loss')) == 60\n"
        "    run = found[(7 * turn + me) % 60].run(); run.update(note=f'{me} {turn}'); index.remember(run.path)\n"
        "    assert {one.id: one for one in index.summaries()}[run.id].record.note\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(root), str(n)]) for n in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    assert as_index_says(root) == as_files_say(root)
    with sqlite3.connect(root / INDEX) as table:
        assert table.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_short_curves_are_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="done")
    for row in [
        *rows(100),
        {"split": "validation", "step": 50, "tokens": 3200, "seconds": 6.25, "nats_per_token": 2.5},
    ]:
        run.log(row)
    run.log({**rows(100)[50], "loss": float("nan"), "attempt": 2})  # the last row of a step counts, and has no point
    index = RunIndex(tmp_path)
    summaries = index.summaries()
    (curve,) = index.curves(summaries, "loss").values()
    kept = [row for row in run.metrics() if row.get("loss") is not None]
    assert curve.n == 99
    for column, key in (
        (curve.steps, "step"),
        (curve.tokens, "tokens"),
        (curve.seconds, "seconds"),
        (curve.values, "loss"),
    ):
        assert list(column) == [row[key] for row in kept]
    (other,) = index.curves(summaries, "nats_per_token", split="validation").values()
    assert (list(other.steps), list(other.values)) == ([50], [2.5])
    assert index.curves(summaries, "nats_per_token") == {}


def test_curves_follow_a_run_that_goes_on(tmp_path: Path) -> None:
    run, index = make_run(tmp_path), RunIndex(tmp_path)
    for length in (3, 500, 1200):
        for row in rows(length)[len(run.metrics()) :]:
            run.log(row)
        (curve,) = index.curves(index.summaries(), "loss").values()
        assert (curve.n, curve.steps[0], curve.steps[-1]) == (length, 0, length - 1)
        assert len(curve.steps) <= POINTS
    os.replace(run.path / METRICS_FILE, run.path / "elsewhere")
    assert index.curves(index.summaries(), "loss") == {}
    run.finish("done")


@pytest.mark.parametrize("length", [0, 1, 2, POINTS, POINTS + 1, 10_000])
def test_thinning_loses_no_peak(length: int) -> None:
    draw = random.Random(length)
    values = [draw.gauss(0, 1) for _ in range(length)]
    for place in draw.sample(range(length), min(length, 20)):
        values[place] = draw.choice((-9.0, 9.0)) * (1 + draw.random())
    kept = thin(values)
    assert kept == sorted(set(kept))
    assert len(kept) == min(length, len(kept)) <= POINTS
    if length <= POINTS:
        assert kept == list(range(length))
        return
    assert (kept[0], kept[-1]) == (0, length - 1)
    # Of every window as long as two stretches the lowest and the highest are matched by a point inside the window's surroundings.
    stretch = -(-(length - 2) // ((POINTS - 2) // 2))
    for start in range(1, length - 1 - stretch, stretch):
        inside = [values[n] for n in kept if start - stretch < n < start + 2 * stretch]
        assert max(inside) >= max(values[start : start + stretch])
        assert min(inside) <= min(values[start : start + stretch])
