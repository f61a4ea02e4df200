"""Validation loss by step of masked language models that differ by their positions: the mean over seeds, drawn and printed.

Words are ids of runs in the folder of runs, or what those begin with.

    python experiments/why_positions/curves.py why_positions
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

import altair

from ctxlab.report.plots import PALETTE, save, styled
from ctxlab.study.script import given_runs, mean, results_folder, run_script


def main(selectors: Sequence[str]) -> None:
    """Raises CtxlabError, one line, for what cannot be read."""
    by_step: dict[tuple[str, int], list[float]] = defaultdict(list)
    for run in given_runs(selectors):
        position = run.record.config["position"]["name"]
        for row in run.metrics():
            if row["split"] == "validation":
                by_step[position, row["step"]].append(row["nats_per_token"])
    rows = []
    for (position, step), losses in sorted(by_step.items()):
        row = {"position": position, "step": step, "seeds": len(losses), **mean(losses, "validation_nats")}
        rows.append(row)
        print(json.dumps(row), flush=True)
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
    save(styled(chart), results_folder("why_positions") / "validation_by_step.png")


if __name__ == "__main__":
    run_script(main)
