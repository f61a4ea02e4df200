"""Sweeps with real cells: one process, one record and one W&B run each; killed, gone on with, limited."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ctxlab.launch import Pool, read_sweep
from ctxlab.records.run import Run
from ctxlab.records.schema import is_headline
from ctxlab.records.store import RunStore
from tests.cli.lines import SMALL, Outcome, ctxlab
from tests.records import leet

QUIET = (*SMALL, "logger.mode=disabled")


def cells(sweep_id: str | None = None) -> list[Run]:
    """The cells of the one sweep (or of this one), in order."""
    store = RunStore(Path("runs"))
    (name,) = [sweep_id] if sweep_id else [path.name for path in Path("runs/sweeps").iterdir()]
    return [store.open(run_id) for run_id in read_sweep(store.root, name).cells]


def wait_for(what: str, patience: float = 300.0) -> None:
    """Waits until some cell of the one sweep is done and another one is running."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if any(Path("runs/sweeps").glob("*/sweep.json")):
            statuses = [run.record.status for run in cells()]
            if "done" in statuses and any(run.record.status == "running" and run.metrics() for run in cells()):
                return
        time.sleep(0.1)
    raise AssertionError(f"{what}: {[run.record.status for run in cells()]}")


def elsewhere(*words: str) -> Outcome:
    """`ctxlab WORDS...` in a process of its own: one that loads a plugin leaves it registered."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, "-m", "ctxlab", *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    return Outcome(done.returncode, done.stdout, done.stderr)


def processes_in(folder: Path, patience: float = 30.0) -> list[str]:
    """The command lines of other processes that work in a folder, after giving them a while to end. Linux only."""
    deadline = time.monotonic() + patience
    while True:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                other = entry.name.isdigit() and int(entry.name) != os.getpid()
                if other and (entry / "cwd").readlink().is_relative_to(folder.resolve()):
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue  # it ended while we looked, or is not ours
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_where_it_was(place: Path) -> None:
    """The parent is killed without a chance to say so; its cells end by themselves, and the sweep takes them up again."""
    line = [sys.executable, "-m", "ctxlab", "train", "-m", *SMALL, "seed=1,2,3", "sweep.jobs=2", "trainer.max_steps=12"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        wait_for("a cell that is done and one that runs")
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 60
    while any(run.record.status == "running" for run in cells()) and time.monotonic() < deadline:
        time.sleep(0.2)
    before = cells()
    assert len(before) == 3, "no record is lost"
    if Path("/proc/self/cwd").exists():
        assert processes_in(place) == [], "no process is left over"
    sweep_id = before[0].path.resolve().parent / "sweeps"
    (name,) = (path.name for path in sweep_id.iterdir())
    statuses = [run.record.status for run in before]
    assert "done" in statuses
    assert set(statuses) <= {"done", "killed", "waiting"}
    assert len(set(statuses)) > 1

    gone_on = ctxlab("train", f"sweep.resume={name}", "sweep.jobs=2")
    assert gone_on.code == 0, gone_on.err
    for was, now in zip(before, cells(name), strict=True):
        assert now.record.status == "done"
        assert now.metrics()[-1]["step"] == 12
        if was.record.status == "done":
            assert now.record == was.record, "what was done stays as it was"
        if was.record.status == "killed" and was.has_weights:
            assert now.record.attempt == was.record.attempt + 1
    assert f"sweep {name} in runs/sweeps/{name}" in gone_on.out
    assert Path(f"runs/sweeps/{name}/loss_by_length.png").is_file()

    fresh = [run for was, run in zip(before, cells(name), strict=True) if was.record.status in ("done", "waiting")]
    for run in fresh:
        (head,) = leet.inspect(run.path)["run"]
        assert (head["run_id"], head["run_group"]) == (run.id, name)


def test_limits_end_a_cell_and_not_the_sweep(place: Path) -> None:
    """Time: the cell is still importing. Memory: less than a Python with torch takes."""
    for limit, status, reason in (
        ("sweep.timeout=1s", "timed_out", "sweep.timeout: longer than 1 s"),
        ("sweep.memory=50MB", "out_of_memory", "47.7 MiB allowed"),
    ):
        before = {path.name for path in Path("runs").glob("sweeps/*")}
        done = ctxlab("train", "-m", *QUIET, "seed=1,2", "sweep.jobs=2", limit)
        assert done.code == 1
        (name,) = {path.name for path in Path("runs").glob("sweeps/*")} - before
        records = [run.record for run in cells(name)]
        assert [record.status for record in records] == [status, status]
        assert all(reason in record.reason for record in records)
        assert f"ctxlab train sweep.resume={name} sweep.jobs=2 {limit}" in done.err
        assert all(f"({record.id}): {record.reason}" in done.out for record in records)


def test_a_cell_that_cannot_run_is_a_result(place: Path) -> None:
    """Its documents are too short for one cell: that one fails with the reason and runs again when the sweep goes on."""
    small = [word for word in SMALL if not word.startswith("eval.")]
    words = ("context=64,16k", "trainer.batch_tokens=16384", "trainer.max_steps=1", "eval=none", "sweep.jobs=2")
    done = ctxlab("train", "-m", *small, *words)
    assert done.code == 1
    short, long = cells()
    assert (short.record.status, long.record.status) == ("done", "failed")
    reason = "context: 16384 is longer than every document of the train split"
    assert long.record.reason.startswith(reason)
    assert f"failed 16384 ({long.id}): {reason}" in done.out
    assert short.record.sweep is not None
    name = short.record.sweep.id
    assert f"ctxlab train sweep.resume={name} sweep.jobs=2" in done.err
    for run, code in ((short, 0), (long, 2)):
        records = leet.inspect(run.path)
        assert (records["run"][0]["run_id"], records["run"][0]["run_group"]) == (run.id, name)
        assert records["exit"][0].get("exit_code", 0) == code

    assert ctxlab("train", f"sweep.resume={name}").code == 1
    again_short, again_long = cells(name)
    assert again_short.record == short.record, "what is done stays as it is"
    assert (again_long.record.status, again_long.record.attempt) == ("failed", 2)


def test_a_sweep_goes_on_only_as_it_was_written_down(place: Path) -> None:
    done = ctxlab("train", "-m", *QUIET, "model.head_dim=33,35")
    assert done.code == 0
    assert [run.record.status for run in cells()] == ["skipped", "skipped"]
    (name,) = (path.name for path in Path("runs/sweeps").iterdir())
    same = ctxlab("train", "-m", *QUIET, "model.head_dim=33,35", f"sweep.resume={name}")
    assert same.code == 0, same.err
    for words, said in (
        (
            ("model.head_dim=33,37",),
            f"cell 1 of {name} was written down with another config: model.head_dim is 37 here",
        ),
        (("model.head_dim=33,35,37",), f"this line has 3 cells, {name} has 2; to go on with it as it is: ctxlab train"),
    ):
        other = ctxlab("train", "-m", *QUIET, *words, f"sweep.resume={name}")
        assert other.code == 2
        assert said in other.errors[0]
    other = ctxlab("profile", f"sweep.resume={name}")
    assert (other.code, other.errors) == (2, [f"sweep.resume: {name} is a sweep of ctxlab train"])
    Path(f"runs/sweeps/{name}/sweep.json").write_text(json.dumps({"id": name}))
    other = ctxlab("train", f"sweep.resume={name}")
    assert other.code == 2
    assert f"sweep.resume: runs/sweeps/{name}/sweep.json is no sweep" in other.errors[0]


@pytest.mark.slow
def test_twelve_cells_of_which_four_end_badly(place: Path) -> None:
    """Each outcome is a result, none takes another cell along; what is left runs again, and nothing else does."""
    plugin = str(Path(__file__).with_name("faulty.py"))
    faults = ("a", "raises", "b", "hangs", "c", "dies", "d", "hoards", "e", "f", "g", "h")
    limits = ("sweep.jobs=2", "sweep.timeout=2min", "sweep.memory=1.5GiB")
    words = (*QUIET, "eval.ngram=none", "position=faulty", f"position.fault={','.join(faults)}")
    done = elsewhere("train", "-m", "--plugin", plugin, *words, *limits)
    assert done.code == 1, done.err
    runs = dict(zip(faults, cells(), strict=True))
    bad = {
        "raises": ("failed", "RuntimeError: told to raise (traceback in "),
        "hangs": ("timed_out", "sweep.timeout: longer than 2:00 min"),
        "dies": ("killed", "killed by SIGKILL, often the system's way to free memory"),
        "hoards": ("out_of_memory", "sweep.memory: "),
    }
    for fault, run in runs.items():
        status, reason = bad.get(fault, ("done", ""))
        assert run.record.status == status, (fault, run.record)
        assert run.record.reason.startswith(reason)
        row = next(line for line in done.out.splitlines() if line.startswith(f"{fault} ") and line.endswith(run.id))
        assert status in row.split()
        if fault in bad:
            assert f"{status} {fault} ({run.id}): {run.record.reason}" in done.out
    needed = re.search(
        r"1.5 GiB allowed; a training step was predicted to need ([\d.]+) GiB", runs["hoards"].record.reason
    )
    assert needed is not None
    assert float(needed[1]) >= 8, "the table that it hoards is 8 GiB"
    assert 'raise RuntimeError("told to raise")' in done.err, "the end of its log"

    texts = {fault: (run.path / "run.json").read_bytes() for fault, run in runs.items()}
    Path("cured").touch()
    (name,) = (path.name for path in Path("runs/sweeps").iterdir())
    again = elsewhere("train", f"sweep.resume={name}", *limits)
    assert again.code == 0, again.err
    assert f"sweep {name}: 12 cells, 4 to run" in again.err
    for fault, run in runs.items():
        assert run.reload().status == "done"
        assert run.record.attempt == (2 if fault in bad else 1)
        assert ((run.path / "run.json").read_bytes() == texts[fault]) == (fault not in bad)


@pytest.mark.parametrize(("given", "threads"), [(None, "4"), ("3", "3")])
def test_cells_side_by_side_share_the_cores(
    place: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, threads: str
) -> None:
    """Unless the user has said how many threads there are to be."""
    seen = []

    def execute(pool: Pool, runs: Sequence[Run]) -> None:
        seen.append(os.environ["OMP_NUM_THREADS"])
        for run in runs:
            run.finish("failed", "not started")

    monkeypatch.setattr(Pool, "execute", execute)
    monkeypatch.setattr("ctxlab.cli.environment.available_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    ctxlab("train", "-m", *QUIET, "seed=1,2,3", "sweep.jobs=2")
    assert seen == [threads]


@pytest.mark.parametrize(
    "launcher",
    [
        ("hydra/launcher=basic",),
        ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    ],
)
@pytest.mark.slow
def test_another_launcher_runs_the_same_cells(launcher: tuple[str, ...], place: Path) -> None:
    """Hydra counts; the cells are those that were written down, and the line's own settings reach the launcher."""
    if launcher[0] != "hydra/launcher=basic":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    few = ("trainer.max_steps=1", "trainer.batch_tokens=64", "eval=perplexity", "eval.perplexity.max_tokens=256")
    done = ctxlab("train", "-m", *SMALL, *few, "position=rope,nope", "logger.mode=disabled", *launcher)
    assert done.code == 0, done.err
    (sweep,) = (json.loads(path.read_text(encoding="utf-8")) for path in place.glob("runs/sweeps/*/sweep.json"))
    records = [json.loads((place / "runs" / cell / "run.json").read_text(encoding="utf-8")) for cell in sweep["cells"]]
    assert [(r["status"], r["config"]["position"]["name"], r["sweep"]["cell"]) for r in records] == [
        ("done", "rope", 0), ("done", "nope", 1),
    ]  # fmt: skip
    assert not (place / "multirun").exists()
    assert not (place / "outputs").exists()
    assert "rise 1x-4x" in done.out


@pytest.mark.slow
def test_a_sweep_goes_on_under_another_launcher(place: Path) -> None:
    done = ctxlab("train", "-m", *SMALL, "position=rope,nope", "logger.mode=disabled")
    assert done.code == 0, done.err
    (sweep,) = (json.loads(path.read_text(encoding="utf-8")) for path in place.glob("runs/sweeps/*/sweep.json"))
    first, second = (place / "runs" / cell / "run.json" for cell in sweep["cells"])
    before = first.read_text(encoding="utf-8")
    record = json.loads(second.read_text(encoding="utf-8"))
    second.write_text(json.dumps({**record, "status": "killed"}), encoding="utf-8")
    done = ctxlab("train", f"sweep.resume={sweep['id']}", "hydra/launcher=basic")
    assert done.code == 0, done.err
    assert "1 cells to run, by hydra/launcher=basic" in done.err
    assert json.loads(second.read_text(encoding="utf-8"))["status"] == "done"
    assert first.read_text(encoding="utf-8") == before


@pytest.mark.slow
def test_cells_of_several_processes_side_by_side(place: Path) -> None:
    """Each cell's ranks join that cell: two cells of two ranks each, at once, and two runs come of it."""
    words = (*QUIET, "eval=perplexity", "trainer.devices=2", "trainer.strategy=ddp", "seed=1,2", "sweep.jobs=2")
    done = elsewhere("train", "-m", *words)
    assert done.code == 0, done.err
    runs = cells()
    assert [(run.record.status, run.record.config["seed"]) for run in runs] == [("done", 1), ("done", 2)]
    for run in runs:
        steps = [row["step"] for row in run.metrics() if row["split"] == "train"]
        assert steps == sorted(set(steps))
        assert steps[-1] == 3
    made = {path.parent.name for path in Path("runs").glob("*/run.json")}
    assert len(made - {run.id for run in runs}) == 1, "the run that was there before"
    if Path("/proc/self/cwd").exists():
        assert processes_in(place) == []


@pytest.mark.slow
def test_the_mirrors_alone_give_every_curve_of_a_sweep(place: Path) -> None:
    """Perplexity and memory by context of each cell, and loss by tokens, from its .wandb file and nothing else."""
    words = [word for word in SMALL if not word.startswith("profile.")]
    done = ctxlab("train", "-m", *words, "eval=perplexity", "profile.contexts=[64,128]", "position=rope,alibi")
    assert done.code == 0, done.err
    for run in cells():
        rows = leet.history(leet.inspect(run.path))
        for drawn, axis, wanted in (
            ("eval/perplexity", "context", by_context(run, "perplexity")),
            ("scaling/peak_memory_bytes", "context", by_context(run, "peak_memory_bytes")),
            ("train/loss", "tokens", [(r["tokens"], r["loss"]) for r in run.metrics() if r["split"] == "train"]),
        ):
            assert [(row[axis], row[drawn]) for row in rows if drawn in row] == wanted
            assert len(wanted) > 1


def by_context(run: Run, name: str) -> list[tuple[int | None, float | None]]:
    return [(m.context, m.value) for m in run.measurements() if m.name == name and is_headline(m.axes)]
