"""What a run's rows say, as plain values: results by context, what tells runs apart, how loss rises with length."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from ctxlab.evaluation.intervals import paired_interval
from ctxlab.records.index import flatten
from ctxlab.records.run import Run
from ctxlab.records.schema import WAY_AXES, DocumentSums, Measurement
from ctxlab.units import format_bytes, format_count, format_length, format_operations, format_seconds

ByContext = dict[int, dict[str, Measurement]]

# How metrics are called in a table's head, where their names would be too long.
TITLES = {
    "nats_per_token": "nats/token", "bits_per_byte": "bits/byte", "peak_memory_bytes": "memory",
    "cache_bytes": "cache", "prefill_seconds": "prefill", "flops_utilization": "of matmul peak", "part_bytes": "part",
    "step_seconds": "step", "tokens_per_second": "tokens/s",
    "decode_seconds_per_token": "s/token", "flops_per_second": "FLOP/s", "learning_rate": "rate",
    "gradient_norm": "gradient norm", "nats_per_word": "nats/word",
}  # fmt: skip
# Why a cell has no number.
_WHY = {
    "undefined": "undefined", "no_document": "no text", "does_not_fit": "does not fit",
    "out_of_memory": "out of memory", "timed_out": "timed out", "failed": "failed",
}  # fmt: skip
# Parts of a config that some models are not composed from.
_PARTS = ("position", "attention")
# Parts of a config that say how a run is kept, not what it is.
_KEPT = ("name", "tags", "note", "paths", "sweep", "logger", "resume", "experiment")


def title(metric: str) -> str:
    """What a table calls a metric."""
    return TITLES.get(metric, metric.replace("_", " "))


def number(value: float, unit: str, *, name: str = "") -> str:
    """A metric's value as text, in a unit that people read."""
    if unit == "B":
        return format_bytes(value)
    if unit in ("s", "s/token"):
        return format_seconds(value)
    if unit == "tokens/s":
        return format_count(value)
    if unit == "FLOP/s":
        return format_operations(value).removesuffix("FLOP").strip()
    if unit == "rows":
        return f"{value:,.0f}"
    if unit == "tokens":
        return format_length(int(value))
    if name.endswith("perplexity"):
        return f"{value:.2f}" if value < 1000 else f"{value:.3g}"
    if name == "learning_rate":
        return f"{value:.3g}"
    return f"{value:.3f}"


def cell(measurement: Measurement | None, *, interval: bool = False) -> str:
    """A measurement as a cell: its number (with half of its 95% interval), or why there is none."""
    if measurement is None:
        return "-"
    if measurement.value is None:
        return _WHY.get(measurement.status, measurement.status)
    text = number(measurement.value, measurement.unit, name=measurement.name)
    if interval and measurement.low is not None and measurement.high is not None:
        half = (measurement.high - measurement.low) / 2
        text += f" ±{number(half, measurement.unit, name=measurement.name)}"
    return text


def signed(difference: float, low: float | None = None, high: float | None = None) -> str:
    """A difference with half of its 95% interval, where it has one."""
    return f"{difference:+.3f}" + ("" if low is None or high is None else f" ±{(high - low) / 2:.3f}")


def why_missing(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each reason why cells of some contexts have no number."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for m in measurements:
        if m.value is None and m.reason and m.context is not None:
            contexts = reasons.setdefault((cell(m), m.reason), [])
            if m.context not in contexts:
                contexts.append(m.context)
    return [f"{why} at {', '.join(map(format_length, at))}: {reason}" for (why, reason), at in reasons.items()]


def way_of(axes: Mapping[str, Any]) -> dict[str, Any]:
    """How a text was scored, of a measurement's axes: nothing of windows that follow one another."""
    return {name: axes[name] for name in WAY_AXES if name in axes}


def by_context(measurements: Sequence[Measurement], way: Mapping[str, Any] = MappingProxyType({})) -> ByContext:
    """context -> name -> measurement, contexts in order, of windows that follow one another, or of another way of scoring."""
    found: ByContext = {}
    for m in measurements:
        if m.context is not None and way_of(m.axes) == way and not {"depth", "part"} & m.axes.keys():
            found.setdefault(m.context, {})[m.name] = m
    return dict(sorted(found.items()))


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The dotted keys that say what a run is."""
    return {key: value for key, value in flatten(config).items() if key.split(".")[0] not in _KEPT}


def differing_keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The dotted keys whose values differ between configs; of a part that was swapped, its name alone."""
    flats = [settings(config) for config in configs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    differing = [key for key in keys if len({json.dumps(flat.get(key), sort_keys=True) for flat in flats}) > 1]
    return [key for key in differing if key.rpartition(".")[0] not in differing]


def telling_keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The keys of `differing_keys` that tell more than the others do: without parts that all have alike but those that have none.

    A model that is composed from no positional scheme differs in that too; its name says so already.
    """
    keys = differing_keys(configs)
    values = {key: {value_at(config, key) for config in configs} - {"none"} for key in keys}
    telling = [key for key in keys if len(values[key]) > 1 or key not in _PARTS]
    return telling or keys


def value_at(config: dict[str, Any], key: str) -> str:
    """The setting at a dotted key as text; `-` where a config has none."""
    value = flatten(config).get(key, "-")
    return value if isinstance(value, str) else json.dumps(value)


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run that tells it from the others: the values in which they differ, else the id."""
    configs = [run.record.config for run in runs]
    keys = telling_keys(configs)
    names = [" ".join(value_at(config, key) for key in keys) for config in configs]
    return [name if name and names.count(name) == 1 else run.id for name, run in zip(names, runs, strict=True)]


def training_speed(run: Run) -> float | None:
    """Tokens a second of training: the median over the run's rows, of each attempt all but the first, which starts up."""
    rows = [row for row in run.metrics() if row["split"] == "train" and "tokens_per_second" in row]
    going = [now["tokens_per_second"] for before, now in pairwise(rows) if before["attempt"] == now["attempt"]]
    return statistics.median(going) if going else None


def rise(run: Run, rows: ByContext, *, multiple: int = 4) -> str:
    """By how much nats per token rise from the trained context to a multiple of it, ± half of the paired interval."""
    trained = run.record.config.get("context")
    if not isinstance(trained, int):
        return "-"
    near, far = (rows.get(trained * m, {}).get("nats_per_token") for m in (1, multiple))
    if near is None or far is None or near.value is None or far.value is None:
        return cell(far if near is None or near.value is not None else near)
    documents = {d.context: d for d in run.documents() if not d.axes}
    bounds = paired(documents.get(trained * multiple), documents.get(trained))
    return signed(far.value - near.value, *(bounds or ()))


def paired(first: DocumentSums | None, second: DocumentSums | None) -> tuple[float, float] | None:
    """The 95% interval of the difference in nats per token, over documents that both scored alike; else None."""
    if first is None or second is None or (first.names, first.targets) != (second.names, second.targets):
        return None
    return paired_interval(first.nats, second.nats, first.targets)
