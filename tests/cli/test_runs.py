"""`ctxlab runs`, word by word."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from ctxlab.cli import console
from ctxlab.cli.commands.runs import run
from ctxlab.cli.main import main
from ctxlab.cli.watch import watched
from ctxlab.errors import RecordError
from ctxlab.records.index import RunIndex
from ctxlab.records.run import Run
from ctxlab.records.store import RunStore
from tests.records.builders import make_run
from tests.report.builders import CURVES, same_ids, text_of, trained_run


@pytest.fixture(autouse=True)
def _fresh_consoles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consoles hold on to the streams of the test that made them."""
    console.stdout.cache_clear()
    console.stderr.cache_clear()
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    same_ids(monkeypatch)
    for number, position in enumerate(CURVES):
        made = trained_run(tmp_path / "runs", position, tags=["long"] if number == 0 else [])
        made.update(started=f"2026-11-2{number}T15:00:00.000+00:00")
    monkeypatch.setenv("CTXLAB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_newest_first_with_their_results_at_the_trained_context(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert lines(capsys) == [
        "run                    status  started           bits/byte  perplexity  nats/token      took  tags",
        "nano-learned-256-aaac  done    2026-11-22 15:00      1.876       49.40       3.900  3:20 min",
        "nano-alibi-256-aaab    done    2026-11-21 15:00      1.803       42.52       3.750  3:20 min",
        "nano-rope-256-aaaa     done    2026-11-20 15:00      1.827       44.70       3.800  3:20 min  long",
    ]


def test_filters_columns_order_and_limit(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "position=rope,alibi",
        "--columns",
        "position,nats_per_token@2k,parameters,context",
        "--sort",
        "perplexity",
    ]
    assert run(words) == 0
    assert lines(capsys) == [
        "position  nats/token@2048  parameters  context",
        "alibi               3.730        3.5M      256",
        "rope                4.900        3.5M      256",
    ]
    assert run(["--limit", "1", "--reverse"]) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()[1:]] == ["nano-rope-256-aaaa"]
    assert captured.err == "1 of 3 runs; --limit 0 shows all\n"


def test_for_programs_and_spreadsheets(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--json", "tags=long"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["schema"], record["id"], record["path"]) == (1, "nano-rope-256-aaaa", f"{runs}/nano-rope-256-aaaa")
    assert {m["context"]: m["value"] for m in record["measurements"] if m["name"] == "nats_per_token"} == {
        128: 3.9, 256: 3.8, 512: 4.1, 1024: 4.5, 2048: 4.9,
    }  # fmt: skip
    assert run(["--json", "--columns", "run,perplexity@2k", "position=learned"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"run": "nano-learned-256-aaac", "perplexity@2048": None}]
    assert run(["--csv", "--columns", "run,nats_per_token@2k,tags", "--sort", "run"]) == 0
    assert list(csv.reader(io.StringIO(capsys.readouterr().out))) == [
        ["run", "nats_per_token@2k", "tags"],
        ["nano-alibi-256-aaab", "3.73", ""],
        ["nano-learned-256-aaac", "", ""],
        ["nano-rope-256-aaaa", "4.9", "long"],
    ]


def test_nothing_to_list_is_said_and_no_error(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--runs", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().err == f"no runs in {tmp_path}/none yet; make one with: ctxlab train\n"
    assert run(["status=failed"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "no run fits\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["positoin=rope"], "positoin: no run has a setting, field or metric of that name; did you mean 'position'?"),
        (["--limt", "3"], "ctxlab runs: unrecognized arguments: --limt"),
        (["--limit", "-3"], "ctxlab runs: --limit: expected a number >= 0, got -3"),
        (["--limit", "x"], "ctxlab runs: argument --limit: invalid int value: 'x'"),
        (
            ["--sort", "perplexty"],
            "perplexty: no run has a setting, field or metric of that name; did you mean 'perplexity'?",
        ),
        (["show"], "ctxlab runs show: the following arguments are required: RUN"),
        (["show", "nano"], "run: 'nano' begins 3 runs: nano-alibi-256-aaab, nano-learned-256-aaac, nano-rope-256-aaaa"),
        (["diff", "nano-rope-256-aaaa"], "ctxlab runs diff: expected two runs or more"),
        (["show", "last"], "has weights yet; make one with: ctxlab train"),
        (["tag", "nano-r", "short", "--remove"], "tag: nano-rope-256-aaaa has no tag 'short' (it has: long)"),
        (["rm", "nano-r", "nano-z"], "run: there is no run 'nano-z' in"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    runs: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in runs.iterdir() if path.is_dir()}
    assert main(["runs", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert {path.name for path in runs.iterdir() if path.is_dir()} == before


def test_show_and_diff(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "nano-rope"]) == 0
    assert any(line.split() == ["folder", f"{runs}/nano-rope-256-aaaa"] for line in lines(capsys))
    assert run(["show", "nano-rope", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["id"] == "nano-rope-256-aaaa"
    assert run(["diff", "nano-rope", "nano-alibi"]) == 0
    assert lines(capsys)[2] == "position  rope                alibi"


def test_tags_and_notes(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tag", "nano-rope", "baseline", "long"]) == 0
    assert run(["tag", "nano-rope", "long", "--remove"]) == 0
    assert run(["note", "nano-rope", "it's", "a = b, really"]) == 0
    assert lines(capsys) == [
        "nano-rope-256-aaaa: long, baseline", "nano-rope-256-aaaa: baseline", "nano-rope-256-aaaa: it's a = b, really",
    ]  # fmt: skip
    record = RunStore(runs).open("nano-rope-256-aaaa").record
    assert (record.tags, record.note, record.status) == (("baseline",), "it's a = b, really", "done")


def test_removed_runs_lie_in_the_trash(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rm", "nano-rope", "nano-rope-256-aaaa", "nano-alibi"]) == 0
    assert [line.split(": ")[0] for line in lines(capsys)] == ["nano-rope-256-aaaa", "nano-alibi-256-aaab"]
    assert {path.name for path in (runs / ".trash").iterdir()} == {"nano-rope-256-aaaa", "nano-alibi-256-aaab"}
    assert [found.id for found in RunStore(runs).runs()] == ["nano-learned-256-aaac"]
    assert len(Run(runs / ".trash" / "nano-rope-256-aaaa").measurements()) == 30


def test_what_was_removed_comes_back_as_it_was(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = RunStore(runs).runs()
    assert run(["rm", "nano-rope", "nano-alibi"]) == 0
    assert run(["restore", "nano-rope", "nano-alibi-256-aaab"]) == 0
    assert lines(capsys)[2:] == [
        f"nano-rope-256-aaaa: back in {runs}/nano-rope-256-aaaa",
        f"nano-alibi-256-aaab: back in {runs}/nano-alibi-256-aaab",
    ]
    assert [found.record for found in RunStore(runs).runs()] == [found.record for found in before]
    assert [m for found in RunStore(runs).runs() for m in found.measurements()] == [
        m for found in before for m in found.measurements()
    ]
    run(["rm", "nano-rope"])
    for words, message in (
        (["nano-alibi"], "there is no run 'nano-alibi' in .*trash; available: nano-rope-256-aaaa"),
        (["zzz"], "there is no run 'zzz' in .*trash"),
    ):
        with pytest.raises(RecordError, match=message):
            run(["restore", *words])
    shutil.copytree(runs / ".trash" / "nano-rope-256-aaaa", runs / "nano-rope-256-aaaa")
    with pytest.raises(RecordError, match=r"^run: .*nano-rope-256-aaaa is there already$"):
        run(["restore", "nano-rope"])
    assert (runs / ".trash" / "nano-rope-256-aaaa").is_dir()


def test_watch_shows_runs_as_they_go(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks, a row of metrics between them; Ctrl-C ends it."""
    busy = make_run(runs, stem="busy", config={"trainer": {"max_tokens": 640, "max_steps": "none"}})
    screens: list[list[str]] = []

    def log(step: int) -> None:
        busy.log({"split": "train", "step": step, "tokens": 64 * step, "seconds": 1.0 * step, "loss": 5.0 - step / 8})

    def sleep(_: float) -> None:
        text = text_of(watched(RunIndex(runs), RunIndex(runs).summaries(), of=9), width=120)
        screens.append(text.splitlines())
        if len(screens) == 2:
            raise KeyboardInterrupt
        log(4)

    log(2)
    monkeypatch.setattr("ctxlab.cli.watch.time.sleep", sleep)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(console, "stdout", lambda: terminal)
    assert run(["--watch"]) == 0
    first, second = (screen[1].split() for screen in screens)
    assert first[:5] == [busy.id, "running", "2", "20%", "4.750"]
    assert second[:5] == [busy.id, "running", "4", "40%", "4.500"]
    assert not any("training loss" in line for line in screens[0])
    assert any("training loss by tokens seen" in line for line in screens[1])
    assert screens[1][-1] == "1 at work, 4 of 9 runs; Ctrl-C ends this"
    assert busy.id in terminal.file.getvalue()  # type: ignore[attr-defined]
    busy.finish("done")


def test_watch_wants_a_terminal(runs: Path) -> None:
    with pytest.raises(
        RecordError, match=r"^ctxlab runs: --watch draws in a terminal; for programs: ctxlab runs --json$"
    ):
        run(["--watch"])


def test_a_running_run_is_not_removed_nor_any_other(runs: Path) -> None:
    busy = make_run(runs, stem="busy")
    with pytest.raises(RecordError, match=f"^run: {busy.id} is running; stop it first$"):
        run(["rm", "nano-rope", busy.id])
    assert (runs / "nano-rope-256-aaaa").is_dir()
    busy.finish("done")


@pytest.mark.parametrize("word", [[], ["show"], ["diff"], ["tag"], ["note"], ["rm"], ["restore"]])
def test_help(word: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", *word, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: ctxlab runs{' ' if word else ''}{' '.join(word)}")


def test_it_loads_nothing_heavy(runs: Path) -> None:
    code = (
        "import sys; from ctxlab.cli.main import main; main(['runs']); main(['runs', 'show', 'nano-rope'])\n"
        "print(sorted({'torch', 'wandb', 'lightning', 'hydra', 'altair', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert "\x1b" not in done.stdout
