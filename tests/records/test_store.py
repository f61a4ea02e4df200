"""Runs on disk: ids, selectors, whole updates, rows that survive a crash, and the dead that say they run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ctxlab.errors import RecordError
from ctxlab.records import process, run, store
from ctxlab.records.run import Run
from ctxlab.records.schema import TaskItem
from ctxlab.records.store import RunStore
from tests.records.builders import make_run, result

ROW: dict[str, Any] = {"split": "train", "step": 1, "tokens": 4096, "seconds": 0.5, "attempt": 1, "loss": 3.0}


def with_weights(written: Run) -> Run:
    written.checkpoints.mkdir()
    (written.checkpoints / "last").write_text("step-000001\n")
    return written


class TestCreation:
    def test_everything_given_is_read_back(self, tmp_path: Path) -> None:
        made = RunStore(tmp_path / "runs").create(
            "train", "nano-rope-256", config={"context": 256}, line="ctxlab train", parent="p-aaaa",
            sweep={"id": "s-bbbb", "cell": 2}, experiment="extrapolation", tags=["a"], note="why",
            plugins=[("x.py", "ff")],
        )  # fmt: skip
        record = RunStore(tmp_path / "runs").open(made.id).record
        assert record == made.record
        assert (record.status, record.command, record.line) == ("running", "train", "ctxlab train")
        assert (record.parent, record.sweep.id, record.sweep.cell) == ("p-aaaa", "s-bbbb", 2)  # type: ignore[union-attr]
        assert (record.tags, record.note, record.plugins) == (("a",), "why", (("x.py", "ff"),))
        assert record.process == {**process.this_process(), "begun": record.process["begun"]}
        made.finish("done")

    @given(stem=st.text(max_size=120))
    def test_an_id_is_safe_for_hydra_a_shell_and_a_file_system(self, stem: str, tmp_path_factory: Any) -> None:
        made = make_run(tmp_path_factory.mktemp("runs"), stem=stem, status="waiting")
        assert re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*-[a-z0-9]{4}", made.id)
        assert len(made.id) <= 90
        assert made.record.name == stem

    @pytest.mark.parametrize(
        ("stem", "start"),
        [("nano rope/256", "nano-rope-256-"), ("256-rope", "run-256-rope-"), ("../../etc", "etc-"), ("中文", "run-")],
    )
    def test_what_an_id_begins_with(self, stem: str, start: str, tmp_path: Path) -> None:
        assert make_run(tmp_path, stem=stem, status="waiting").id.startswith(start)

    def test_two_runs_that_draw_the_same_name_get_two_folders(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn = iter(["aaaa", "aaaa", "aaaa", "bbbb"])
        monkeypatch.setattr(store, "_random", lambda: next(drawn))
        ids = [make_run(tmp_path, stem="x", status="waiting").id for _ in range(2)]
        assert ids == ["x-aaaa", "x-bbbb"]

    def test_a_runs_folder_that_is_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "runs").write_text("")
        with pytest.raises(RecordError, match=r"^paths.runs: .*runs is not a folder$"):
            make_run(tmp_path / "runs")

    def test_an_unwritable_folder_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refuse)  # (a folder's mode stops everybody but root)
        with pytest.raises(RecordError, match=r"^paths.runs: .* cannot be made: Permission denied$"):
            make_run(tmp_path / "runs")

    def test_a_disk_that_refuses_leaves_nothing_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run.os, "fsync", full_disk)
        with pytest.raises(RecordError, match=r"run.json cannot be written: No space left on device$"):
            make_run(tmp_path)
        assert list(tmp_path.iterdir()) == []


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


class TestUpdates:
    def test_a_failed_update_keeps_the_record_and_leaves_no_draft(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = make_run(tmp_path, status="waiting", note="before")
        text = (made.path / "run.json").read_text()
        monkeypatch.setattr(run.os, "replace", full_disk)
        with pytest.raises(RecordError, match="No space left on device"):
            made.update(note="after")
        assert (made.path / "run.json").read_text() == text
        assert not list(made.path.glob(".run.json-*"))

    def test_an_unknown_field_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValidationError, match="colour"):
            make_run(tmp_path, status="waiting").update(colour="red")

    def test_what_another_process_wrote_meanwhile_stays(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, status="waiting")
        RunStore(tmp_path).open(made.id).update(tags=("mine",))
        made.update(note="ours")
        assert (made.record.tags, made.record.note) == (("mine",), "ours")

    def test_no_reader_sees_half_a_record_and_no_writer_is_lost(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, status="waiting", config={"padding": "x" * 100_000})
        done = threading.Event()
        readers_saw: list[int] = []

        def read() -> None:
            while not done.is_set():
                readers_saw.append(len(Run(made.path).record.config["padding"]))

        def write(field: str) -> None:
            own = Run(made.path)
            for number in range(20):
                own.update(**{field: f"{field} {number}"})

        threads = [threading.Thread(target=write, args=(field,)) for field in ("note", "reason", "line")]
        reader = threading.Thread(target=read)
        for thread in (reader, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        reader.join()
        record = Run(made.path).record
        assert (record.note, record.reason, record.line) == ("note 19", "reason 19", "line 19")
        assert set(readers_saw) == {100_000}

    def test_time_is_that_of_the_attempts_not_of_the_pause_between(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = iter(f"2026-01-01T{hour:02d}:00:00.000+00:00" for hour in (1, 1, 2, 9, 12))
        monkeypatch.setattr(run, "now", lambda: next(clock))
        monkeypatch.setattr(store, "now", lambda: next(clock))
        made = make_run(tmp_path)
        made.finish("interrupted", "Ctrl-C")
        assert (made.record.wall_seconds, made.record.attempt) == (3600, 1)
        made.restart()
        again = made.record
        assert (again.status, again.reason, again.finished, again.attempt) == ("running", "", None, 2)
        made.finish("done")
        assert made.record.wall_seconds == 4 * 3600
        assert made.record.started == "2026-01-01T01:00:00.000+00:00"

    def test_a_waiting_run_that_begins_is_its_first_attempt(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, status="waiting")
        assert (made.record.started, made.record.attempt) == (None, 1)
        made.restart()
        assert (made.record.status, made.record.attempt) == ("running", 1)
        made.finish("done")


class TestRows:
    def test_the_last_row_of_each_step_and_split_wins(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, status="waiting")
        for step, split, loss in ((2, "train", 4.0), (1, "train", 5.0), (2, "validation", 4.5), (2, "train", 3.9)):
            made.log({**ROW, "step": step, "split": split, "loss": loss})
        assert [(r["step"], r["split"], r["loss"]) for r in made.metrics()] == [
            (1, "train", 5.0), (2, "train", 3.9), (2, "validation", 4.5),
        ]  # fmt: skip

    def test_unknown_names_and_splits_are_refused(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, status="waiting")
        with pytest.raises(ValueError, match="no metric is called 'los'; did you mean 'loss'"):
            made.log({**ROW, "los": 1.0})
        with pytest.raises(ValueError, match="split: 'dev' is none of train, validation, test"):
            made.log({**ROW, "split": "dev"})
        assert made.metrics() == []

    def test_a_torn_line_costs_one_row(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, status="waiting")
        made.log(ROW)
        made.close()
        with (made.path / "metrics.jsonl").open("a") as file:
            file.write('{"split": "train", "step": 2, "lo')
        Run(made.path).log({**ROW, "step": 3})
        assert [row["step"] for row in made.metrics()] == [1, 3]

    def test_rows_are_json_even_where_numbers_are_not(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, status="waiting")
        made.log({**ROW, "gradient_norm": float("inf")})

        def refuse(word: str) -> None:
            raise AssertionError(word)

        (line,) = (made.path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(line, parse_constant=refuse) == {**ROW, "gradient_norm": None}

    def test_a_full_disk_is_one_line_and_keeps_what_is_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = make_run(tmp_path, status="waiting")
        made.log(ROW)
        with monkeypatch.context() as patch:
            patch.setattr(run.os, "write", full_disk)
            with pytest.raises(RecordError, match=r"metrics.jsonl cannot be written: No space left on device$"):
                made.log({**ROW, "step": 2})
            with pytest.raises(RecordError, match=r"measurements.jsonl cannot be written: No space left on device$"):
                made.measure(result("perplexity", 3.0))
        made.log({**ROW, "step": 3})
        assert [row["step"] for row in made.metrics()] == [1, 3]

    def test_a_result_measured_again_replaces_the_first_and_other_axes_do_not(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, status="waiting")
        made.measure(result("accuracy", 0.1, axes={"depth": 1}), result("accuracy", 0.2, axes={"depth": 2}))
        made.measure(result("accuracy", 0.3, axes={"depth": 1}), result("accuracy", 0.4, 512, axes={"depth": 1}))
        found = {(m.context, m.axes["depth"]): m.value for m in made.measurements()}
        assert found == {(256, 1): 0.3, (256, 2): 0.2, (512, 1): 0.4}

    def test_sums_by_document_are_read_back(self, tmp_path: Path) -> None:
        class Sums:
            names, nats, targets, n_bytes = ["a", "b"], [1.5, 2.5], [3, 4], [9, 12]

        made = make_run(tmp_path, status="waiting")
        made.write_documents({256: Sums(), 512: Sums()})
        made.write_documents({256: Sums()}, axes={"run": "other"})
        found = [(d.context, d.axes, d.names, d.nats, d.targets, d.n_bytes) for d in made.documents()]
        same = (("a", "b"), (1.5, 2.5), (3, 4), (9, 12))
        assert found == [(256, {}, *same), (512, {}, *same), (256, {"run": "other"}, *same)]

    def test_examples_of_tasks_are_read_back_the_last_of_each(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, status="waiting")
        assert made.items() == []
        first = TaskItem(task="copy", context=64, item=3, score=0.0, wanted=("1 2 ",), answer="é\n")
        others = [
            first.model_copy(update=change)
            for change in (
                {"item": 4},
                {"context": 128},
                {"task": "repeat"},
                {"depth": 0.5},
                {"axes": {"run": "other"}},
            )
        ]
        made.write_items([first, *others])
        again = first.model_copy(update={"score": 1.0, "answer": "1 2 "})
        made.write_items([again])
        with (made.path / "items.jsonl").open("a") as file:
            file.write('{"task": "copy", "con')
        made.write_items([TaskItem(task="mqar", context=8, item=0, score=0.25)])
        assert Run(made.path).items() == [again, *others, TaskItem(task="mqar", context=8, item=0, score=0.25)]


class TestSelectors:
    def test_several_at_once_a_prefix_of_all_that_are_done(self, tmp_path: Path) -> None:
        runs = RunStore(tmp_path)
        first, second, failed, other = (make_run(tmp_path, stem=stem) for stem in ("a", "a", "a", "b"))
        for written, status in ((first, "done"), (second, "done"), (failed, "failed"), (other, "running")):
            written.finish(status)
        both = [run.id for run in runs.resolve_all(["a-"])]
        assert both == [first.id, second.id]  # the oldest first
        found = [run.id for run in runs.resolve_all(["b", second.id, "a-", failed.id])]
        assert found == [other.id, second.id, first.id, failed.id]
        with pytest.raises(RecordError, match="there is no run 'nano'"):
            runs.resolve_all(["a-", "nano"])

    def test_id_prefix_path_and_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        runs = RunStore(Path("runs"))
        old = with_weights(make_run(runs.root, stem="alpha", status="waiting"))
        old.update(started="2026-01-01T00:00:00.000+00:00")
        new = with_weights(make_run(runs.root, stem="beta", status="waiting"))
        new.update(started="2026-01-02T00:00:00.000+00:00")
        newest = make_run(runs.root, stem="beta-without-weights", status="waiting")
        newest.update(started="2026-01-03T00:00:00.000+00:00")
        assert runs.resolve(old.id).path == old.path
        assert runs.resolve("al").id == old.id
        assert runs.resolve(str(new.path)).id == new.id
        assert runs.resolve(str(new.path.resolve())).id == new.id
        assert runs.resolve("last").id == new.id

    def test_an_id_that_begins_another_id_is_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn = iter(["aaaa", "bbbb"])
        monkeypatch.setattr(store, "_random", lambda: next(drawn))
        short = make_run(tmp_path, stem="x", status="waiting")
        make_run(tmp_path, stem="x-aaaa", status="waiting")
        assert RunStore(tmp_path).resolve("x-aaaa").id == short.id

    def test_what_is_not_one_run_is_refused_and_names_runs(self, tmp_path: Path) -> None:
        runs = RunStore(tmp_path)
        with pytest.raises(RecordError, match=r"^run: no run in .* has weights yet; make one with: ctxlab train$"):
            runs.resolve("last")
        ids = sorted(make_run(tmp_path, stem="nano", status="waiting").id for _ in range(2))
        with pytest.raises(RecordError, match=rf"^run: 'nano' begins 2 runs: {ids[0]}, {ids[1]}$"):
            runs.resolve("nano")
        misspelt = ids[0].replace("nano", "nanno")
        with pytest.raises(RecordError, match=rf"^run: there is no run '{misspelt}' in .*; did you mean '{ids[0]}'"):
            runs.resolve(misspelt)

    def test_newest_first_waiting_last_broken_ones_passed_over(self, tmp_path: Path) -> None:
        runs = [make_run(tmp_path, stem=name, status="waiting") for name in ("a", "b", "c")]
        for day, written in zip((1, 3), runs, strict=False):
            written.update(started=f"2026-01-0{day}T00:00:00.000+00:00")
        (tmp_path / "broken-aaaa").mkdir()
        (tmp_path / "broken-aaaa" / "run.json").write_text("{")
        (tmp_path / ".hidden").mkdir()
        (tmp_path / "notes.txt").write_text("mine")
        assert [written.record.name for written in RunStore(tmp_path).runs()] == ["b", "a", "c"]
        assert RunStore(tmp_path / "nowhere").runs() == []

    def test_a_broken_record_is_refused_by_name(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, status="waiting")
        (made.path / "run.json").write_bytes(b"\xff\xfe{")
        with pytest.raises(RecordError, match=r"run.json: .*can't decode"):
            RunStore(tmp_path).open(made.id)

    def test_a_removed_run_is_in_the_trash_whole(self, tmp_path: Path) -> None:
        runs = RunStore(tmp_path)
        made = make_run(tmp_path, status="waiting")
        made.log(ROW)
        target = runs.remove(made)
        assert target == tmp_path / ".trash" / made.id
        assert Run(target).metrics() == [ROW]
        assert runs.runs() == []

    def test_a_running_run_is_not_removed(self, tmp_path: Path) -> None:
        made = make_run(tmp_path)
        with pytest.raises(RecordError, match=rf"^run: {made.id} is running; stop it first$"):
            RunStore(tmp_path).remove(made)
        made.finish("done")


class TestTheDead:
    def test_a_run_whose_process_was_killed_reads_as_killed(self, tmp_path: Path) -> None:
        code = (
            "import sys, pathlib; from tests.records.builders import make_run\n"
            "print(make_run(pathlib.Path(sys.argv[1])).id, flush=True); sys.stdin.read()"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        run_id = child.stdout.readline().strip()
        assert RunStore(tmp_path).open(run_id).record.status == "running"
        child.kill()
        child.communicate()
        record = RunStore(tmp_path).open(run_id).record
        assert (record.status, record.reason) == ("killed", "its process is gone")
        assert json.loads((tmp_path / run_id / "run.json").read_text())["status"] == "running"

    def test_a_pid_that_somebody_else_has_by_now_does_not_keep_a_run_alive(self, tmp_path: Path) -> None:
        made = make_run(tmp_path)
        made.close()
        made.update(process={**made.record.process, "start": "1"})
        assert made.reload().status == "killed"

    def test_on_another_host_the_heartbeat_decides(self, tmp_path: Path) -> None:
        made = make_run(tmp_path)
        made.close()
        made.update(process={**made.record.process, "host": "elsewhere"})
        assert made.reload().status == "running"
        stale = time.time() - process.STALE_SECONDS - 1
        os.utime(made.path / ".heartbeat", (stale, stale))
        assert made.reload().status == "killed"
        (made.path / ".heartbeat").unlink()
        os.utime(made.path / "run.json", (stale, stale))
        assert made.reload().status == "killed"

    def test_the_heart_beats_while_nothing_is_logged_and_stops_at_the_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(process, "BEAT_SECONDS", 0.01)
        made = make_run(tmp_path)
        beat = made.path / ".heartbeat"
        first = wait_for(lambda: beat.stat().st_mtime_ns if beat.exists() else 0)
        assert wait_for(lambda: beat.stat().st_mtime_ns > first)
        made.finish("done")
        last = beat.stat().st_mtime_ns
        time.sleep(0.05)
        assert beat.stat().st_mtime_ns == last

    def test_a_name_with_brackets_and_spaces_does_not_confuse_the_start_time(self) -> None:
        child = subprocess.Popen(["sleep", "30"])
        try:
            assert process.started_at(child.pid) is not None
        finally:
            child.kill()
        wait_for(lambda: process.started_at(child.pid) is None)  # a zombie is no process
        child.wait()
        assert process.started_at(child.pid) is None


def wait_for(condition: Any, seconds: float = 5.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.005)
    raise AssertionError("waited in vain")
