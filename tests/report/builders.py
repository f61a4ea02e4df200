"""Records and consoles to render them on."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from ctxlab.records.run import Run
from tests.records.builders import costs, make_run, missing, scores

CONTEXTS = (128, 256, 512, 1024, 2048)
CURVES: Mapping[str, tuple[float, ...]] = {
    "rope": (3.9, 3.8, 4.1, 4.5, 4.9),
    "alibi": (3.8, 3.75, 3.74, 3.74, 3.73),
    "learned": (3.95, 3.9),
}


def text_of(*things: RenderableType, width: int = 80) -> str:
    """What a pipe of this width receives, without the spaces at the ends of lines."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(*things, sep="\n")
    return written(console)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip("\n").split("\n"))


def same_ids(monkeypatch: Any) -> None:
    """Ids end in aaaa, aaab, ..."""

    def endings() -> Iterator[str]:
        for letter in "abcdefghijkmnpqrstuvwxyz":
            yield f"aaa{letter}"

    drawn = endings()
    monkeypatch.setattr("ctxlab.records.store._random", lambda: next(drawn))


def trained_run(root: Path, position: str = "rope", *, with_costs: bool = True, **changes: Any) -> Run:
    """A finished run with a result at every context that its curve has, and a reason at the others."""
    values = CURVES[position]
    run = make_run(root, status="waiting", config={"position": {"name": position}}, **changes)
    for context, nats in zip(CONTEXTS, values, strict=False):
        run.measure(*scores(context, nats))
    for context in CONTEXTS[len(values) :]:
        run.measure(*missing(context, "undefined", "the learned table has 256 rows"))
    if with_costs:
        for context in CONTEXTS:
            run.measure(*costs(context, 100 * 2**20 + context * 2**18, context / 5000))
    run.update(
        status="done",
        started="2026-11-24T15:00:00.000+00:00",
        wall_seconds=200.0,
        parameters={"all": 3_500_000, "without_embeddings": 3_000_000},
        provenance=run.record.provenance.model_copy(update={"precision": "fp32", "device": "cpu"}),
    )
    return run


# nats per token of two schemes by seed: what a seed does to both is far more than what lies between them.
BY_SEED = {"rope": {1: 3.00, 2: 3.20, 3: 3.40}, "alibi": {1: 2.95, 2: 3.14, 3: 3.33}}


def repetitions(root: Path) -> list[Run]:
    """Finished runs of both schemes with every seed, scored at 256 tokens and, 0.1 higher, at 512."""
    runs = []
    for position, by_seed in BY_SEED.items():
        for seed, nats in by_seed.items():
            run = make_run(root, status="done", config={"position": {"name": position}, "seed": seed})
            run.measure(*scores(256, nats), *scores(512, nats + 0.1))
            runs.append(run)
    return runs
