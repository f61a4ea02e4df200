"""Small corpora, small runs, and runs in processes of their own, for the tests of training."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ctxlab.data.prepare import TextDataset, prepare
from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.dataset import TaskDataset
from ctxlab.data.tokenizers.base import TOKENIZERS
from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS
from ctxlab.records.schema import Measurement
from ctxlab.records.store import Run, RunStore
from ctxlab.train.loop import Outcome, TrainSettings, fit
from ctxlab.train.optim.base import OPTIMIZERS
from ctxlab.train.settings import TrainerConfig

CONTEXT = 32
TINY = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "d_ff": 32}
LIMIT = 240  # seconds for a command on a busy machine
# Seconds and speed of a row are this machine's, memory this process', the attempt the second one's after a resume.
MEASURED = ("seconds", "tokens_per_second", "peak_memory_bytes", "attempt")


def write_corpus(folder: Path, *, documents: int = 40, longest: int = 400, seed: int = 0) -> Path:
    """Documents of random words, every third shorter than a window of CONTEXT bytes."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 7))) for _ in range(60)]
    folder.mkdir(parents=True)
    for number in range(documents):
        size = draw.randint(8, CONTEXT - 8) if number % 3 == 0 else draw.randint(CONTEXT, longest)
        text = ""
        while len(text) < size:
            text += draw.choice(words) + " "
        (folder / f"{number:03}.txt").write_text(text[:size] + "\n")
    return folder


def dataset(tmp_path: Path, **corpus: Any) -> TextDataset:
    """A corpus of bytes below `tmp_path`, made once for one set of arguments."""
    name = "-".join(str(value) for value in corpus.values()) or "corpus"
    folder = tmp_path / f"text-{name}"
    if not folder.exists():
        write_corpus(folder, **corpus)
    data = SOURCES.get("text").Config(name="text", path=str(folder))
    return prepare(data, TOKENIZERS.get("byte").Config(name="byte"), cache=tmp_path / "cache")


def settings(
    *,
    optim: str = "adamw",
    position: str = "rope",
    attention: dict[str, Any] | None = None,
    context: int = CONTEXT,
    seed: int = 1,
    packed: bool = False,
    workers: int = 0,
    model: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **trainer: Any,
) -> TrainSettings:
    """A run of a very small decoder: eight steps of eight rows unless `trainer` says otherwise."""
    base = {
        "max_steps": 8, "batch_tokens": 8 * context, "micro_batch": 8, "precision": "fp32", "validate_every": "none",
        "checkpoint_every": "none",
    }  # fmt: skip
    return TrainSettings(
        model=ModelConfig(**{**TINY, **(model or {})}),
        position=POSITIONS.get(position).Config(name=position),
        attention=ATTENTIONS.config(attention or {"name": "full"}),
        optim=OPTIMIZERS.get(optim).Config(**{"name": optim, "warmup_steps": 2, **(optimizer or {})}),
        trainer=TrainerConfig(**{**base, **trainer}),
        seed=seed,
        context=context,
        packed=packed,
        workers=workers,
    )


@dataclass
class Rows:
    """A sink that keeps the rows it is given."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def metrics(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def measure(self, measurements: Sequence[Measurement]) -> None: ...
    def image(self, name: str, path: Path) -> None: ...
    def finish(self, exit_code: int) -> None: ...

    def of(self, split: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["split"] == split]


@dataclass
class Trained:
    """What a run left behind."""

    outcome: Outcome
    rows: Rows
    folder: Path

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.outcome.model.state_dict().items()}


def train(
    tmp_path: Path, data: TextDataset | TaskDataset, config: TrainSettings, name: str = "run", **how: Any
) -> Trained:
    """Trains in this process, with checkpoints below `tmp_path`."""
    rows = Rows()
    folder = tmp_path / name
    how = {"console": Console(file=open(os.devnull, "w"))} | how  # noqa: SIM115
    outcome = fit(config, data, folder=folder, sink=rows, **how)
    return Trained(outcome, rows, folder)


@dataclass
class Ended:
    """How a command in a process of its own ended."""

    code: int  # negative: the signal that killed it
    stdout: str
    stderr: str


def command(
    tmp_path: Path,
    *argv: str,
    at_step: int | None = None,
    number: signal.Signals = signal.SIGKILL,
    before: Callable[[], None] | None = None,
) -> Ended:
    """`ctxlab ARGV` in a fresh process, which gets signal `number` as soon as the row of `at_step` is written.

    SIGINT and SIGTERM go to its whole process group, as those of a terminal do; SIGKILL to it alone. `before`, a
    function of a module, is called in that process first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ctxlab.cli.commands.train"])
    out, err = tmp_path / "out", tmp_path / "err"
    process = context.Process(target=_command, args=(argv, tmp_path, at_step, number, before))
    process.start()
    process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, out.read_text(), err.read_text())


def _command(
    argv: Sequence[str], folder: Path, at_step: int | None, number: int, before: Callable[[], None] | None
) -> None:
    from ctxlab.cli.main import main
    from ctxlab.records.sinks import RunSink

    os.setpgid(0, 0)
    os.chdir(folder)
    os.environ["CTXLAB_CACHE"] = str(folder / "cache")
    for path, target in (("out", 1), ("err", 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
    log: Callable[[Any, dict[str, Any]], None] = RunSink.metrics

    def log_and_die(sink: RunSink, row: dict[str, Any]) -> None:
        log(sink, row)
        if row["split"] == "train" and row["step"] == at_step:
            if number == signal.SIGKILL:
                os.kill(os.getpid(), number)
            else:
                os.killpg(0, number)

    RunSink.metrics = log_and_die  # type: ignore[method-assign]
    if before is not None:
        before()
    sys.argv[:] = ["ctxlab", *argv]
    sys.exit(main(argv))


def rank_rows(
    tmp_path: Path, config: TrainSettings, world: int, name: str = "ranks", resume: bool = False
) -> list[list[dict[str, Any]]]:
    """The rows that each rank of a distributed run was given, each rank a process of its own on `data` below tmp_path."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ctxlab.cli.commands.train"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outs = [tmp_path / f"rank{rank}.json" for rank in range(world)]
    processes = [
        context.Process(target=_rank, args=(tmp_path, config, rank, world, port, out, name, resume))
        for rank, out in enumerate(outs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world
    return [json.loads(out.read_text()) for out in outs]


def _rank(
    tmp_path: Path, config: TrainSettings, rank: int, world: int, port: int, out: Path, name: str, resume: bool
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world)
    )
    out.write_text(json.dumps(train(tmp_path, dataset(tmp_path), config, name, resume=resume).rows.rows))


@contextlib.contextmanager
def started(tmp_path: Path, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a user starts it, in a process group of its own, whose processes are all gone afterwards."""
    environment = {**os.environ, "CTXLAB_CACHE": str(tmp_path / "cache"), "CTXLAB_TRACEBACK": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "ctxlab", *argv], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
        deadline = time.monotonic() + 20
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert members(process.pid) == []
    finally:
        if members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def members(group: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def ended(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=LIMIT)
    return Ended(process.returncode, out, err)


def wait_for_step(run: Path, step: int) -> None:
    """Waits until the row of a step is in the metrics of a run."""
    deadline = time.monotonic() + LIMIT
    file = run / "metrics.jsonl"
    while time.monotonic() < deadline:
        rows = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        if any(json.loads(row)["step"] >= step for row in rows):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {run}")


def the_run_soon(tmp_path: Path) -> Run:
    """The run of a command that has just been started."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        with contextlib.suppress(ValueError):
            return the_run(tmp_path)
        time.sleep(0.05)
    raise AssertionError(f"no run in {tmp_path}")


def line(tmp_path: Path, *more: str, name: str = "run") -> list[str]:
    """A `train` line of a very small run, without evaluation, profile and mirror unless `more` says so."""
    if not (tmp_path / "text").exists():
        write_corpus(tmp_path / "text")
    words = [
        "model=nano", *(f"model.{key}={value}" for key, value in TINY.items()), f"context={CONTEXT}",
        "data=text", f"data.path={tmp_path / 'text'}", "tokenizer=byte", "optim.warmup_steps=2", "trainer=smoke",
        f"trainer.batch_tokens={8 * CONTEXT}", "trainer.precision=fp32", "eval=none", "profile.contexts=none",
        "logger.mode=disabled", f"name={name}",
    ]  # fmt: skip
    said = {word.partition("=")[0] for word in more}
    return ["train", *(word for word in words if word.partition("=")[0] not in said), *more]


def the_run(tmp_path: Path, name: str = "run") -> Run:
    """The one run of a name."""
    (found,) = [run for run in RunStore(tmp_path / "runs").runs() if run.record.name == name]
    return found


def raw_rows(run: Run) -> list[dict[str, Any]]:
    """Every row of metrics.jsonl as it was written, those of all attempts."""
    return [json.loads(text) for text in (run.path / "metrics.jsonl").read_text().splitlines()]


def computed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what is measured rather than computed."""
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def last_files(run: Run) -> Path:
    """The folder of the last checkpoint."""
    return run.checkpoints / (run.checkpoints / "last").read_text().strip()
