"""A study's lines, one after another: how far each is, how it goes on, and the child process that does it.

A child runs in a session of its own and the signals of its parent are passed on to it, once each: what saves a training on
Ctrl-C saves it here, and a study that is started again takes up the line that it was at.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.text import Text

from ctxlab.cli import console
from ctxlab.cli.main import COMMANDS, DIED, DONE, INTERRUPTED, REFUSED, TERMINATED
from ctxlab.cli.start import RECORDED
from ctxlab.config.overrides import key_of, split
from ctxlab.errors import ConfigError, CtxlabError, RecordError
from ctxlab.launch import FINAL, read_sweep
from ctxlab.records.journal import LINE, STUDY, Entry, Journal
from ctxlab.records.store import Run, RunStore
from ctxlab.study.readme import Line, Study, asks_for_several, selected, with_overrides, with_runs
from ctxlab.study.results import save_runs
from ctxlab.study.script import RESULTS

_STOPS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGHUP: TERMINATED}


@dataclass(frozen=True)
class Progress:
    """How far a line is. `words` are what `ctxlab` (or `python`) is given to do the rest of it."""

    line: Line
    state: str  # done | running | waiting, or how its runs ended
    runs: tuple[Run, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        return self.state == "done"


def read_lines(study: Study, overrides: Sequence[str]) -> list[Line]:
    """A study's lines, with the overrides of whoever runs it. Raises ConfigError before anything starts."""
    return with_overrides(study.lines([command.name for command in COMMANDS]), overrides)


def progress(lines: Sequence[Line], store: RunStore, journal: Journal, results: Path) -> list[Progress]:
    """How far each line is, from the journal and the records that are there; of a script, from its output in `results`."""
    entries = journal.entries()
    held = journal.is_held()
    found: list[Progress] = []
    for line in lines:
        one = _progress(line, entries.get(line.text, Entry()), store, results)
        entry = entries.get(line.text)
        if held and not one.is_done and entry is not None and entry.began and entry.code is None:
            one = Progress(line, "running", one.runs, one.words)
        found.append(one)
    return found


def _progress(line: Line, entry: Entry, store: RunStore, results: Path) -> Progress:
    fresh = (*line.words, *line.how)
    runs = [run for run_id in entry.runs if (run := _opened(store, run_id)) is not None]
    if line.command not in RECORDED:
        return Progress(line, _ended(line, entry, results), tuple(runs), fresh)
    if not runs:
        return Progress(line, "waiting", (), fresh)
    newest = runs[-1]
    if newest.record.sweep is not None:
        return _sweep_progress(line, newest.record.sweep.id, store, fresh)
    status = newest.record.status
    if status != "done" and line.command == "train":
        # What it was asked for is in its record; how it is run may have changed.
        return Progress(line, status, (newest,), ("train", f"resume={newest.id}", *line.how))
    return Progress(line, status, (newest,), fresh)


def _ended(line: Line, entry: Entry, results: Path) -> str:
    """The state of a line that makes no record of its own: what its process ended with."""
    if not entry.began:
        return "waiting"
    if entry.code == DONE:
        return "done" if line.program == "ctxlab" or (results / line.output).is_file() else "waiting"
    return "stopped" if entry.code is None else f"exit code {entry.code}"


def _sweep_progress(line: Line, sweep_id: str, store: RunStore, fresh: tuple[str, ...]) -> Progress:
    """A sweep goes on with its unfinished cells; one that was not written down whole starts again."""
    try:
        runs = tuple(store.open(run_id) for run_id in read_sweep(store.root, sweep_id).cells)
    except RecordError:
        return Progress(line, "waiting", (), fresh)
    statuses = [run.record.status for run in runs]
    if set(statuses) <= set(FINAL):
        return Progress(line, "done", runs)
    said = split(line.command, line.words[1:])
    hands = [word for word in said.overrides if key_of(word).startswith("sweep.")]
    words = (line.command, f"sweep.resume={sweep_id}", *hands, *said.launcher, *line.how)
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    return Progress(line, counts, runs, words)


def _opened(store: RunStore, run_id: str) -> Run | None:
    try:
        return store.open(run_id)
    except RecordError:  # removed, or never written
        return None


@dataclass
class Runner:
    """Works through a study: what is done stays, what was stopped goes on, the first failure ends it."""

    study: Study
    lines: Sequence[Line]
    store: RunStore
    results: Path
    environment: dict[str, str]
    _stopped: list[int] = field(default_factory=list)
    _child: subprocess.Popen[str] | None = None

    def run(self) -> int:
        """Runs every line that is not done. The exit code of the first that fails, 130 and 143 when stopped."""
        journal = Journal(self.store.root, self.study.name)
        out = console.stderr()
        with journal.held() as lock, self._signals():
            for number, line in enumerate(self.lines):
                all_of_them = progress(self.lines, self.store, journal, self.results)
                now = all_of_them[number]
                head = f"[{number + 1}/{len(self.lines)}] "
                if now.is_done:
                    ids = f": {', '.join(run.id for run in now.runs)}" if now.runs else ""
                    out.print(Text(f"{head}done already: {line.text}{ids}"), soft_wrap=True)
                    continue
                if any(run.record.status == "running" for run in now.runs):
                    raise RecordError(f"{self.study.name}: {line.text}: is running in another process")
                words = self._words(now, [run for one in all_of_them[:number] for run in one.runs])
                out.print(Text(f"{head}{line.program} {shlex.join(words)}", style="bold"), soft_wrap=True)
                journal.began(line.text)
                code = self._start(line, words, lock)
                journal.ended(line.text, code)
                now = progress(self.lines, self.store, journal, self.results)[number]
                save_runs(now.runs, self.results)
                if self._stopped or code != DONE:
                    self._say_how_it_goes_on(now, code)
                    return _STOPS[signal.Signals(self._stopped[0])] if self._stopped else code
        return DONE

    def _words(self, now: Progress, earlier: Sequence[Run]) -> tuple[str, ...]:
        """What a line is started with; runs that it asks for are looked for among those of the lines before it."""
        if now.words != (*now.line.words, *now.line.how):
            return now.words
        asked = selected(now.line)
        chosen = {
            key: [run_id for name in names for run_id in _chosen(name, earlier, asks_for_several(now.line, key))]
            for key, names in asked.items()
        }
        return (*with_runs(now.line, chosen), *now.line.how)

    def _start(self, line: Line, words: Sequence[str], lock: int) -> int:
        located = [self.study.located(word) for word in words]
        environment = {**self.environment, STUDY: self.study.name, LINE: line.text}
        if line.program == "ctxlab":
            return self._wait([sys.executable, "-m", "ctxlab", *located], environment, lock)
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment[RESULTS] = str(self.results.resolve())
        return self._wait([sys.executable, *located], environment, lock, self.results / line.output)

    def _wait(self, command: list[str], environment: dict[str, str], lock: int, output: Path | None = None) -> int:
        """Runs one child to its end; what it prints goes to a file too, which gets its name when it is whole."""
        if self._stopped:
            return DIED
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=None if output is None else subprocess.PIPE, env=environment,
            text=True, encoding="utf-8", errors="replace", start_new_session=True, pass_fds=(lock,),
        ) as child:  # fmt: skip
            self._child = child
            try:
                if self._stopped:  # between the two
                    os.killpg(child.pid, signal.SIGTERM)
                if output is not None:
                    self._copy(child, output)
                code = child.wait()
            finally:
                self._child = None
                if child.poll() is None:  # our own end: the child's too
                    os.killpg(child.pid, signal.SIGTERM)
        if output is not None and code == DONE:
            os.replace(_part(output), output)
        return code if code >= 0 else DIED

    def _copy(self, child: subprocess.Popen[str], output: Path) -> None:
        assert child.stdout is not None
        with _part(output).open("w", encoding="utf-8") as file:
            for text in child.stdout:
                file.write(text)
                file.flush()
                sys.stdout.write(text)
                sys.stdout.flush()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """While lines run, a signal goes to the child: it saves and ends, and the study stops behind it."""

        def pass_on(number: int, frame: FrameType | None) -> None:
            self._stopped.append(number)
            if self._child is None:
                return
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

        before = {number: signal.getsignal(number) for number in _STOPS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup means it
                signal.signal(number, pass_on)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _say_how_it_goes_on(self, now: Progress, code: int) -> None:
        what = "stopped" if self._stopped else f"exit code {code}"
        out = console.stderr()
        out.print(Text(f"{what}: {now.line.text}"), soft_wrap=True)
        for run in now.runs:
            if run.record.status not in FINAL and run.record.reason:
                out.print(Text(f"{run.id}: {run.record.status}: {run.record.reason}"), soft_wrap=True)
        out.print(Text("To go on, type the same line again."), soft_wrap=True)


def check_lines(waiting: Sequence[Progress], study: Study) -> None:
    """Composes and checks every line that is to come, in a process that is gone afterwards.

    Lines that ask for runs are left to their turn: their runs may be made by the lines before them. Raises ConfigError.
    """
    to_check = [
        [study.located(word) for word in one.words]
        for one in waiting
        if one.line.command in RECORDED and one.words == (*one.line.words, *one.line.how) and not selected(one.line)
    ]
    if not to_check:
        return
    done = subprocess.run(
        [sys.executable, "-m", "ctxlab", "_check", json.dumps(to_check)], capture_output=True, text=True, check=False
    )
    if done.returncode != DONE:
        said = done.stderr.partition("error: ")[2] or f"the lines of {study.name} cannot be checked: {done.stderr}"
        raise ConfigError("\n".join(line.strip() for line in said.strip().splitlines()))


def check_composed(lines: Sequence[Sequence[str]]) -> int:
    """What that process does: one message for all lines that cannot be, each behind its line."""
    from ctxlab.config.prepare import prepare

    wrong = []
    for command, *words in lines:
        try:
            prepare(split(command, words))
        except CtxlabError as error:
            wrong += [f"ctxlab {command} {shlex.join(words)}:", *str(error).splitlines()]
    if wrong:
        console.error("\n".join(wrong))
    return REFUSED if wrong else DONE


def _chosen(name: str, earlier: Sequence[Run], several: bool) -> list[str]:
    """A selector as ids, where it means runs of earlier lines; as it is where it means another.

    Raises ConfigError for `last` where no earlier line has made weights, and for a prefix of several runs where one is
    asked for.
    """
    trained = [run for run in earlier if run.record.status == "done" and run.has_weights]
    if name == "last":
        if not trained:
            raise ConfigError("last: no line before this one has made a run with weights")
        return [max(trained, key=lambda run: run.record.started or "").id]
    found = [run.id for run in trained if run.id.startswith(name)]
    if len(found) > 1 and not several:
        listed = ", ".join(found)
        raise ConfigError(f"run: '{name}' begins {len(found)} runs of the lines before: {listed}; all are run=[{name}]")
    return found or [name]


def _part(output: Path) -> Path:
    """Where a script's output grows until it is whole."""
    return output.with_suffix(f".part{output.suffix}")
