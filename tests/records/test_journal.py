"""The journal of a study: what its lines came to, entered by the runs themselves; one at a time works on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctxlab.errors import RecordError
from ctxlab.records.journal import LINE, STUDY, Entry, Journal
from tests.records.builders import make_run


def test_lines_are_known_by_what_happened_to_them(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "mine")
    assert journal.entries() == {}
    journal.began("ctxlab train")
    journal.made("ctxlab train", "a-1")
    journal.ended("ctxlab train", 130)
    journal.began("python x.py")
    assert journal.entries() == {
        "ctxlab train": Entry(runs=["a-1"], code=130, began=True),
        "python x.py": Entry(began=True),
    }
    journal.began("ctxlab train")
    journal.made("ctxlab train", "b-2")
    assert journal.entries()["ctxlab train"] == Entry(runs=["a-1", "b-2"], code=None, began=True)


def test_half_a_row_of_a_crash_is_passed_over(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "mine")
    journal.began("ctxlab train")
    with open(tmp_path / "studies/mine/journal.jsonl", "a") as file:
        file.write('{"line": "ctxlab tr')
    journal.ended("ctxlab train", 0)
    assert journal.entries() == {"ctxlab train": Entry(code=0, began=True)}


def test_a_run_enters_itself_and_is_the_studys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_run(tmp_path, experiment="preset", status="waiting").record.experiment == "preset"
    monkeypatch.setenv(STUDY, "mine")
    monkeypatch.setenv(LINE, "ctxlab train experiment=preset")
    made = make_run(tmp_path, experiment="preset", status="waiting")
    assert made.record.experiment == "mine"
    assert Journal(tmp_path, "mine").entries()["ctxlab train experiment=preset"].runs == [made.id]


def test_one_at_a_time_and_a_child_goes_on_holding_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "mine")
    assert not journal.is_held()
    with journal.held() as lock:
        assert journal.is_held()
        with pytest.raises(RecordError, match="mine: is running already"), Journal(tmp_path, "mine").held():
            pass
        with Journal(tmp_path, "other").held():
            pass
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,), env=dict(os.environ)
        )
    try:
        assert journal.is_held()
    finally:
        child.communicate(b"\n")
    assert not journal.is_held()
