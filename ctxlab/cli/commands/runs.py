"""`ctxlab runs`: the run records listed, shown, compared, tagged, noted, thrown away. Reads files only."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlab.cli.flags import FlagParser, runs_folder
from ctxlab.errors import RecordError

if TYPE_CHECKING:
    from ctxlab.records.run import Run
    from ctxlab.records.store import RunStore
    from ctxlab.report.query import Key, Row

_COLUMNS = (
    "run", "status", "started", "bits_per_byte", "perplexity", "nats_per_token", "wall_seconds", "tags",
)  # fmt: skip
_LIMIT = 50
_LIST_HELP = """The run records, newest first.

filters, all of which must fit:
  position=alibi  context=256,2k  seed!=1  d_model>=256      a setting of the config
  status=done  command=train  tags=long  sweep=ID            a field of the record
  perplexity<40  nats_per_token@2k<4  peak_memory_bytes<1GiB a result, at the trained context or another
  extrapolation                                              a word in the id, a tag, the sweep or the experiment

a run is an id, a unique prefix of one, a path, or `last` (the newest with weights)"""
_EXAMPLES = """other words:
  ctxlab runs show RUN             one run: what it is, its results, its curve
  ctxlab runs diff RUN RUN...      what differs in settings and results
  ctxlab runs tag RUN TAG...       words to find it by; --remove takes them away
  ctxlab runs note RUN TEXT        a sentence about it
  ctxlab runs rm RUN...            into .trash of the runs folder
  ctxlab runs restore RUN...       back from there"""


def run(argv: list[str]) -> int:
    """Does what one `ctxlab runs` line says and returns its exit code. Raises RecordError for what it cannot do."""
    if argv and argv[0] in WORDS:
        return WORDS[argv[0]](argv[1:])
    return _list(argv)


def _parser(word: str, text: str, epilog: str | None = None) -> FlagParser:
    return FlagParser(f"ctxlab runs{word}", text, epilog)


def _store(given: argparse.Namespace) -> RunStore:
    from ctxlab.records.store import RunStore

    return RunStore(runs_folder(given))


def _list(argv: list[str]) -> int:
    parser = _parser("", _LIST_HELP, _EXAMPLES)
    parser.add_argument("filters", nargs="*", metavar="FILTER")
    parser.add_argument("--sort", metavar="KEY", help="by a setting, field or result; those without it last")
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    parser.add_argument("--columns", metavar="KEY,KEY", help=f"instead of {','.join(_COLUMNS)}")
    parser.add_argument("--limit", type=int, metavar="N", help=f"at most N; 0: all (default {_LIMIT}; files: all)")
    parser.add_argument("--json", action="store_true", help="whole records and results, for programs")
    parser.add_argument("--csv", action="store_true", help="the columns, numbers in SI units, for spreadsheets")
    parser.add_argument("--watch", action="store_true", help="as they go, drawn again every two seconds, until Ctrl-C")
    given = parser.read(argv)
    if given.limit is not None and given.limit < 0:
        raise RecordError(f"ctxlab runs: --limit: expected a number >= 0, got {given.limit}")
    from ctxlab.records.index import RunIndex
    from ctxlab.report import query

    index = RunIndex(runs_folder(given))
    if given.watch:
        from ctxlab.cli import console
        from ctxlab.cli.watch import watch

        return watch(
            index,
            lambda runs: [row.run for row in _chosen(given, query.rows(runs))],
            console.stdout(),
            limit=given.limit,
        )
    table = query.rows(index.summaries())
    if not table:
        print(f"no runs in {index.root} yet; make one with: ctxlab train", file=sys.stderr)
        return 0
    found = _chosen(given, table)
    to_file = given.json or given.csv
    limit = given.limit if given.limit is not None else 0 if to_file else _LIMIT
    shown = found[:limit] if limit else found
    names = given.columns.split(",") if given.columns else list(_COLUMNS)
    keys = [query.find_key(name.strip(), table) for name in names]
    if given.json:
        _print_json(shown, keys if given.columns else None)
    elif given.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_plain(key.value(row)) for key in keys] for row in shown)
    else:
        _print_table(shown, keys, chosen=bool(given.columns), of=len(found))
    return 0


def _chosen(given: argparse.Namespace, table: Sequence[Row]) -> list[Row]:
    """The rows that fit the filters, in the order that is asked for."""
    from ctxlab.report import query

    found = query.matching(table, given.filters)
    if given.sort:
        return query.ordered(found, query.find_key(given.sort, table), reverse=given.reverse)
    return found[::-1] if given.reverse else found


def _print_json(shown: Sequence[Row], keys: Sequence[Key] | None) -> None:
    from ctxlab.report.query import as_json

    if keys is None:
        print(as_json([row.run.run() for row in shown]))
        return
    listed = [{_heading(key, exact=True): key.value(row) for key in keys} for row in shown]
    print(json.dumps(listed, indent=1, ensure_ascii=False))


def _print_table(shown: Sequence[Row], keys: Sequence[Key], *, chosen: bool, of: int) -> None:
    from ctxlab.cli import console
    from ctxlab.report.grid import Grid

    cells = [[_cell(key, row) for key in keys] for row in shown]
    kept = [n for n in range(len(keys)) if chosen or n < 3 or any(row[n] not in ("-", "") for row in cells)]
    words = {"run", "name", "command", "status", "reason", "started", "finished", "tags", "note", "parent", "sweep"}
    grid = Grid([_heading(keys[n]) for n in kept], stack=chosen)
    grid.left = frozenset(place for place, n in enumerate(kept) if keys[n].name in words)
    for row in cells:
        grid.add([row[n] for n in kept])
    if shown:
        console.stdout().print(grid)
    else:
        print("no run fits", file=sys.stderr)
    if of > len(shown):
        print(f"{len(shown)} of {of} runs; --limit 0 shows all", file=sys.stderr)


def _heading(key: Key, *, exact: bool = False) -> str:
    from ctxlab.report.results import title

    at = f"@{key.context}" if key.context else ""
    if exact:
        return key.name + at
    return {"wall_seconds": "took"}.get(key.name, title(key.name) if key.kind == "metric" else key.name) + at


def _cell(key: Key, row: Row) -> str:
    from ctxlab.report.results import cell
    from ctxlab.units import format_count, format_length, format_seconds

    if key.kind == "metric":
        found = row.result(key.name, key.context)
        return cell(None if found is None else found.measurement())
    value = key.value(row)
    if value is None:
        return "-"
    if key.name in ("started", "finished"):
        return datetime.fromisoformat(value).astimezone().strftime("%Y-%m-%d %H:%M")
    if key.name == "wall_seconds":
        return format_seconds(value)
    if key.name == "parameters":
        return format_count(value)
    if key.name == "context":
        return format_length(value)
    return str(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else value


def _show(argv: list[str]) -> int:
    parser = _parser(" show", "One run: what it is, its results at every context, its curve, its settings.")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--json", action="store_true", help="the whole record and its results, for programs")
    given = parser.read(argv)
    from ctxlab.cli import console
    from ctxlab.records.index import RunIndex
    from ctxlab.report.query import as_json
    from ctxlab.report.screens import show_run

    store = _store(given)
    found = store.resolve(given.run)
    if given.json:
        print(as_json([found]))
        return 0
    show_run(found, RunIndex(store.root).summaries(), console.stdout())
    return 0


def _diff(argv: list[str]) -> int:
    parser = _parser(" diff", "What differs between runs: their settings, and their results side by side.")
    parser.add_argument("runs_to_compare", nargs="+", metavar="RUN")
    given = parser.read(argv)
    if len(given.runs_to_compare) < 2:
        raise RecordError("ctxlab runs diff: expected two runs or more")
    from ctxlab.cli import console
    from ctxlab.report.screens import show_difference

    store = _store(given)
    show_difference([store.resolve(selector) for selector in given.runs_to_compare], console.stdout())
    return 0


def _tag(argv: list[str]) -> int:
    parser = _parser(" tag", "Gives a run tags, words to find it by.")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("tags", nargs="+", metavar="TAG")
    parser.add_argument("--remove", action="store_true", help="takes them away instead")
    given = parser.read(argv)
    found = _store(given).resolve(given.run)
    before = found.record.tags
    if given.remove:
        missing = [tag for tag in given.tags if tag not in before]
        if missing:
            raise RecordError(f"tag: {found.id} has no tag '{missing[0]}' (it has: {', '.join(before) or 'none'})")
        tags = tuple(tag for tag in before if tag not in given.tags)
    else:
        tags = tuple(dict.fromkeys((*before, *given.tags)))
    found.update(tags=tags)
    print(f"{found.id}: {', '.join(tags) or 'no tags'}")
    return 0


def _note(argv: list[str]) -> int:
    parser = _parser(" note", "Writes a sentence about a run into its record, in place of the one that is there.")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("text", nargs="+", metavar="TEXT")
    given = parser.read(argv)
    found = _store(given).resolve(given.run)
    found.update(note=" ".join(given.text).strip())
    print(f"{found.id}: {found.record.note or 'no note'}")
    return 0


def _remove(argv: list[str]) -> int:
    parser = _parser(" rm", "Moves runs into .trash of the runs folder; ctxlab runs restore brings them back.")
    parser.add_argument("runs_to_remove", nargs="+", metavar="RUN")
    given = parser.read(argv)
    store = _store(given)
    found: dict[Path, Run] = {}
    for selector in given.runs_to_remove:
        resolved = store.resolve(selector)
        if resolved.record.status == "running":
            raise RecordError(f"run: {resolved.id} is running; stop it first")
        found[resolved.path.resolve()] = resolved
    for each in found.values():
        print(f"{each.id}: moved to {store.remove(each)}")
    return 0


def _restore(argv: list[str]) -> int:
    parser = _parser(" restore", "Brings runs back from .trash, each by its id or a unique prefix of it.")
    parser.add_argument("runs_to_restore", nargs="+", metavar="RUN")
    given = parser.read(argv)
    store = _store(given)
    for name in given.runs_to_restore:
        found = store.restore(name)
        print(f"{found.id}: back in {found.path}")
    return 0


WORDS = {"show": _show, "diff": _diff, "tag": _tag, "note": _note, "rm": _remove, "restore": _restore}
