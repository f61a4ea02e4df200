"""`ctxlab report`: runs, sweeps and studies as one page that opens without a network, and as pictures. Reads files only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ctxlab.cli.flags import FlagParser, runs_folder
from ctxlab.errors import ConfigError, RecordError

if TYPE_CHECKING:
    from ctxlab.records.run import Run
    from ctxlab.records.store import RunStore
    from ctxlab.report.subjects import Subject

_HELP = """One page of what runs come to, in a file that needs nothing else: figures, tables, provenance, the lines to repeat it.

what it is about, any number of them; none: every run
  RUN          an id, a unique prefix of one, a path, or `last`; evaluations of it are taken along
  SWEEP        the id of a sweep: all its cells
  EXPERIMENT   a study: its runs that are here, else the results that it has saved"""


def run(argv: list[str]) -> int:
    """Writes the page and the pictures of one `ctxlab report` line. Raises RecordError for what is not there."""
    parser = FlagParser("ctxlab report", _HELP)
    parser.add_argument("what", nargs="*", metavar="RUN|SWEEP|EXPERIMENT")
    parser.add_argument("-o", "--output", metavar="FILE", default="report.html", help="the page (default report.html)")
    parser.add_argument("--figures", metavar="DIR", help="every figure as SVG and PNG too")
    parser.add_argument("--title", metavar="TEXT", help="instead of what it is about")
    given = parser.read(argv)
    output = Path(given.output).expanduser()
    if output.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output: expected a name that ends in .html, got '{given.output}'")
    if not output.parent.is_dir():
        raise ConfigError(f"--output: there is no folder {output.parent}")
    from ctxlab.cache import default_cache
    from ctxlab.records.store import RunStore
    from ctxlab.report.figures import figures, save_figures
    from ctxlab.report.page import page, summary, tell
    from ctxlab.report.vega import bundle

    store = RunStore(runs_folder(given))
    subjects = _subjects(store, given.what)
    found = figures(subjects)
    heading = given.title or ", ".join(given.what) or f"All runs in {store.root}"
    text = page(tell(subjects, found), heading=heading, facts=summary(subjects), script=bundle(default_cache()))
    output.write_text(text, encoding="utf-8")
    if given.figures:
        folder = Path(given.figures).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        pictures = save_figures(found, folder)
        print(f"{len(pictures)} pictures of {len(found)} figures in {folder}")
    print(f"{len(subjects)} run{'' if len(subjects) == 1 else 's'}, {len(found)} figures: {output}")
    return 0


def _subjects(store: RunStore, what: Sequence[str]) -> list[Subject]:
    """What the words mean, in their order, nothing twice."""
    from ctxlab.report.subjects import subjects_in, subjects_of, with_evaluations

    every = store.runs()
    if not what:
        if not every:
            raise RecordError(f"report: there are no runs in {store.root} yet; make one with: ctxlab train")
        return subjects_of(every[::-1])
    runs: list[Run] = []
    saved: list[Subject] = []
    for word in what:
        found = [run for run in every if word in _names(run)]
        if found:
            runs += sorted(found, key=_place)
            continue
        results = _results(word)
        if results is not None:
            saved += subjects_in(results)
            continue
        try:
            runs.append(store.resolve(word))
        except RecordError as error:
            raise RecordError(f"{error}; no sweep and no experiment is called so either") from error
    known = {run.id: run for run in every}
    subjects = [*subjects_of(with_evaluations(runs, every), known), *saved]
    if not subjects:
        raise RecordError(f"report: {', '.join(what)}: nothing has been recorded of it yet")
    return subjects


def _names(run: Run) -> tuple[str | None, str | None]:
    """What a run belongs to."""
    record = run.record
    return (record.sweep.id if record.sweep else None), record.experiment


def _place(run: Run) -> tuple[str, int]:
    sweep = run.record.sweep
    return (sweep.id, sweep.cell) if sweep else ("", 0)


def _results(word: str) -> Path | None:
    """The saved results of a study of this name: here, or of those that ctxlab ships."""
    from ctxlab.study.readme import studies

    study = studies().get(word)
    return study.results if study is not None and study.results.is_dir() else None
