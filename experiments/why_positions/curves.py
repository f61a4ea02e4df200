"""Validation loss by step of masked language models that differ by their positions: the mean over seeds, drawn and printed.

Words are ids of runs in the folder of runs, or what those begin with.

    python experiments/why_positions/curves.py why_positions
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import altair

from ctxlab.errors import ConfigError, CtxlabError
from ctxlab.evaluation.intervals import ratio_interval
from ctxlab.records.store import RunStore
from ctxlab.report.plots import PALETTE, save, styled

RESULTS = Path(os.environ.get("CTXLAB_RESULTS", "experiments/why_positions/results"))


def main(selectors: Sequence[str]) -> None:
    """Raises CtxlabError, one line, for what cannot be read."""
    if not selectors:
        raise ConfigError("run: expected runs, got none; python experiments/why_positions/curves.py RUN RUN RUN")
    runs = RunStore(Path(os.environ.get("CTXLAB_RUNS", "runs"))).resolve_all(selectors)
    by_step: dict[tuple[str, int], list[float]] = defaultdict(list)
    for run in runs:
        position = run.record.config["position"]["name"]
        for row in run.metrics():
            if row["split"] == "validation":
                by_step[position, row["step"]].append(row["nats_per_token"])
    rows = []
    for (position, step), losses in sorted(by_step.items()):
        low, high = ratio_interval(losses, [1.0] * len(losses)) or (None, None)
        rows.append({"position": position, "step": step, "seeds": len(losses), "validation_nats": sum(losses) / len(losses),
                     "validation_nats_low": low, "validation_nats_high": high})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    draw(rows)


def draw(rows: list[dict[str, object]]) -> None:
    names = sorted({str(row["position"]) for row in rows})
    lines = altair.Chart(altair.Data(values=rows)).encode(
        x=altair.X("step:Q", axis=altair.Axis(title="optimizer step", grid=False)),
        color=altair.Color(
            "position:N", title=None, scale=altair.Scale(domain=names, range=list(PALETTE[: len(names)])),
            legend=altair.Legend(orient="top-right", symbolOpacity=1),
        ),
    )  # fmt: skip
    y = altair.Y(
        "validation_nats:Q", scale=altair.Scale(zero=False), axis=altair.Axis(title="nats per hidden byte, validation")
    )
    band = lines.mark_area(opacity=0.18).encode(
        y=altair.Y("validation_nats_low:Q", scale=altair.Scale(zero=False)), y2="validation_nats_high:Q"
    )
    heading = "An encoder says hidden bytes: mean over seeds and 95%"
    chart = (band + lines.mark_line(strokeWidth=2).encode(y=y)).properties(width=560, height=320, title=heading)
    RESULTS.mkdir(parents=True, exist_ok=True)
    save(styled(chart), RESULTS / "validation_by_step.png")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except CtxlabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
