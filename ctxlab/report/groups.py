"""Runs taken together: what tells them apart, those that differ by their seed alone as one, with means and intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlencode

from ctxlab.errors import ConfigError
from ctxlab.evaluation.intervals import ratio_interval
from ctxlab.records.schema import Measurement
from ctxlab.registry import nearest
from ctxlab.report.results import way_of
from ctxlab.report.subjects import Curve, Subject
from ctxlab.units import format_length

METRICS = ("perplexity", "nats_per_token", "bits_per_byte", "word_perplexity")
MOST_COLOURS = 7  # that are told apart in one panel
_MOST_PANELS = 12
_FIRST = ("position", "extension", "model", "context", "attention")  # the keys that people compare by
_NO_PART = {"depth", "part", "from", "task", "top", "baseline", "late"}  # of what is by context, but not that alone


@dataclass(frozen=True)
class View:
    """What of the runs is looked at, and how. `group` are the keys that runs are taken together by; none: those that tell."""

    runs: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    metric: str = "perplexity"
    smooth: float = 0.0
    log_x: bool = False
    log_y: bool = False
    outliers: bool = True
    filter: str = ""  # words that a run of the table has to have
    sort: str = ""  # a column of the table, `:descending` behind it

    @classmethod
    def of_query(cls, query: Mapping[str, str]) -> View:
        """The view that a URL's query says. Raises ConfigError for what is none."""
        metric = query.get("metric") or "perplexity"
        if metric not in METRICS:
            raise ConfigError(f"metric: expected {', '.join(METRICS)}, got '{metric[:80]}'{nearest(metric, METRICS)}")
        try:
            smooth = float(query.get("smooth") or 0)
        except ValueError:
            smooth = math.nan
        if not 0 <= smooth < 1:
            raise ConfigError(f"smooth: expected a number from 0 to below 1, got '{query['smooth'][:80]}'")
        log = query.get("log", "")
        return cls(
            runs=_words(query.get("runs")),
            group=_words(query.get("group")),
            metric=metric,
            smooth=smooth,
            log_x="x" in log,
            log_y="y" in log,
            outliers=query.get("outliers") != "hide",
            filter=query.get("filter", ""),
            sort=query.get("sort", ""),
        )

    def query(self) -> str:
        """The same as a query, what is as by default left out."""
        said = {
            "runs": ",".join(self.runs),
            "group": ",".join(self.group),
            "metric": "" if self.metric == "perplexity" else self.metric,
            "smooth": f"{self.smooth:g}" if self.smooth else "",
            "log": "x" * self.log_x + "y" * self.log_y,
            "outliers": "" if self.outliers else "hide",
            "filter": self.filter,
            "sort": self.sort,
        }
        return urlencode({key: value for key, value in said.items() if value}, safe=",")


AS_IT_IS = View()


@dataclass
class Group:
    """Subjects that are drawn as one. `colour` is what its line is known by in its `panel`; `label` says both."""

    label: str
    colour: str
    panel: str
    members: list[Subject]

    @property
    def trained(self) -> int | None:
        return self.members[0].trained


class Point(NamedTuple):
    """A mean over `n` subjects at x, with its 95% interval where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    n: int = 1


def grouped(subjects: Sequence[Subject], view: View = AS_IT_IS) -> list[Group]:
    """The groups of a view, key by key: numbers by size, names in order of first appearance.

    Where there are more than can be told apart by colour, one key gives the colour and the others a panel each.
    """
    keys = list(view.group) or telling(subjects)
    by_key: dict[str, list[Subject]] = {}
    for one in subjects:
        by_key.setdefault(json.dumps([one.settings.get(key) for key in keys], default=str), []).append(one)
    values = {key: list(dict.fromkeys(shown(one, key) for one in subjects)) for key in keys}
    colour_key = next((key for key in keys if 1 < len(values[key]) <= MOST_COLOURS), None)
    rest = [key for key in keys if key != colour_key]
    panels = {panel_of(one, rest) for one in subjects}
    if len(by_key) <= MOST_COLOURS or colour_key is None or len(panels) > _MOST_PANELS:
        rest = []
    groups = []
    ranks = {key: _ranks([one.settings.get(key) for one in subjects]) for key in keys}
    for members in sorted(
        by_key.values(), key=lambda some: [ranks[key][repr(some[0].settings.get(key))] for key in keys]
    ):
        first = members[0]
        label = panel_of(first, keys) or _alone(members)
        colour = label if not rest else shown(first, colour_key or "")
        groups.append(Group(label, colour, panel_of(first, rest), members))
    return groups


class Set(Protocol):
    """Whatever has settings."""

    @property
    def settings(self) -> Mapping[str, Any]: ...


def telling(subjects: Sequence[Set], differ: Sequence[str] | None = None) -> list[str]:
    """The settings, but for the seed, by which subjects can be told apart: each separates some that those before it do not.

    `differ` are the keys that may, where that is known.
    """
    flats = [one.settings for one in subjects]
    differ = differing(flats) if differ is None else differ
    parts = [""] * len(subjects)
    found = []
    for key in dict.fromkeys((*(key for key in _FIRST if key in differ), *differ)):
        if key == "seed":
            continue
        texts = [repr(flat.get(key)) for flat in flats]
        finer = [f"{part}\n{text}" for part, text in zip(parts, texts, strict=True)]
        if len(set(finer)) > len(set(parts)):
            found.append(key)
            parts = finer
    return found


def _ranks(values: Sequence[Any]) -> dict[str, int]:
    """The place of each value: numbers by size, whatever else in order of first appearance."""
    several = list(dict.fromkeys(map(repr, values)))
    by_text = {repr(value): value for value in values}
    if all(isinstance(by_text[text], int | float) for text in several):
        several.sort(key=lambda text: by_text[text])
    return {text: n for n, text in enumerate(several)}


def differing(flats: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all."""
    keys = dict.fromkeys(chain.from_iterable(flats))
    return [key for key in keys if any(flat.get(key) != flats[0].get(key) for flat in flats)]


def shown(one: Set, key: str) -> str:
    """A setting as a label says it."""
    value = one.settings.get(key, "-")
    if key == "context" and isinstance(value, int):
        return format_length(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def panel_of(one: Set, keys: Sequence[str]) -> str:
    """The values of some settings in one line, the names of those whose values say little by themselves before them."""
    words = []
    for key in keys:
        value = shown(one, key)
        plain = key in ("position", "extension", "model", "attention", "run", "tokenizer")
        words.append(value if plain else f"{key.rpartition('.')[2]} {value}")
    return ", ".join(words)


def _alone(members: Sequence[Subject]) -> str:
    first = members[0]
    if len(members) == 1:
        return first.whose or first.id
    return str(first.run.record.name) if first.run is not None else first.id


def mean(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean and its 95% interval by Student's t; one value has no interval."""
    low, high = ratio_interval(values, [1.0] * len(values)) or (None, None)
    return sum(values) / len(values), low, high


def by_context(group: Group, name: str, way: Mapping[str, Any] | None = None, *, log: bool = False) -> list[Point]:
    """A metric of a group by context: means over its members; of one member its own interval, over documents."""
    return averaged(
        [
            [
                (m.context, m)
                for m in one.measurements
                if m.name == name and m.context and not _NO_PART & m.axes.keys() and way_of(m.axes) == (way or {})
            ]
            for one in group.members
        ],
        log=log,
    )


def averaged(each: Iterable[Sequence[tuple[float, Measurement]]], *, log: bool = False) -> list[Point]:
    """(x, result) of each member -> the means by x; `log`: of logarithms, which is for what is never below 0."""
    found: dict[float, list[Measurement]] = {}
    for rows in each:
        for x, m in dict(rows).items():
            if m.value is not None:
                found.setdefault(x, []).append(m)
    points = []
    for x, at in sorted(found.items()):
        if len(at) == 1:
            points.append(Point(x, at[0].value or 0.0, at[0].low, at[0].high))
        else:
            values = [m.value or 0.0 for m in at]
            in_logs = log and min(values) > 0
            point = Point(x, *mean([math.log(value) for value in values] if in_logs else values), len(at))
            points += mapped([point], math.exp) if in_logs else [point]
    return points


def mapped(points: Sequence[Point], change: Callable[[float], float]) -> list[Point]:
    """Points whose values and intervals are changed by a rising function."""
    return [
        Point(
            p.x, change(p.y), None if p.low is None else change(p.low), None if p.high is None else change(p.high), p.n
        )
        for p in points
    ]


def average_curve(curves: Sequence[Curve]) -> list[Point]:
    """The mean of curves over the tokens that all of them have seen; between its points a curve is straight."""
    curves = [curve for curve in curves if curve]
    if len(curves) == 1:
        return [Point(x, y) for x, y in curves[0]]
    if not curves:
        return []
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    finest = max(curves, key=len)
    points = []
    for x in (x for x, _ in finest if first <= x <= last):
        value, low, high = mean([_at(curve, x) for curve in curves])
        points.append(Point(x, value, low, high, len(curves)))
    return points


def smoothed(curve: Curve, weight: float) -> Curve:
    """An exponential average, s_k = w s_(k-1) + (1 - w) y_k from 0, over 1 - w^k, which takes the start out of it."""
    if not weight:
        return curve
    total, found = 0.0, []
    for k, (x, y) in enumerate(curve, start=1):
        total = weight * total + (1 - weight) * y
        found.append((x, total / (1 - weight**k)))
    return found


def thinned(curve: Curve, most: int) -> Curve:
    """At most so many points: the means of as many equal stretches, each at its last x."""
    if len(curve) <= most:
        return curve
    found = []
    for n in range(most):
        part = curve[n * len(curve) // most : (n + 1) * len(curve) // most]
        found.append((part[-1][0], sum(y for _, y in part) / len(part)))
    return found


def _at(curve: Curve, x: float) -> float:
    before = curve[0]
    for point in curve:
        if point[0] >= x:
            (x0, y0), (x1, y1) = before, point
            return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        before = point
    return before[1]


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for word in (text or "").split(",") if word))
