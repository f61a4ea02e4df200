"""A training step of ours against the same-size decoders of others: time in turns, memory, and the longest context.

Every point is a process of its own under a limit of address space: one that needs more ends alone, as a row. A step takes
8,192 tokens (one row at 8,192 and beyond) through forward, backward and AdamW.

    python experiments/speed/speed.py time [fp32|bf16] [WORD...]       tokens a second, in five rounds of all contestants
    python experiments/speed/speed.py memory [fp32|bf16] [WORD...]     peaks, and at 32,768 tokens too
    python experiments/speed/speed.py longest [fp32|bf16] [WORD...]    the longest row whose step takes at most 4GiB

Without a precision it is the machine's own. Words are contexts, names of contestants ('ctxlab rope'), ways (none, recompute,
disk), rounds=3, budget=1GiB: those only, so many, so much. Prints a JSON object a line.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxlab.cli.environment import set_process_defaults

set_process_defaults()  # before torch is imported

from contestants import CONTESTANTS, OURS, PEERS, SIZES, VOCAB, WAYS

from ctxlab.errors import ConfigError
from ctxlab.model.attention import native
from ctxlab.profiling.measure import Point, answer_of, start_child
from ctxlab.profiling.predict import Predictor
from ctxlab.study.script import run_script
from ctxlab.train.precision import resolve_device, resolve_precision
from ctxlab.units import parse_bytes, parse_length

STEP_TOKENS, ROUNDS = 8192, 5
TIMED, WEIGHED = (512, 2048, 8192), (512, 2048, 8192, 32_768)
ADDRESS_SPACE, BUDGET = 20 * 2**30, 4 * 2**30
TIMEOUT = 3600.0
SHORTEST, BEYOND, GRAIN = 512, 2**22, 64  # a longest context is looked for in between, in multiples of GRAIN

RIVALS: dict[str, tuple[str, ...]] = {
    "ctxlab rope": tuple(name for name in PEERS if name.split()[-1] not in ("alibi", "t5")),
    "ctxlab alibi": ("x-transformers alibi",),
    "ctxlab t5": ("x-transformers t5",),
}
"""What each of ours is compared with: RoPE with the best of those that have no bias to add, the others with their like."""

Row = dict[str, Any]


def ask(contestant: str, context: int, what: str, precision: str, *, rows: int, way: str = "none") -> Row:
    """The row of one point, with its status and, where that is not `done`, the reason."""
    here = {"contestant": contestant, "context": context, "precision": precision}
    spec = {**here, "what": what, "rows": rows, "way": way, "memory_limit": ADDRESS_SPACE}
    child = start_child([str(Path(__file__).with_name("step.py"))], exact=what == "memory")
    return {**here, **answer_of(child, json.dumps(spec) + "\n", TIMEOUT)}


def show(row: Row) -> Row:
    print(json.dumps(row), flush=True)
    return row


@dataclass(frozen=True)
class Asked:
    """What of it all is measured."""

    contexts: tuple[int, ...] = ()
    names: tuple[str, ...] = (*OURS, *PEERS)
    ways: tuple[str, ...] = tuple(WAYS)
    rounds: int = ROUNDS
    budget: int = BUDGET

    @classmethod
    def of(cls, words: Iterable[str]) -> Asked:
        """Raises ConfigError on a word that is none of these."""
        contexts, names, ways, more = [], [], [], {}
        for word in words:
            key, _, value = word.partition("=")
            try:
                if word in CONTESTANTS:
                    names.append(word)
                elif word in WAYS:
                    ways.append(word)
                elif key == "rounds" and value.isdecimal() and int(value):
                    more["rounds"] = int(value)
                elif key == "budget":
                    more["budget"] = parse_bytes(value)
                else:
                    contexts.append(parse_length(word))
            except ValueError as error:
                known = f"a context, rounds=N, budget=BYTES or one of {', '.join([*CONTESTANTS, *WAYS])}"
                raise ConfigError(f"speed: expected {known}; got '{word}'") from error
        return cls(tuple(contexts), tuple(names) or cls.names, tuple(ways) or cls.ways, **more)


def time_steps(asked: Asked, precision: str, ask: Callable[..., Row] = ask) -> None:
    """A round runs each contestant once; one that ends without a time is in no further round."""
    for context in asked.contexts or TIMED:
        rates: dict[str, list[float]] = {name: [] for name in asked.names}
        for _ in range(asked.rounds):
            for name in list(rates):
                found = show(ask(name, context, "time", precision, rows=max(1, STEP_TOKENS // context)))
                if found["status"] == "done":
                    rates[name].append(max(1, STEP_TOKENS // context) * context / min(found["seconds"]))
                else:
                    del rates[name]
        for name, each in rates.items():
            show({
                "contestant": name, "context": context, "precision": precision, "best": max(each),
                "median": statistics.median(each), "lowest": min(each), "tokens_per_second": each,
            })  # fmt: skip
        for name in (name for name in OURS if name in asked.names):
            show({"compared": "time", "ours": name, "context": context, **compared_times(name, rates)})


def compared_times(ours: str, rates: Mapping[str, Sequence[float]]) -> Row:
    """Our tokens a second over those of the rival whose median is the highest: of best, of medians, and of each round."""
    there = [name for name in RIVALS[ours] if name in rates]
    if ours not in rates or not there:
        return {"status": "skipped", "reason": "one side has no time"}
    rival = max(there, key=lambda name: statistics.median(rates[name]))
    rounds = [mine / theirs for mine, theirs in zip(rates[ours], rates[rival])]
    return {
        "rival": rival,
        "best_ratio": max(rates[ours]) / max(rates[rival]),
        "median_ratio": statistics.median(rates[ours]) / statistics.median(rates[rival]),
        "lowest_ratio": min(rounds),
        "highest_ratio": max(rounds),
    }


def weigh(asked: Asked, precision: str, ask: Callable[..., Row] = ask) -> None:
    for context in asked.contexts or WEIGHED:
        peaks: dict[str, float] = {}
        for name in asked.names:
            found = show(ask(name, context, "memory", precision, rows=max(1, STEP_TOKENS // context)))
            if found["status"] == "done":
                peaks[name] = found["peak_bytes"]
        for name in (name for name in OURS if name in asked.names):
            show({"compared": "memory", "ours": name, "context": context, **compared_peaks(name, peaks)})


def compared_peaks(ours: str, peaks: Mapping[str, float]) -> Row:
    """Our peak over that of the leanest rival."""
    there = [name for name in RIVALS[ours] if name in peaks]
    if ours not in peaks or not there:
        return {"status": "skipped", "reason": "one side has no peak"}
    rival = min(there, key=peaks.__getitem__)
    return {"rival": rival, "peak_ratio": peaks[ours] / peaks[rival]}


def longest_of_all(asked: Asked, precision: str, ask: Callable[..., Row] = ask) -> None:
    """Of ours with RoPE and of all peers, as they are; of those two that can, with recomputation; and of ours with a disk.

    Where contexts are given, the longest of them that fits.
    """
    budget = asked.budget
    every = [(way, name) for way in WAYS for name in ("ctxlab rope", *PEERS) if name in WAYS[way]]
    wanted = [(way, name) for way, name in every if name in asked.names and way in asked.ways]
    if not wanted:
        raise ConfigError(f"speed: none of {', '.join(asked.names)} goes in the way {' or '.join(asked.ways)}")
    for way, name in wanted:
        points: list[Row] = []

        def peak(context: int, name: str = name, way: str = way, points: list[Row] = points) -> float:
            points.append(ask(name, context, "memory", precision, rows=1, way=way))
            return points[-1].get("peak_bytes", float("inf"))

        fitting = (context for context in asked.contexts if peak(context) <= budget)
        found = max(fitting, default=0) if asked.contexts else longest(peak, budget)
        row: Row = {"longest": name, "way": way, "precision": precision, "budget": budget, "context": found}
        row["peaks"] = [(point["context"], point.get("peak_bytes", point.get("reason"))) for point in points]
        if name in OURS:
            row["predicted"] = Predictor(our_point(precision, way)).longest(budget)
        show(row)


def longest(peak: Callable[[int], float], budget: float) -> int:
    """The longest context whose peak is at most the budget, to a thirty-second; 0 where SHORTEST takes more.

    Peaks grow nearly linearly: the line through the two longest contexts that fit says where to look, a little below
    and a little above; where it is wrong the gap is halved.
    """
    low, high = 0, BEYOND
    fitting: list[tuple[int, float]] = []
    while high - low > max(GRAIN, low // 32):
        context = _next(low, high, fitting, budget)
        found = peak(context)
        if found <= budget:
            low = context
            fitting.append((context, found))
        elif context <= SHORTEST:
            return 0
        else:
            high = context
    return low


def _next(low: int, high: int, fitting: Sequence[tuple[int, float]], budget: float) -> int:
    """A context in ]low, high[."""
    if len(fitting) < 2:
        context = 4 * low or SHORTEST
        return context if context < high else (low + high) // 2
    (a, used), (b, more) = fitting[-2:]
    reach = b + (budget - more) * (b - a) / max(more - used, 1.0)
    below, above = (int(reach * share) // GRAIN * GRAIN for share in (1 - 1 / 72, 1 + 1 / 72))
    if low < below < high:
        return below
    above = max(above, low + GRAIN)
    return above if above < high else (low + high) // 2


def our_point(precision: str, way: str) -> Point:
    return Point(
        model=SIZES.model_dump(mode="json"), position={"name": "rope"}, attention={"name": "full"},
        optim={"name": "adamw"}, vocab_size=VOCAB, context=SHORTEST, precision=precision, device="cpu",
        recompute="block" if way == "recompute" else "none", offload="disk" if way == "disk" else "none",
    )  # fmt: skip


def main(words: Sequence[str]) -> None:
    what, more = (words[0], list(words[1:])) if words else ("", [])
    asked = more.pop(0) if more and more[0] in ("fp32", "bf16") else "auto"
    precision = resolve_precision(asked, resolve_device("cpu"))
    native.library()  # built once, before anything is timed
    wanted = Asked.of(more)
    if what != "longest" and wanted.ways != Asked.ways:
        raise ConfigError(f"speed: {wanted.ways[0]} says nothing of {what}; use it with longest")
    if what == "time":
        time_steps(wanted, precision)
    elif what == "memory":
        weigh(wanted, precision)
    elif what == "longest":
        longest_of_all(wanted, precision)
    else:
        raise ConfigError(f"speed: expected time, memory or longest, got '{what}'")


if __name__ == "__main__":
    run_script(main)
