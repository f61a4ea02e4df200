"""`ctxlab experiment`: the studies listed, run line by line, looked at, reported on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ctxlab.cli.flags import FlagParser, runs_folder
from ctxlab.errors import ConfigError
from ctxlab.registry import nearest

if TYPE_CHECKING:
    from ctxlab.cli.study import Progress
    from ctxlab.study.readme import Study

_SHOWN = 20  # numbers that do not hold, in a status
WORDS = ("list", "run", "status", "report")
USAGE = """Studies: a question, the lines that answer it, and findings whose numbers are held to their results.

  ctxlab experiment list                        each study, its question, whether it has results, how long it takes
  ctxlab experiment run NAME [key=value]        its lines, one after another; the same line again goes on where it stopped
  ctxlab experiment status NAME [key=value]     which lines are done, with their runs; whether its README's numbers hold
  ctxlab experiment report NAME [key=value]     the comparison of its runs, with means over seeds, printed and saved

A study is a folder experiments/NAME with a README.md: those that ctxlab ships, and your own where you stand."""
_RUN = """Runs the lines under *Run* in a study's README, one after another, and then reports on them.

Lines whose runs are done are left as they are, a sweep or a training that was stopped goes on. Overrides go to every line
whose command knows their key. logger.* and sweep.* say how lines are run (logger.mode=online, sweep.jobs=4); any other
makes another study of it, whose results go to a folder of their own (--to)."""
_STATUS = "Which lines of a study are done, which run, which wait; and whether its README's numbers are in its results."
_REPORT = "The comparison of a study's runs, means over seeds and their intervals: printed, and saved in its results."


def run(argv: list[str]) -> int:
    """Does what one `ctxlab experiment` line says and returns its exit code."""
    words = {"list": _list, "run": _run, "status": _status, "report": _report}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] not in words:
        raise ConfigError(f"experiment: expected {', '.join(WORDS)}, got '{argv[0]}'{nearest(argv[0], WORDS)}")
    return words[argv[0]](argv[1:])


def check(argv: list[str]) -> int:
    """`ctxlab _check JSON`, hidden: composes lines and says which cannot be."""
    import json

    from ctxlab.cli.study import check_composed

    return check_composed(json.loads(argv[0]))


def _list(argv: list[str]) -> int:
    FlagParser("ctxlab experiment list", "Each study: its question, its results, how long its lines take.").read(argv)
    from rich.text import Text

    from ctxlab.cli import console
    from ctxlab.study.readme import folders, studies

    found = studies()
    if not found:
        raise ConfigError(f"experiment: there are no studies in {' or '.join(map(str, folders()))}")
    out = console.stdout()
    width = max(map(len, found))
    for name, study in found.items():
        out.print(Text.assemble((f"{name:<{width}}  ", "bold"), study.question), soft_wrap=True)
        facts = [_results_of(study), f"takes {study.takes}" if study.takes else "", str(study.folder)]
        out.print(Text(f"{'':<{width}}  {'; '.join(fact for fact in facts if fact)}", style="dim"), soft_wrap=True)
    return 0


def _run(argv: list[str]) -> int:
    given = _parser("run", _RUN).read(argv)
    from ctxlab.cli.study import Runner, check_lines, progress, read_lines
    from ctxlab.records.journal import Journal
    from ctxlab.records.store import RunStore
    from ctxlab.study.readme import find
    from ctxlab.study.results import make_folder

    study = find(given.name)
    lines = read_lines(study, given.overrides)
    results = _results(study, given.to, given.overrides)
    store = RunStore(runs_folder(given))
    journal = Journal(store.root, study.name)
    waiting = [one for one in progress(lines, store, journal, results) if not one.is_done]
    check_lines(waiting, study)
    make_folder(results)
    environment = {**os.environ, **({"CTXLAB_RUNS": str(store.root)} if given.runs else {})}
    code = Runner(study, lines, store, results, environment).run()
    if code == 0:
        _report_on(study, progress(lines, store, journal, results), results, scripts=False)  # they have just been seen
    return code


def _status(argv: list[str]) -> int:
    given = _parser("status", _STATUS).read(argv)
    from rich.text import Text

    from ctxlab.cli import console
    from ctxlab.cli.study import progress, read_lines
    from ctxlab.records.journal import Journal
    from ctxlab.records.store import RunStore
    from ctxlab.study.claims import check as check_claims
    from ctxlab.study.readme import find

    study = find(given.name)
    store = RunStore(runs_folder(given))
    results = _results(study, given.to, given.overrides)
    found = progress(read_lines(study, given.overrides), store, Journal(store.root, study.name), results)
    out = console.stdout()
    out.print(Text(study.question, style="bold"), soft_wrap=True)
    for number, one in enumerate(found, start=1):
        out.print(Text(f"{number}. {one.state:<9} {one.line.text}"), soft_wrap=True)
        for run in one.runs:
            reason = f": {run.record.reason}" if run.record.reason else ""
            out.print(Text(f"   {run.record.status:<9} {run.id}{reason}", style="dim"), soft_wrap=True)
    done = sum(one.is_done for one in found)
    out.print(Text(f"{done} of {len(found)} lines done, over the runs in {store.root}"), soft_wrap=True)
    claimed, wrong = check_claims(study)
    for problem in wrong[:_SHOWN]:
        out.print(Text(problem), soft_wrap=True)
    if len(wrong) > _SHOWN:
        out.print(Text(f"and {len(wrong) - _SHOWN} more"))
    held = (
        f"{claimed} numbers in its findings, all of them in {study.results}"
        if not wrong
        else "its findings do not hold"
    )
    out.print(Text(held if claimed or wrong else "no findings yet"), soft_wrap=True)
    return 0


def _report(argv: list[str]) -> int:
    given = _parser("report", _REPORT).read(argv)
    from ctxlab.cli.study import progress, read_lines
    from ctxlab.records.journal import Journal
    from ctxlab.records.store import RunStore
    from ctxlab.study.readme import find
    from ctxlab.study.results import make_folder

    study = find(given.name)
    results = _results(study, given.to, given.overrides)
    store = RunStore(runs_folder(given))
    found = progress(read_lines(study, given.overrides), store, Journal(store.root, study.name), results)
    if not any(one.runs or one.is_done for one in found):
        again = " ".join([f"ctxlab experiment run {study.name}", *given.overrides])
        raise ConfigError(f"experiment: {study.name} has no runs in {store.root}; make them with: {again}")
    make_folder(results)
    _report_on(study, found, results, scripts=True)
    return 0


def _report_on(study: Study, found: Sequence[Progress], results: Path, *, scripts: bool) -> None:
    """Prints the comparison and saves it with all that it is made of."""
    from rich.text import Text

    from ctxlab.cli import console
    from ctxlab.study.results import save_report, show_study

    runs = [run for one in found for run in one.runs]
    out = console.stdout()
    out.print(Text(study.question, style="bold"), soft_wrap=True)
    show_study(runs, out)
    for one in found:
        output = results / one.line.output
        if scripts and one.line.program == "python" and output.is_file():
            out.print(Text(one.line.text, style="bold"), soft_wrap=True)
            out.print(Text(output.read_text(encoding="utf-8", errors="replace").rstrip("\n")), soft_wrap=True)
    save_report(study.name, runs, results)
    waiting = sum(not one.is_done for one in found)
    if waiting:
        out.print(Text(f"{waiting} of {len(found)} lines are not done: ctxlab experiment status {study.name}"))
    out.print(Text(f"results in {results}"), soft_wrap=True)


def _parser(word: str, text: str) -> FlagParser:
    parser = FlagParser(f"ctxlab experiment {word}", text)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="on every line whose command knows the key")
    parser.add_argument("--to", metavar="DIR", help="where its results are (experiments/NAME/results, where you stand)")
    return parser


def _results(study: Study, to: str | None, overrides: Sequence[str]) -> Path:
    """Where results go. Raises ConfigError where they would be mixed with a study's own, or with the package's files."""
    from ctxlab.study.readme import FOLDER, changes_what_is_computed

    changing = [override for override in overrides if changes_what_is_computed(override)]
    if changing and not to:
        raise ConfigError(f"{changing[0]}: makes another study of {study.name}; say where its results go: --to DIR")
    folder = Path(to).expanduser() if to else Path(FOLDER) / study.name / "results"
    package = Path(__file__).resolve().parents[2]
    if folder.resolve().is_relative_to(package):
        raise ConfigError(f"experiment: {folder} is inside the installed package; say where results go: --to DIR")
    return folder


def _results_of(study: Study) -> str:
    """What a study has of results, here or as it was shipped."""
    from ctxlab.study.readme import FOLDER

    for where in (Path(FOLDER) / study.name / "results", study.results):
        count = sum(1 for path in where.glob("*") if not path.name.startswith("."))
        if count:
            return f"results: {count} files"
    return "no results yet"
