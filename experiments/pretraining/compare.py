"""Translation after pretraining, and from scratch: BLEU, chrF and nats by way, means over seeds, and differences paired by seed.

Words are ids of runs in the folder of runs, or what those begin with: their name is the way, but for a digit at its end.

    python experiments/pretraining/compare.py scratch fine_tuned
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence

import altair

from ctxlab.errors import ConfigError
from ctxlab.records.run import Run
from ctxlab.report.plots import PALETTE, save, styled
from ctxlab.study.script import given_runs, mean, results_folder, run_script

METRICS = ("bleu", "chrf", "nats_per_token")


def scores(run: Run) -> dict[str, float]:
    """Raises ConfigError for a run that has not been scored on translation."""
    found = {m.name: m.value for m in run.measurements() if m.name in METRICS and m.value is not None}
    if len(found) < len(METRICS):
        raise ConfigError(f"run: {run.id} has no {' and no '.join(name for name in METRICS if name not in found)}")
    return found


def main(selectors: Sequence[str]) -> None:
    """The first way that is named is what the others are compared with. Raises CtxlabError, one line."""
    ways: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    curves: dict[tuple[str, int], list[float]] = defaultdict(list)
    for run in given_runs(selectors):
        way = run.record.name.rstrip("0123456789")
        ways[way][run.record.config["seed"]] = scores(run)
        for row in run.metrics():
            if row["split"] == "validation":
                curves[way, row["step"]].append(row["nats_per_token"])
    first = next(iter(ways.values()))
    for way, by_seed in ways.items():
        row: dict[str, object] = {"way": way, "seeds": len(by_seed)}
        for name in METRICS:
            row |= mean([found[name] for found in by_seed.values()], name)
            paired = [found[name] - first[seed][name] for seed, found in by_seed.items() if seed in first]
            if paired and by_seed is not first:
                row |= mean(paired, f"{name}_difference")
        print(json.dumps(row), flush=True)
    draw([{"way": way, "step": step, "nats": statistics.fmean(found)} for (way, step), found in curves.items()])


def draw(rows: list[dict[str, object]]) -> None:
    """Validation loss by step of translation."""
    names = list(dict.fromkeys(str(row["way"]) for row in rows))
    chart = altair.Chart(altair.Data(values=rows)).mark_line(strokeWidth=2).encode(
        x=altair.X("step:Q", axis=altair.Axis(title="optimizer step of translation", grid=False)),
        y=altair.Y(
            "nats:Q", scale=altair.Scale(zero=False), axis=altair.Axis(title="nats per target token, validation")
        ),
        color=altair.Color(
            "way:N", title=None, scale=altair.Scale(domain=names, range=list(PALETTE[: len(names)])),
            legend=altair.Legend(orient="top-right"),
        ),
    )  # fmt: skip
    heading = "French to English: mean over seeds"
    save(
        styled(chart.properties(width=560, height=320, title=heading)),
        results_folder("pretraining") / "validation_by_step.png",
    )


if __name__ == "__main__":
    run_script(main)
