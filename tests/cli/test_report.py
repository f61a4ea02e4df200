"""`ctxlab report`: runs, sweeps and studies into one file, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.lines import ctxlab
from tests.records.builders import make_run
from tests.report.builders import repetitions, trained_run

SCRIPT = "/* the drawing script */"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CTXLAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("ctxlab.report.vega.bundle", lambda cache: SCRIPT)
    return tmp_path


def test_a_page_of_runs_by_id_prefix_sweep_and_study(here: Path) -> None:
    first, second = trained_run(here / "runs", "rope"), trained_run(here / "runs", "alibi")
    cell = make_run(here / "runs", stem="cell", sweep={"id": "contexts-x", "cell": 0}, status="waiting")
    studied = make_run(here / "runs", stem="studied", experiment="mine", status="done")
    done = ctxlab("report", first.id, "nano-alibi", "contexts-x", "mine", "-o", "page.html")
    assert (done.code, done.err) == (0, "")
    text = (here / "page.html").read_text(encoding="utf-8")
    assert SCRIPT in text
    for run in (first, second, cell, studied):
        assert f'data-run="{run.id}"' in text
    assert ctxlab("report", first.id).code == 0
    assert second.id not in (here / "report.html").read_text(encoding="utf-8")


def test_without_a_word_it_is_of_every_run(here: Path) -> None:
    runs = repetitions(here / "runs")
    done = ctxlab("report", "--figures", "pictures")
    assert (done.code, done.err) == (0, "")
    assert "6 runs" in done.out
    assert all(run.id in (here / "report.html").read_text(encoding="utf-8") for run in runs)
    names = {path.name for path in (here / "pictures").iterdir()}
    assert {"perplexity-by-context.svg", "perplexity-by-context.png"} <= names


def test_a_study_that_was_not_run_here_is_what_it_has_saved(here: Path) -> None:
    done = ctxlab("report", "needles")
    assert (done.code, done.err) == (0, "")
    text = (here / "report.html").read_text(encoding="utf-8")
    assert "nano-alibi-512-nkir" in text
    assert "share of right answers by depth and length" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "run: there is no run 'nowhere' in"),
        (["-o", "page.pdf"], "--output: expected a name that ends in .html, got 'page.pdf'"),
        (["-o", "nowhere/page.html"], "--output: there is no folder nowhere"),
        (["--figure"], "ctxlab report: "),
    ],
)
def test_what_is_refused_is_said_in_one_line_and_writes_nothing(here: Path, words: list[str], said: str) -> None:
    make_run(here / "runs")
    done = ctxlab("report", *words)
    assert done.code == 2
    assert len(done.errors) == 1
    assert said in done.errors[0]
    assert not list(here.glob("*.html"))


def test_no_runs_at_all(here: Path) -> None:
    done = ctxlab("report")
    assert (done.code, done.errors) == (
        2,
        ["report: there are no runs in " + str(here / "runs") + " yet; make one with: ctxlab train"],
    )


def test_it_is_made_from_records_alone(here: Path) -> None:
    repetitions(here / "runs")
    code = (
        "import sys; from ctxlab.cli.main import main; import ctxlab.report.vega as vega; vega.bundle = lambda cache: ''; "
        "assert main(['report']) == 0; print(sorted({'torch', 'lightning', 'altair', 'hydra'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
