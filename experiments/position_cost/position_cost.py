"""What a positional scheme costs: a whole training step of every scheme against one with RoPE, in time and in memory.

A row is a scheme: its step runs in turns with RoPE's, one step each, and the two peaks come from processes of their own.

    python experiments/position_cost/position_cost.py          every scheme at 512, 2,048 and 8,192 tokens
    python experiments/position_cost/position_cost.py long     memory of one step at 65,536 tokens, and at 32,768

Words behind these measure less: names of schemes, and of the first line contexts (`alibi t5 8192`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace

from ctxlab.cli.environment import set_process_defaults

set_process_defaults()  # before torch is imported

import torch
from rich.console import Console
from rich.table import Table

from ctxlab.errors import ConfigError
from ctxlab.model.position.base import POSITIONS
from ctxlab.profiling.fit import OTHERS
from ctxlab.profiling.measure import Point, run_point, steps_in_turns
from ctxlab.profiling.predict import Predictor
from ctxlab.study.script import run_script
from ctxlab.train.precision import resolve_device, resolve_precision

CONTEXTS, ROUNDS = (512, 2048, 8192), 5
LONGEST = ("rope", "alibi", "t5", "fire")  # measured at 65,536 tokens, the others at 32,768
MODEL = {
    "name": "mini", "d_model": 384, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "head_dim": 64, "d_ff": 1024
}  # fmt: skip


def point(position: str, context: int, *, recompute: str = "none") -> Point:
    device = resolve_device("auto")
    return Point(
        model=MODEL,
        position=POSITIONS.config({"name": position}).model_dump(mode="json"),
        attention={"name": "full"},
        optim={"name": "muon"},
        vocab_size=2048,
        context=context,
        precision=resolve_precision("auto", device),
        device=device.type,
        recompute=recompute,
    )


def peak(at: Point) -> int:
    """Bytes of a step over the idle process."""
    result = run_point(at, "memory", timeout=3600)
    if result["status"] != "done":
        raise SystemExit(f"{at.position['name']} at {at.context}: {result['reason']}")
    return int(result["peak_memory_bytes"])


def compare(schemes: Sequence[str], contexts: Sequence[int]) -> None:
    """Time in turns with RoPE and memory, relative to RoPE, at each context."""
    console, table = Console(), Table("position", *(f"{c:,}: time, memory" for c in contexts))
    cells: dict[str, list[str]] = {name: [] for name in schemes}
    for context in contexts:
        base, base_peak = point("rope", context), peak(point("rope", context))
        for name in schemes:
            # A learned table has as many rows as the trained context: here that is the context of the step.
            mine, theirs = steps_in_turns([point(name, context), base], ROUNDS)
            used = peak(point(name, context))
            ratio = statistics.median(a / b for a, b in zip(mine, theirs))
            cells[name].append(f"{ratio:5.2f} {used / base_peak:6.2f}")
            row = {
                "position": name, "context": context, "precision": base.precision, "time": ratio,
                "median_seconds": statistics.median(mine), "best_seconds": min(mine), "peak_bytes": used,
                "rope_median_seconds": statistics.median(theirs), "rope_best_seconds": min(theirs), "rope_peak_bytes": base_peak,
            }  # fmt: skip
            print(json.dumps(row), flush=True)
    for name in schemes:
        table.add_row(name, *cells[name])
    console.print(
        table, f"relative to rope; {ROUNDS} steps in turns, median of the ratios; {torch.get_num_threads()} threads"
    )


def longest(schemes: Sequence[str]) -> None:
    """Memory of one step with recomputed blocks: at 65,536 tokens, or at 32,768 with the growth of activations from 16,384 on.

    What is no activation is left out as it is predicted, at each context by itself: a learned table has as many rows.
    """
    for name in schemes:
        context = 65_536 if name in LONGEST else 32_768
        at = point(name, context, recompute="block")
        row = {"position": name, "context": context, "precision": at.precision, "peak_bytes": peak(at)}
        if name not in LONGEST:
            half = replace(at, context=context // 2)
            row["half_peak_bytes"] = peak(half)
            row |= growth(at, row["peak_bytes"], row["half_peak_bytes"])
        print(json.dumps(row), flush=True)


def growth(at: Point, whole: int, half: int) -> dict[str, float]:
    """Activations of a step and of one of half as many tokens, from their peaks, and how many times as much the one is."""
    predictor = Predictor(at)
    standing = {c: sum(predictor.memory(c).split[kind] for kind in OTHERS) for c in (at.context, at.context // 2)}
    activations, fewer = whole - standing[at.context], half - standing[at.context // 2]
    return {"activation_bytes": round(activations), "times": round(activations / fewer, 4)}


def main(words: Sequence[str]) -> None:
    asks_for_long = words[:1] == ["long"]
    contexts = [int(word) for word in words if word.isdecimal()]
    names = [word for word in words[asks_for_long:] if not word.isdecimal()]
    for name in names:
        POSITIONS.get(name)  # says what there is, before anything is measured
    if asks_for_long and contexts:
        raise ConfigError(f"position_cost: long has contexts of its own; got '{contexts[0]}'")
    if asks_for_long:
        longest(names or [*LONGEST, *(n for n in POSITIONS.names() if n not in LONGEST)])
    else:
        compare(names or POSITIONS.names(), contexts or CONTEXTS)


if __name__ == "__main__":
    run_script(main)
