"""What a plan says: predicted steps, the longest context and largest batch that fit, what would change them, how far it errs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from ctxlab.errors import IncompatibleError
from ctxlab.fields import Bytes, Length, OrAuto
from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.base import ARCHITECTURES, read_parts
from ctxlab.model.count import flops_per_token, kv_cache_bytes
from ctxlab.model.offload import OffloadSetting
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.remake import POLICIES
from ctxlab.profiling.measure import Point
from ctxlab.profiling.policy import AutoPredictor, predictor_of
from ctxlab.profiling.predict import CLOSED_FORM, Prediction, Predictor
from ctxlab.records.schema import Measurement
from ctxlab.registry import ComponentConfig

PROTOCOL = "predicted: one training step, batch 1"
LARGE = 256e6  # bytes from which on the error of a prediction is told as a share
_WINDOW = 1024  # keys of the window that is tried
_CHUNK = 64  # tokens of the chunk of logits that is tried: fewer make the products of the loss slow


class PlanSettings(ComponentConfig):
    """Which contexts are predicted and what memory they have to fit."""

    contexts: OrAuto | tuple[Length, ...] = Field("auto", description="auto: the lengths of the evaluation table")
    memory: OrAuto | Bytes = Field("auto", description="beside the idle process; auto: all that the device has")
    changes: bool = Field(True, description="say what would make the longest context longer")


@dataclass(frozen=True)
class KnownError:
    """How far predictions of one kind were from measurements on one kind of device."""

    n_points: int
    median: float  # shares of the measured bytes, over points of at least LARGE
    worst: float
    worst_bytes: float | None  # over smaller points, where there are any


def known_error(files: Iterable[Path], device: str, precision: str, ways: Collection[str]) -> KnownError | None:
    """The error over the measured points of files, an object a line, that are like a plan: of its device and precision, and
    traced, in part at least, or not, as it is. None where there is none: unmeasured."""
    is_traced = CLOSED_FORM not in ways
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    points = {
        (row["model"], row["position"], row["recompute"], row["context"]): row  # measured twice, the last counts
        for row in map(json.loads, lines)
        if "error" in row
        and (row["device"], row["precision"]) == (device, precision)
        and (row["way"] != CLOSED_FORM) == is_traced
    }
    rows = list(points.values())
    large = [abs(row["error"]) for row in rows if row["measured_bytes"] >= LARGE]
    small = [abs(row["error_bytes"]) for row in rows if row["measured_bytes"] < LARGE]
    if not large:
        return None
    return KnownError(len(rows), statistics.median(large), max(large), max(small, default=None))


def changes(point: Point) -> Iterator[tuple[str, Point]]:
    """What could be set otherwise to need less memory, as it is written on the line, each alone, and what goes together."""
    parts = read_parts(point.__dict__)
    architecture = ARCHITECTURES.get(parts.model.architecture)
    frugal, words = point, []
    more_frugal = () if point.recompute == "auto" else POLICIES[POLICIES.index(point.recompute) + 1 :]
    for policy in more_frugal:
        try:
            architecture.check_training(parts.model, packed=False, compiled=False, recompute=policy)
        except IncompatibleError:
            continue
        yield f"trainer.recompute={policy}", replace(point, recompute=policy)
        if policy == POLICIES[-1]:
            frugal, words = replace(frugal, recompute=policy), [f"trainer.recompute={policy}"]
    if point.precision == "fp32":
        yield "trainer.precision=bf16", replace(point, precision="bf16")
        frugal, words = replace(frugal, precision="bf16"), [*words, "trainer.precision=bf16"]
    if point.chunk > _CHUNK:
        yield f"trainer.loss_chunk={_CHUNK}", replace(point, loss_chunk=_CHUNK)
    if point.offload == "none":
        where: OffloadSetting = "disk" if point.device == "cpu" else "cpu"
        yield f"trainer.offload={where}", replace(point, offload=where)
    if point.update == "step":
        unclipped = replace(point, update="backward", optim={**point.optim, "clip": 0.0})
        yield f"trainer.update=backward{' optim.clip=0' if point.optim['clip'] else ''}", unclipped
    if parts.position != "none" and parts.attention != "none" and parts.attention.name == "full":
        window = ATTENTIONS.config({"name": "sliding_window", "size": _WINDOW}).model_dump(mode="json")
        try:
            ATTENTIONS.get("sliding_window").check_position(POSITIONS.get(parts.position.name), parts.position.name)
            yield f"attention=sliding_window attention.size={_WINDOW}", replace(point, attention=window)
        except IncompatibleError:
            pass
    if len(words) > 1:
        yield " ".join(words), frugal


def planned(
    point: Point,
    contexts: Sequence[int],
    memory: int,
    *,
    others: Iterable[tuple[str, Point]] = (),
    rate: float | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """peak_memory_bytes with its parts and the cache at each context; the longest context and largest batch that fit.

    `rate`: FLOP/s of a matmul on the device, at which a step's operations would take `least_seconds`, if nothing else took any.
    """
    parts = read_parts(point.__dict__)
    rows: list[Measurement] = []
    updates: dict[str, tuple[int, dict[str, int]]] = {}
    predictor = predictor_of(point, updates)
    for context in contexts:
        advance(f"a step at {context}")
        found = predictor.memory(context)
        facts: dict[str, Any] = {"way": found.way, "fits": predictor.fits(context, memory)}
        facts["recompute"] = point.at(context).recompute
        flops = flops_per_token(parts.model, parts.attention, vocab_size=point.vocab_size, context=context) * context
        facts["flops"] = flops
        if rate:
            facts["least_seconds"] = flops / rate
        rows.append(_row("peak_memory_bytes", found.bytes, "B", context=context, facts=facts))
        rows += part_rows(found)
        cache = kv_cache_bytes(*parts, length=context, precision=point.precision)  # type: ignore[arg-type]
        rows.append(_row("cache_bytes", cache, "B", context=context, facts={"way": CLOSED_FORM}))
    advance("the longest context that fits")
    rows.append(_longest(predictor, memory, "none"))
    batch = predictor.rows(point.context, memory)
    rows.append(_row("largest_batch", batch, "rows", context=point.context, axes={"memory": memory}))
    for words, other in others:
        advance(words)
        rows.append(_longest(predictor_of(other, updates), memory, words))
    return rows


def part_rows(found: Prediction) -> list[Measurement]:
    """part_bytes of each kind, at the worst moment of the step as it is predicted."""
    facts = {"way": found.way}
    return [
        _row("part_bytes", size, "B", context=found.context, axes={"part": kind}, facts=facts)
        for kind, size in found.split.items()
    ]


def _longest(predictor: Predictor | AutoPredictor, memory: int, change: str) -> Measurement:
    axes = {"memory": memory, "change": change}
    found = predictor.longest(memory)
    facts = {"recompute": predictor.point.at(found).recompute} if found else {}
    return _row("longest_context", found, "tokens", axes=axes, facts=facts)


def _row(name: str, value: float, unit: str, **more: Any) -> Measurement:
    return Measurement(name=name, value=float(value), unit=unit, protocol=PROTOCOL, **more)
