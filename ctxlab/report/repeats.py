"""Runs that differ by their seed alone, taken together: means with 95% intervals over the repetitions.

Of several such groups over the same seeds the differences from the first are paired by seed: what a seed does to all of them
cancels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctxlab.evaluation.intervals import ratio_interval
from ctxlab.records.run import Run, axes_key
from ctxlab.records.schema import METRICS, Measurement
from ctxlab.report.grid import Grid
from ctxlab.report.plots import Band, loss_curves, loss_figure, save, trained_contexts
from ctxlab.report.results import differing_keys, labels, number, settings, title, value_at, way_of
from ctxlab.units import format_length

# The same numbers again in another form: tables leave them to the rows that are saved.
_OTHER_FORMS = ("perplexity", "bits_per_byte", "tokens_per_second")
_HEADINGS = {"eval": "evaluated again: "}

Key = tuple[Any, ...]  # what a result is of: its name, context, split, protocol, normaliser, axes


@dataclass
class Repeats:
    """One thing that was measured with several seeds. `values` are its results by what they are of, and by seed."""

    command: str
    config: dict[str, Any]
    label: str = ""
    values: dict[Key, dict[int, Measurement]] = field(default_factory=dict)
    runs: dict[int, str] = field(default_factory=dict)

    def means(self, against: Repeats | None = None) -> list[Measurement]:
        """The mean of each result that at least two seeds have, its interval by Student's t.

        With `against`, what both have with the same seeds also says by how much it is above that, paired by seed.
        """
        found = []
        for key, by_seed in self.values.items():
            valued = {seed: m.value for seed, m in by_seed.items() if m.value is not None}
            if len(valued) < 2:
                continue
            mean, low, high = _mean(list(valued.values()))
            facts: dict[str, Any] = {
                "of": self.label,
                "runs": [self.runs[seed] for seed in valued],
                "seeds": len(valued),
            }
            theirs = against.values.get(key, {}) if against is not None else {}
            pairs = [value - other for seed, value in valued.items() if (other := _value(theirs, seed)) is not None]
            if against is not None and len(pairs) == len(valued):
                difference = dict(zip(("difference", "difference_low", "difference_high"), _mean(pairs), strict=True))
                facts |= {"difference_from": against.label, **difference}
            update = {"value": mean, "low": low, "high": high, "status": "done", "reason": "", "facts": facts}
            found.append(next(iter(by_seed.values())).model_copy(update=update))
        return found


def repeats(runs: Sequence[Run]) -> list[Repeats]:
    """What `runs` repeat, by command and in order; nothing of what was done once.

    An evaluation belongs to the run that it evaluates: evaluations of repeated runs are repetitions too.
    """
    by_id = {run.id: run for run in runs}
    found: dict[str, Repeats] = {}
    for run in runs:
        for m in run.measurements():
            if "baseline" in m.axes:
                continue
            # The parent of a training is what it started from.
            evaluated = run.record.parent if run.record.command == "eval" else ""
            whose = by_id.get(str(m.axes.get("run") or evaluated), run)
            config = {**settings(whose.record.config), **_of_evaluation(run, whose)}
            seed = config.pop("seed", None)
            same = json.dumps([run.record.command, config], sort_keys=True)
            group = found.setdefault(same, Repeats(run.record.command, config))
            axes = {key: value for key, value in m.axes.items() if key != "run"}
            key = (m.name, m.context, m.split, m.protocol, m.normaliser, axes_key(axes))
            group.values.setdefault(key, {})[seed] = m.model_copy(update={"axes": axes})
            group.runs[seed] = whose.id
    groups = [group for group in found.values() if len(group.runs) > 1]
    for group in groups:
        alike = [other.config for other in groups if other.command == group.command]
        group.label = " ".join(value_at(group.config, key) for key in differing_keys(alike))
    return groups


def with_differences(groups: Sequence[Repeats]) -> list[tuple[Repeats, list[Measurement]]]:
    """Each group with its means, and their differences from the first group of its command."""
    first: dict[str, Repeats] = {}
    found = []
    for group in groups:
        against = first.setdefault(group.command, group)
        found.append((group, group.means(None if against is group else against)))
    return found


def repeats_tables(groups: Sequence[Repeats]) -> list[Grid]:
    """A table a command and metric: a row a thing that was repeated, a column a context (and whatever else was varied).

    Below each row but the first stands its difference from the first, paired by seed.
    """
    grids = []
    for command in dict.fromkeys(group.command for group in groups):
        rows = [(group, means) for group, means in with_differences(groups) if group.command == command]
        names = {m.name for _, means in rows for m in means}
        for name in METRICS:
            if name in names and not (name in _OTHER_FORMS and names - set(_OTHER_FORMS)):
                grids.append(_table(name, [(group, [m for m in means if m.name == name]) for group, means in rows]))
    return grids


def mean_curves(groups: Sequence[Repeats]) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[Band]]]:
    """Loss by context of what was repeated: the curves of the means, and their intervals."""
    curves: dict[str, list[tuple[int, float]]] = {}
    bands: dict[str, list[Band]] = {}
    for group in groups:
        name = group.label or "mean"
        for m in sorted(group.means(), key=lambda m: m.context or 0):
            if m.name != "nats_per_token" or m.context is None or way_of(m.axes) or m.value is None:
                continue
            curves.setdefault(name, []).append((m.context, m.value))
            if m.low is not None and m.high is not None:
                bands.setdefault(name, []).append((m.context, m.low, m.high))
    return {name: points for name, points in curves.items() if len(points) > 1}, bands


def curves_with_means(runs: Sequence[Run]) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[Band]]]:
    """Loss by context of runs side by side: of those that seeds alone tell apart the mean and its interval."""
    groups = repeats(runs)
    curves, bands = mean_curves(groups)
    repeated = {run_id for group in groups for run_id in group.runs.values()}
    once = {name for name, run in zip(labels(runs), runs, strict=True) if run.id not in repeated}
    return curves | {name: points for name, points in loss_curves(runs).items() if name in once}, bands


def save_compared(runs: Sequence[Run], path: Path) -> Path | None:
    """The figure of `curves_with_means`, by the ending of `path`; None when no run has a curve."""
    curves, bands = curves_with_means(runs)
    if not curves:
        return None
    record = runs[0].record
    name = record.experiment or (record.sweep.id if record.sweep else record.command)
    means = ", mean over seeds and 95%" if bands else ""
    heading = f"{name}: test loss by context{means}"
    save(loss_figure(curves, trained_contexts(runs), heading=heading, bands=bands), path)
    return path


def _table(name: str, rows: Sequence[tuple[Repeats, list[Measurement]]]) -> Grid:
    means = [m for _, found in rows for m in found]
    places = sorted({_place(m) for m in means}, key=lambda place: (place[0] is None, place[0] or 0, place[1]))
    heads = [_head(place, means) for place in places]
    heading = f"{_HEADINGS.get(rows[0][0].command, '')}{title(name)}, mean over seeds ±95%"
    grid = Grid(["", "seeds", *heads], heading=heading)
    for group, found in rows:
        here = {_place(m): m for m in found}
        if not here:
            continue
        grid.add([group.label, str(len(group.runs)), *(_cell(here.get(place)) for place in places)])
        differences = [_difference(here.get(place)) for place in places]
        if any(differences):
            grid.add([f"  less {rows[0][0].label}", "", *differences], style="dim")
    return grid


def _cell(m: Measurement | None) -> str:
    """A mean with half of its interval, in one unit that people read each."""
    if m is None or m.value is None or m.low is None or m.high is None:
        return "-"
    return f"{number(m.value, m.unit, name=m.name)} ±{number((m.high - m.low) / 2, m.unit, name=m.name)}"


def _difference(m: Measurement | None) -> str:
    if m is None or "difference" not in m.facts:
        return ""
    facts: Mapping[str, float] = m.facts
    sign = "-" if facts["difference"] < 0 else "+"
    half = (facts["difference_high"] - facts["difference_low"]) / 2
    return f"{sign}{number(abs(facts['difference']), m.unit, name=m.name)} ±{number(half, m.unit, name=m.name)}"


def _of_evaluation(run: Run, whose: Run) -> dict[str, Any]:
    """What an evaluation adds to the settings of the run that it evaluates."""
    own = {} if run is whose else settings(run.record.config)
    return {f"again.{key}": value for key, value in own.items() if key not in ("run", "seed")}


def _value(by_seed: Mapping[int, Measurement], seed: int) -> float | None:
    return by_seed[seed].value if seed in by_seed else None


def _mean(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of at least two values and its 95% interval."""
    bounds = ratio_interval(values, [1.0] * len(values))
    assert bounds is not None
    return sum(values) / len(values), *bounds


def _place(m: Measurement) -> tuple[int | None, str]:
    return m.context, axes_key(m.axes)


def _head(place: tuple[int | None, str], means: Sequence[Measurement]) -> str:
    """A column's head: its context, and the axes in which columns differ."""
    mine = next(m.axes for m in means if _place(m) == place)
    varied = [key for key in mine if len({repr(m.axes.get(key)) for m in means}) > 1]
    parts = [format_length(place[0])] if place[0] is not None else []
    return " ".join([*parts, *(f"{key}={mine[key]}" for key in varied)]) or "all"
