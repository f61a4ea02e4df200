"""What a positional scheme costs: a whole training step of every scheme against one with RoPE, in time and in memory.

A row is a scheme: its step runs in turns with RoPE's, one step each, and the two peaks come from processes of their own.

    python experiments/position_cost/position_cost.py              every scheme at 512, 2,048 and 8,192 tokens
    python experiments/position_cost/position_cost.py long         memory of one step at 65,536 tokens, and at 32,768
    python experiments/position_cost/position_cost.py long NAME    of some schemes only
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence

from ctxlab.cli.environment import set_thread_defaults

set_thread_defaults()  # before torch is imported

import torch
from rich.console import Console
from rich.table import Table

from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.transformer import Transformer
from ctxlab.profiling.measure import Point, run_point, steps_in_turns
from ctxlab.train.optim.base import OPTIMIZERS
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


def compare(schemes: Sequence[str]) -> None:
    """Time in turns with RoPE and memory, relative to RoPE, at each context."""
    console, table = Console(), Table("position", *(f"{c:,}: time, memory" for c in CONTEXTS))
    cells: dict[str, list[str]] = {name: [] for name in schemes}
    for context in CONTEXTS:
        base, base_peak = point("rope", context), peak(point("rope", context))
        for name in schemes:
            # A learned table has as many rows as the trained context: here that is the context of the step.
            mine, theirs = steps_in_turns([point(name, context), base], ROUNDS)
            used = peak(point(name, context))
            ratio = statistics.median(a / b for a, b in zip(mine, theirs))
            cells[name].append(f"{ratio:5.2f} {used / base_peak:6.2f}")
            row = {
                "position": name, "context": context, "time": ratio,
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
    """Memory of one step with recomputed blocks: at 65,536 tokens, or at 32,768 with its growth from 16,384 on."""
    for name in schemes:
        if name in LONGEST:
            row = {"position": name, "context": 65_536, "peak_bytes": peak(point(name, 65_536, recompute="block"))}
        else:
            half, whole = (peak(point(name, c, recompute="block")) for c in (16_384, 32_768))
            activations = whole - standing_bytes(name)
            times = activations / (half - standing_bytes(name))
            row = {
                "position": name,
                "context": 32_768,
                "peak_bytes": whole,
                "activation_bytes": activations,
                "times": times,
            }
        print(json.dumps(row), flush=True)


def standing_bytes(position: str) -> int:
    """Weights, gradients and optimizer state: what of a step's memory is there whatever the context."""
    at = point(position, 8)
    config = ModelConfig.model_validate(at.model)
    attention = ATTENTIONS.config(at.attention)
    model = Transformer(config, POSITIONS.config(at.position), attention, vocab_size=at.vocab_size, context=32_768)
    optimizer = OPTIMIZERS.get("muon")(OPTIMIZERS.config(at.optim)).build(model)
    model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    optimizer.step()
    state = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.parameters(), *state])


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["long"]:
        longest(words[1:] or [*LONGEST, *(n for n in POSITIONS.names() if n not in LONGEST)])
    else:
        compare(words or POSITIONS.names())


main()
