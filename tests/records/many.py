"""Thousands of finished runs made by hand, quickly: the files that a training leaves, from one pattern.

python -m tests.records.many FOLDER 2000 10000      runs, steps of each
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

from ctxlab.records.schema import METRICS

POSITIONS = ("rope", "alibi", "nope", "t5", "kerple", "fire")
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
_LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"


def make_many(root: Path, count: int, steps: int = 0, *, seed: int = 0) -> None:
    """`count` runs in `root`, each with results at six contexts and, where asked, a row of metrics a step."""
    draw = random.Random(seed)
    for number in range(count):
        position = POSITIONS[number % len(POSITIONS)]
        context = CONTEXTS[number // len(POSITIONS) % 3]
        ending = "".join(_LETTERS[number // 32**place % 32] for place in range(4))
        folder = root / f"nano-{position}-{context}-{ending}"
        folder.mkdir(parents=True)
        floor = 2.5 + draw.random()
        (folder / "run.json").write_text(json.dumps(_record(folder.name, number, position, context)), encoding="utf-8")
        (folder / "measurements.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in _results(floor)), encoding="utf-8"
        )
        if steps:
            (folder / "metrics.jsonl").write_text("".join(_metrics(floor, steps, draw)), encoding="utf-8")


def _record(name: str, number: int, position: str, context: int) -> dict[str, object]:
    minutes, hours = number % 60, number // 60
    return {
        "schema": 1, "id": name, "name": name.rpartition("-")[0], "command": "train", "line": "ctxlab train",
        "status": "done" if number % 20 else "failed", "reason": "" if number % 20 else "told to",
        "started": f"2026-{1 + hours // 24 % 12:02}-{1 + hours // 288 % 28:02}T{hours % 24:02}:{minutes:02}:00.000+00:00",
        "finished": None, "wall_seconds": 100.0 + number, "attempt": 1, "parent": None, "sweep": None,
        "experiment": None, "tags": [], "note": "",
        "config": {
            "seed": number % 5, "context": context, "name": "auto", "tags": [], "note": "", "init": "none",
            "model": {"name": "nano", **{f"setting_{n}": n for n in range(25)}, "d_model": 128},
            "position": {"name": position, "theta": 10000.0},
            "attention": {"name": "full", "kernel": "auto"},
            "optim": {"name": "muon", "lr": 0.02, **{f"setting_{n}": n / 7 for n in range(15)}},
            "trainer": {"name": "quick", "max_tokens": 1000000, **{f"setting_{n}": "auto" for n in range(25)}},
            "data": {"name": "shakespeare", **{f"setting_{n}": "none" for n in range(8)}},
            "eval": {"perplexity": {f"setting_{n}": "auto" for n in range(8)}},
        },
        "parameters": {"all": 900000, "without_embeddings": 800000},
        "provenance": {"seed": number % 5, "ctxlab": "0.1", "libraries": {f"library{n}": "1.0" for n in range(12)}},
        "artifacts": {}, "process": {},
    }  # fmt: skip


def _results(floor: float) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for rank, context in enumerate(CONTEXTS):
        nats = floor + 0.1 * rank
        for name, value in (
            ("nats_per_token", nats), ("perplexity", math.exp(nats)), ("bits_per_byte", nats / math.log(2) / 3),
            ("peak_memory_bytes", 1e6 * context), ("step_seconds", 1e-4 * context), ("tokens_per_second", 1e4),
        ):  # fmt: skip
            found.append(
                {"name": name, "value": value, "unit": METRICS[name].unit, "context": context, "split": "test"}
            )
    return found


def _metrics(floor: float, steps: int, draw: random.Random) -> list[str]:
    lines = []
    for step in range(1, steps + 1):
        loss = floor + 5 * step**-0.5 + draw.gauss(0, 0.05)
        row = {
            "split": "train", "step": step, "tokens": step * 4096, "seconds": step * 0.1, "loss": loss,
            "learning_rate": 0.02, "gradient_norm": abs(draw.gauss(1, 0.2)),
        }  # fmt: skip
        lines.append(json.dumps(row) + "\n")
    return lines


if __name__ == "__main__":
    make_many(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
