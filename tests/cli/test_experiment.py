"""`ctxlab experiment` with real lines: run in order, stopped, killed, gone on with, looked at, reported; or refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ctxlab as package
from ctxlab.cli.study import progress
from ctxlab.launch import Sweep, new_sweep_id, write_sweep
from ctxlab.records.journal import Journal
from ctxlab.records.schema import SweepCell
from ctxlab.records.store import RunStore
from ctxlab.study.claims import check
from ctxlab.study.readme import with_overrides
from tests.cli.lines import SMALL, alone, ctxlab
from tests.records.builders import make_run
from tests.report.builders import repetitions
from tests.study.builders import COMMANDS, make_study

ROOT = Path(__file__).parents[2]
QUIET = (*SMALL, "logger.mode=disabled")
# A script that leaves a mark a call, prints a row, and waits for a file to go on, where it is told to.
SCRIPT = """
import sys, time
from pathlib import Path
name, *rest = sys.argv[1:]
with open("calls.txt", "a") as file:
    file.write(name + "\\n")
print('{"step": "%s", "seconds": 0.5}' % name, flush=True)
while rest and not Path(rest[0]).exists():
    time.sleep(0.02)
if Path("fail-" + name).exists():
    sys.exit(3)
print("the end", flush=True)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, with a study of three scripts: the second one waits for the file `go`."""
    alone(monkeypatch, tmp_path)
    lines = "\n".join(f"python experiments/mine/say.py {words}" for words in ("one", "two go", "three"))
    make_study(tmp_path, lines, files={"say.py": SCRIPT})
    return tmp_path


def calls() -> list[str]:
    path = Path("calls.txt")
    return path.read_text().split() if path.exists() else []


def wait_for(what: Callable[[], bool], patience: float = 60.0) -> None:
    deadline = time.monotonic() + patience
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def started(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ctxlab", "experiment", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore it
    )  # fmt: skip


class TestScripts:
    def test_lines_run_in_order_and_once(self, here: Path) -> None:
        (here / "go").touch()
        done = ctxlab("experiment", "run", "mine")
        assert done.code == 0, done.err
        assert calls() == ["one", "two", "three"]
        said = [line for line in done.err.splitlines() if line.startswith("[")]
        assert said[1] == "[2/3] python experiments/mine/say.py two go"
        results = here / "experiments/mine/results"
        assert sorted(path.name for path in results.iterdir()) == ["say-one.txt", "say-three.txt", "say-two-go.txt"]
        assert (results / "say-one.txt").read_text() == '{"step": "one", "seconds": 0.5}\nthe end\n'

        again = ctxlab("experiment", "run", "mine")
        assert (again.code, calls()) == (0, ["one", "two", "three"])
        assert again.err.count("done already: ") == 3
        (results / "say-three.txt").unlink()
        assert (ctxlab("experiment", "run", "mine").code, calls()) == (0, ["one", "two", "three", "three"])

    def test_the_first_failure_ends_it_with_its_code(self, here: Path) -> None:
        (here / "go").touch()
        (here / "fail-two").touch()
        done = ctxlab("experiment", "run", "mine")
        assert (done.code, calls()) == (3, ["one", "two"])
        assert "exit code 3: python experiments/mine/say.py two go" in done.err
        results = here / "experiments/mine/results"
        assert (results / "say-two-go.part.txt").read_text() == '{"step": "two", "seconds": 0.5}\n'
        status = ctxlab("experiment", "status", "mine").out.splitlines()
        assert [line.split("python")[0].strip() for line in status[1:4]] == ["1. done", "2. exit code 3", "3. waiting"]
        (here / "fail-two").unlink()
        assert (ctxlab("experiment", "run", "mine").code, calls()) == (0, ["one", "two", "two", "three"])
        assert not (results / "say-two-go.part.txt").exists()

    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)], ids=lambda n: str(n)
    )
    def test_a_signal_stops_it_behind_its_child_and_the_same_line_goes_on(
        self, here: Path, number: signal.Signals, code: int
    ) -> None:
        running = started("run", "mine")
        wait_for(lambda: calls() == ["one", "two"])
        status = ctxlab("experiment", "status", "mine").out
        assert "2. running   python experiments/mine/say.py two go" in status
        running.send_signal(number)
        _, said = running.communicate(timeout=60)
        assert running.returncode == code, said
        assert "stopped: python experiments/mine/say.py two go\nTo go on, type the same line again." in said
        (here / "go").touch()
        assert (ctxlab("experiment", "run", "mine").code, calls()) == (0, ["one", "two", "two", "three"])

    def test_one_at_a_time_even_when_only_the_child_is_left(self, here: Path) -> None:
        running = started("run", "mine")
        wait_for(lambda: calls() == ["one", "two"])
        refused = ctxlab("experiment", "run", "mine")
        assert (refused.code, refused.errors[0].split(",")[0]) == (2, "mine: is running already")
        running.kill()
        running.wait()
        assert ctxlab("experiment", "run", "mine").code == 2
        (here / "go").touch()
        wait_for(lambda: not Journal(here / "runs", "mine").is_held())
        assert (ctxlab("experiment", "run", "mine").code, calls()) == (0, ["one", "two", "two", "three"])

    def test_they_are_told_where_results_go(self, here: Path) -> None:
        script = 'import os\nopen(os.environ["CTXLAB_RESULTS"] + "/figure.svg", "w").close()\n'
        (here / "experiments/mine/say.py").write_text(script)
        assert ctxlab("experiment", "run", "mine").code == 0
        assert (here / "experiments/mine/results/figure.svg").is_file()
        assert ctxlab("experiment", "run", "mine", "--to", "elsewhere").code == 0
        assert (here / "elsewhere/figure.svg").is_file()

    def test_a_report_shows_what_they_printed_and_where_results_are(self, here: Path) -> None:
        (here / "go").touch()
        assert ctxlab("experiment", "run", "mine", "--to", "elsewhere").code == 0
        assert not (here / "experiments/mine/results").exists()
        done = ctxlab("experiment", "report", "mine", "--to", "elsewhere")
        assert done.code == 0
        assert done.out.splitlines()[:3] == [
            "Does it?", "python experiments/mine/say.py one", '{"step": "one", "seconds": 0.5}',
        ]  # fmt: skip
        assert done.out.splitlines()[-1] == "results in elsewhere"

    def test_results_do_not_go_into_the_package(self, here: Path) -> None:
        folder = Path(package.__file__).parent / "experiments" / "mine" / "results"
        done = ctxlab("experiment", "run", "mine", "--to", str(folder))
        assert (done.code, calls()) == (2, [])
        assert "is inside the installed package" in done.err
        assert not folder.parent.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "mien"), "experiment: there is no study 'mien'; did you mean 'mine'?"),
        (("report", "extrapolaton"), "experiment: there is no study 'extrapolaton'; did you mean 'extrapolation'?"),
        (("rnu", "mine"), "experiment: expected list, run, status, report, got 'rnu'; did you mean 'run'?"),
        (("run",), "ctxlab experiment run: the following arguments are required: NAME"),
        (("run", "mine", "seed=2"), "seed: no line of the study has it"),
        (("run", "mine", "--fast"), "ctxlab experiment run: unrecognized arguments: --fast"),
        (("report", "mine"), "experiment: mine has no runs in runs; make them with: ctxlab experiment run mine"),
        (
            ("report", "extrapolation", "seed=2"),
            "seed=2: makes another study of extrapolation; say where its results go",
        ),
    ],
)
def test_bad_lines_are_refused_in_one(here: Path, words: tuple[str, ...], said: str) -> None:
    done = ctxlab("experiment", *words)
    assert (done.code, len(done.errors)) == (2, 1)
    assert done.errors[0].startswith(said)
    assert (calls(), (here / "runs").exists()) == ([], False)


def test_a_foreign_line_stops_all_of_them(here: Path) -> None:
    readme = here / "experiments/mine/README.md"
    readme.write_text(readme.read_text().replace("say.py three", "say.py three; touch x"))
    done = ctxlab("experiment", "run", "mine")
    assert (done.code, calls()) == (2, [])
    assert done.errors == [
        "experiments/mine/README.md:10: ';' is for a shell, and a study has none; in a value, put it in single quotes"
    ]


def test_a_line_that_cannot_be_is_refused_before_the_first_one(here: Path) -> None:
    make_study(
        here, "python experiments/mine/say.py one\nctxlab train model=nano context=abc", files={"say.py": SCRIPT}
    )
    done = ctxlab("experiment", "run", "mine")
    assert (done.code, calls()) == (2, [])
    assert done.errors[0] == "ctxlab train model=nano context=abc:"
    assert done.errors[1].startswith("context: ")


def test_the_list_and_the_help(here: Path) -> None:
    out = ctxlab("experiment", "list").out
    assert re.search(r"^mine +Does it\?\n +no results yet; takes a second; experiments/mine\n", out, re.MULTILINE)
    n_files = len(list((ROOT / "experiments/position_cost/results").iterdir()))
    assert re.search(
        rf"^position_cost +What does a positional scheme cost\?\n +results: {n_files} files; takes half an hour",
        out,
        re.MULTILINE,
    )
    for words in ((), ("--help",)):
        assert ctxlab("experiment", *words).out.startswith("Studies: a question, the lines that answer it")
    for word in ("list", "run", "status", "report"):
        assert ctxlab("experiment", word, "--help").out.startswith(f"usage: ctxlab experiment {word}")


def test_a_status_says_which_numbers_do_not_hold(here: Path) -> None:
    make_study(here, "ctxlab train", "It takes 1.5 times as long.")
    out = ctxlab("experiment", "status", "mine").out.splitlines()
    assert out[-2].startswith("experiments/mine/README.md:15: 1.5 names no row of results/")
    assert out[-1] == "its findings do not hold"
    assert (
        ctxlab("experiment", "status", "extrapolation")
        .out.splitlines()[-1]
        .startswith("32 numbers in its findings, all")
    )


class TestProgress:
    """How far a line is, from records made by hand."""

    @pytest.fixture
    def store(self, here: Path) -> RunStore:
        return RunStore(here / "runs")

    def of(self, store: RunStore, run: str, *ids: str, overrides: tuple[str, ...] = ()) -> tuple[str, str, list[str]]:
        """state, what is started, the ids, of a study's one line to which runs belong."""
        (line,) = with_overrides(make_study(Path.cwd(), run).lines(COMMANDS), overrides)
        journal = Journal(store.root, "mine")
        journal.began(line.text)
        for run_id in ids:
            journal.made(line.text, run_id)
        (one,) = progress([line], store, journal, Path("results"))
        return one.state, " ".join(one.words), [run.id for run in one.runs]

    def test_a_training(self, store: RunStore) -> None:
        run = make_run(store.root, status="interrupted")
        line = "ctxlab train seed=1"
        assert self.of(store, line, run.id) == ("interrupted", f"train resume={run.id}", [run.id])
        how = ("logger.mode=disabled",)
        assert self.of(store, line, overrides=how)[1] == f"train resume={run.id} logger.mode=disabled"
        run.update(status="done")
        assert self.of(store, line)[0] == "done"
        shutil.rmtree(run.path)
        assert self.of(store, line) == ("waiting", "train seed=1", [])

    def test_an_evaluation_starts_again(self, store: RunStore) -> None:
        runs = [make_run(store.root, status="killed"), make_run(store.root, status="failed")]
        line = "ctxlab eval run=x seed=1"
        assert self.of(store, line, *(run.id for run in runs)) == ("failed", "eval run=x seed=1", [runs[1].id])

    def test_a_sweep(self, store: RunStore) -> None:
        store.root.mkdir()
        name = new_sweep_id(store.root, "seed")
        statuses = ("done", "out_of_memory", "waiting")
        runs = [make_run(store.root, status=s, sweep={"id": name, "cell": n}) for n, s in enumerate(statuses)]
        ids = [run.id for run in runs]
        line = "ctxlab train -m seed=1,2,3 sweep.memory=1GiB"
        assert self.of(store, line, *ids)[0] == "waiting", "it was not written down whole"
        write_sweep(store.root, Sweep(id=name, command="train", line=line, swept=("seed",), cells=tuple(ids)))
        state, words, found = self.of(store, line, overrides=("sweep.jobs=2",))
        assert state == "1 done, 1 out_of_memory, 1 waiting"
        assert words == f"train sweep.resume={name} sweep.memory=1GiB sweep.jobs=2"
        assert found == ids
        for run in runs[1:]:
            run.update(status="skipped")
        assert self.of(store, line)[0] == "done"

    def test_another_line_is_another_one(self, store: RunStore) -> None:
        run = make_run(store.root, status="done")
        assert self.of(store, "ctxlab train seed=1", run.id)[0] == "done"
        assert self.of(store, "ctxlab train seed=2")[0] == "waiting"

    def test_what_makes_no_record_is_done_when_it_ended_well(self, store: RunStore) -> None:
        (line,) = make_study(Path.cwd(), "ctxlab show position=rope").lines(COMMANDS)
        journal = Journal(store.root, "mine")
        states = []
        for act in (lambda: None, lambda: journal.began(line.text), lambda: journal.ended(line.text, 1)):
            act()
            states.append(progress([line], store, journal, Path("results"))[0].state)
        journal.ended(line.text, 0)
        states.append(progress([line], store, journal, Path("results"))[0].state)
        assert states == ["waiting", "stopped", "exit code 1", "done"]


def test_a_report_of_repetitions_saves_its_rows_and_its_figure(here: Path) -> None:
    store = RunStore(here / "runs")
    runs = repetitions(store.root)
    (line,) = make_study(here, "ctxlab train -m position=rope,alibi seed=1,2,3").lines(COMMANDS)
    name = new_sweep_id(store.root, "seed")
    for cell, run in enumerate(runs):
        Journal(store.root, "mine").made(line.text, run.id)
        run.update(sweep=SweepCell(id=name, cell=cell))
    write_sweep(store.root, Sweep(name, "train", line.text, ("position", "seed"), tuple(run.id for run in runs)))

    done = ctxlab("experiment", "report", "mine")
    assert done.code == 0, done.err
    assert "nats/token, mean over seeds ±95%" in done.out
    results = here / "experiments/mine/results"
    for run in runs:
        assert (results / f"{run.id}.jsonl").read_text() == (run.path / "measurements.jsonl").read_text()
    assert "less rope" in (results / "report.txt").read_text()
    assert (results / "loss_by_length.png").read_bytes().startswith(b"\x89PNG")

    # What such a report is for: numbers that a README can say, and that are held to it.
    title = "nats_per_token 256 alibi difference"
    findings = f'ALiBi is [0.060 ± 0.025](results/summary.jsonl "{title}") nats below: [-0.060](results "{title}").'
    study = make_study(here, line.text, findings.replace("[0.060 ±", "[-0.060 ±"))
    assert check(study) == (3, [])
    assert len(check(make_study(here, line.text, findings))[1]) == 1, "it is below"


@pytest.mark.slow
def test_a_study_end_to_end(place: Path) -> None:
    """A sweep is interrupted in the middle of a cell and gone on with; what follows is run on its runs, and reported."""
    lines = (
        f"ctxlab train -m {' '.join(QUIET)} seed=1,2 trainer.max_steps=30 name=long",
        "ctxlab eval run=[long] logger.mode=disabled eval=perplexity eval.perplexity.max_tokens=1k",
        "ctxlab eval last logger.mode=disabled eval=perplexity eval.perplexity.max_tokens=1k",
        "python experiments/mine/say.py one",
    )
    make_study(place, "\n".join(lines).replace("trainer.max_steps=3 ", ""), files={"say.py": SCRIPT})
    before = {path.parent.name for path in place.glob("runs/*/run.json")}

    def in_the_second_cell() -> bool:
        records = [json.loads(path.read_text()) for path in place.glob("runs/*/run.json")]
        mine = {record["status"]: record for record in records if record["id"] not in before}
        return (
            "done" in mine and "running" in mine and (place / "runs" / mine["running"]["id"] / "metrics.jsonl").exists()
        )

    running = started("run", "mine")
    wait_for(in_the_second_cell, 300)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130, said

    done = ctxlab("experiment", "run", "mine")
    assert done.code == 0, done.err
    assert "ctxlab train sweep.resume=" in done.err
    runs = [run for run in RunStore(place / "runs").runs() if run.id not in before]
    assert sorted(run.record.command for run in runs) == ["eval", "eval", "train", "train"]
    assert all(run.record.experiment == "mine" and run.record.status == "done" for run in runs)
    trained = sorted((run for run in runs if run.record.command == "train"), key=lambda run: run.record.config["seed"])
    assert [run.record.attempt for run in trained] == [1, 2]
    several, one = sorted((r.record.config["run"] for r in runs if r.record.command == "eval"), key=len, reverse=True)
    assert sorted(several) == sorted(run.id for run in trained)
    assert one == [trained[1].id]

    again = ctxlab("experiment", "run", "mine", "logger.mode=disabled")
    assert (again.code, again.err.count("done already")) == (0, 4)
    assert "nats/token, mean over seeds ±95%" in again.out
    rows = [json.loads(row) for row in (place / "experiments/mine/results/summary.jsonl").read_text().splitlines()]
    mean, evaluated = (  # as trained, and as evaluated again: over the same tokens
        row for row in rows
        if row["name"] == "nats_per_token" and row["context"] == 64 and row["facts"].get("runs") == [r.id for r in trained]
        and row["axes"] == {"segment": 512} and row["protocol"] == "non-overlapping"
    )  # fmt: skip
    values = [m.value for run in trained for m in run.measurements() if m.name == "nats_per_token" and m.context == 64]
    assert mean["value"] == pytest.approx(sum(values) / 2, rel=1e-12)  # type: ignore[arg-type]
    assert evaluated["value"] == pytest.approx(mean["value"], rel=1e-5)
