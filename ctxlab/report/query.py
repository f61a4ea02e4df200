"""What `ctxlab runs` asks of records: a value by its name, filters like `position=alibi` and `perplexity<40`, order."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ctxlab.errors import RecordError
from ctxlab.records.index import Result, Summary
from ctxlab.records.run import Run
from ctxlab.records.schema import METRICS
from ctxlab.registry import nearest
from ctxlab.units import parse_bytes, parse_count, parse_length, parse_seconds

# What a record says of itself, beside its config and its results.
FIELDS: dict[str, Callable[[Summary], Any]] = {
    "run": lambda run: run.id,
    "name": lambda run: run.record.name,
    "command": lambda run: run.record.command,
    "status": lambda run: run.record.status,
    "reason": lambda run: run.record.reason or None,
    "started": lambda run: run.record.started,
    "finished": lambda run: run.record.finished,
    "wall_seconds": lambda run: run.record.wall_seconds,
    "attempt": lambda run: run.record.attempt,
    "parent": lambda run: run.record.parent,
    "sweep": lambda run: run.record.sweep.id if run.record.sweep else None,
    "cell": lambda run: run.record.sweep.cell if run.record.sweep else None,
    "experiment": lambda run: run.record.experiment,
    "tags": lambda run: list(run.record.tags),
    "note": lambda run: run.record.note or None,
    "parameters": lambda run: run.record.parameters.get("all"),
    "commit": lambda run: run.record.provenance.commit,
    "device": lambda run: run.record.provenance.device,
    "precision": lambda run: run.record.provenance.precision,
}
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_FILTER = re.compile(r"(?P<key>[A-Za-z_][\w.@]*)\s*(?P<sign><=|>=|!=|=|<|>)\s*(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One run and the context it was trained at, its own or that of the run it evaluates."""

    run: Summary
    trained: int | None

    @property
    def settings(self) -> dict[str, Any]:
        return self.run.settings

    def result(self, name: str, context: int | None) -> Result | None:
        """A result at a context; at the trained one, or of no context, where none is asked for."""
        results = self.run.results
        return results.get((name, context or self.trained)) or (None if context else results.get((name, None)))


@dataclass(frozen=True)
class Key:
    """A name that every row answers to: a field of the record, a setting, or a metric (at a context)."""

    name: str
    kind: str  # field | setting | metric
    context: int | None = None

    def value(self, row: Row) -> Any:
        """The plain value: text, a number, a list of words; None where there is none."""
        if self.kind == "field":
            return FIELDS[self.name](row.run)
        if self.kind == "setting":
            return row.settings.get(self.name)
        found = row.result(self.name, self.context)
        return None if found is None else found.value

    def parse(self, text: str) -> float:
        """A number as the user writes it here: `2k` of a length, `1GiB` of memory, `2h` of a time, `5M` of a count."""
        try:
            return float(text)
        except ValueError:
            pass
        unit = METRICS[self.name].unit if self.kind == "metric" else "s" if self.name.endswith("seconds") else ""
        by_unit: dict[str, Callable[[str], float]] = {"B": parse_bytes, "s": parse_seconds, "s/token": parse_seconds}
        read = parse_length if self.name.endswith("context") else by_unit.get(unit, parse_count)
        return read(text)


def as_json(runs: Sequence[Run]) -> str:
    """Whole records, where they are, and their results, for programs."""
    listed = [
        {
            **run.record.model_dump(mode="json", by_alias=True),
            "path": str(run.path),
            "measurements": [m.model_dump(mode="json") for m in run.measurements()],
        }
        for run in runs
    ]
    return json.dumps(listed, indent=1, ensure_ascii=False)


def rows(runs: Sequence[Summary]) -> list[Row]:
    """A row a run; an evaluation's trained context is that of the run it evaluates."""
    contexts = {run.id: run.context for run in runs}
    return [Row(run, run.context if run.context is not None else contexts.get(run.record.parent or "")) for run in runs]


def find_key(text: str, table: Sequence[Row]) -> Key:
    """The key of a name: `status`, `position`, `model.d_model` (or `d_model`), `perplexity`, `perplexity@2k`.

    Raises RecordError naming the nearest.
    """
    name, _, at = text.partition("@")
    if name in METRICS:
        try:
            return Key(name, "metric", parse_length(at) if at else None)
        except ValueError as error:
            raise RecordError(f"{text}: {error}") from error
    if text in FIELDS:
        return Key(text, "field")
    known = {key for row in table for key in row.settings}
    if text in known:
        return Key(text, "setting")
    ending = sorted(key for key in known if key.endswith(f".{text}"))
    if len(ending) == 1:
        return Key(ending[0], "setting")
    if ending:
        raise RecordError(f"{text}: which of {', '.join(ending)}?")
    hint = nearest(text, {*FIELDS, *METRICS, *known, *(key.rpartition(".")[2] for key in known)})
    raise RecordError(f"{text}: no run has a setting, field or metric of that name{hint if 'mean' in hint else ''}")


def matching(table: Sequence[Row], filters: Iterable[str]) -> list[Row]:
    """The rows that fit every filter; a bare word is looked for in ids, tags, sweeps and experiments."""
    found = list(table)
    for text in filters:
        fits = _filter(text, table)
        found = [row for row in found if fits(row)]
    return found


def ordered(table: Sequence[Row], key: Key, *, reverse: bool) -> list[Row]:
    """Rows by a value, those without one last."""
    having = [row for row in table if key.value(row) is not None]
    values = {type(key.value(row)) for row in having}
    plain = values <= {int, float, bool} or values <= {str}
    having.sort(key=lambda row: key.value(row) if plain else str(key.value(row)), reverse=reverse)
    return having + [row for row in table if key.value(row) is None]


def _filter(text: str, table: Sequence[Row]) -> Callable[[Row], bool]:
    parts = _FILTER.fullmatch(text)
    if parts is None:
        return lambda row: _mentions(row.run, text)
    key = find_key(parts["key"], table)
    sign, wanted = parts["sign"], parts["value"]
    if sign in _OPERATORS:
        return _comparison(key, sign, wanted)
    choices = wanted.split(",")
    return lambda row: any(_equal(key, key.value(row), choice) for choice in choices) == (sign == "=")


def _comparison(key: Key, sign: str, wanted: str) -> Callable[[Row], bool]:
    compare = _OPERATORS[sign]
    if key.name in ("started", "finished"):  # times are text that sorts
        return lambda row: (value := key.value(row)) is not None and compare(value, wanted)
    try:
        bound = key.parse(wanted)
    except ValueError as error:
        raise RecordError(f"{key.name}{sign}{wanted}: {error}") from error
    return lambda row: isinstance(value := key.value(row), int | float) and compare(value, bound)


def _equal(key: Key, value: Any, wanted: str) -> bool:
    if isinstance(value, list):
        return wanted in map(str, value)
    if value is None:
        return wanted == "none" and key.kind != "setting"  # a setting that is `none` says so itself
    if isinstance(value, bool):
        return wanted.lower() == str(value).lower()
    if isinstance(value, int | float):
        try:
            return value == key.parse(wanted)
        except ValueError:
            return False
    return str(value) == wanted


def _mentions(run: Summary, word: str) -> bool:
    record = run.record
    names = (record.id, record.experiment or "", record.sweep.id if record.sweep else "")
    return word in record.tags or any(word in name for name in names)
