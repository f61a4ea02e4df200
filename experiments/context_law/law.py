"""What context, size and positional scheme buy, from the runs of context_law and the profiles of their steps: printed, and drawn.

Words are ids of runs in the folder of runs, or what those begin with. Every row says what it
is of: `loss`, by scheme; `law`, loss against parameters at a context; `pair`, the same from one size to
the next; `gain`, what a longer trained context is worth; `beyond`, the rise of loss beyond the trained context;
`scheme`, a scheme against rope; `cost`, a training step by context.

    python experiments/context_law/law.py pico micro nano tiny profile
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import altair

from ctxlab.profiling.fit import power_law
from ctxlab.records.run import Run
from ctxlab.report.plots import PALETTE, curve, save, styled
from ctxlab.study.script import given_runs, mean, results_folder, run_script

REFERENCE = "rope"
Cell = tuple[str, int, str]  # model, trained context, position
Losses = dict[int, dict[int, float]]  # of a cell: by seed and context
Row = dict[str, Any]


def main(selectors: Sequence[str]) -> None:
    """Raises CtxlabError, one line, for what cannot be read."""
    runs = given_runs(selectors)
    losses: dict[Cell, Losses] = defaultdict(dict)
    parameters: dict[str, int] = {}
    for run in runs:
        if run.record.command != "train" or run.record.status != "done":
            continue
        config = run.record.config
        model = config["model"]["name"]
        cell = (model, config["context"], config["position"]["name"])
        losses[cell][config["seed"]] = dict(curve(run.measurements(), "nats_per_token"))
        if cell[2] == REFERENCE:  # others may have parameters of their own
            parameters[model] = run.record.parameters["without_embeddings"]
    laws, pairs = list(law_rows(losses, parameters)), list(pair_rows(losses, parameters))
    gains, costs = list(gain_rows(losses)), list(cost_rows(runs))
    for rows in (loss_rows(losses), laws, pairs, gains, beyond_rows(losses), scheme_rows(losses), costs):
        for row in rows:
            print(json.dumps(row), flush=True)
    if losses:
        draw_loss(losses)
        draw_law(losses, parameters, laws)


def loss_rows(losses: dict[Cell, Losses]) -> Iterable[Row]:
    """Nats per token of each scheme by size, trained context and context scored: the mean over seeds."""
    for model, trained in sorted({(model, trained) for model, trained, _ in losses}):
        schemes = {position: by for (m, t, position), by in sorted(losses.items()) if (m, t) == (model, trained)}
        for context in sorted({context for by in schemes.values() for context in contexts(by)}):
            row: Row = {"of": "loss", "model": model, "trained": trained, "scored": context}
            for position, by in schemes.items():
                row |= mean([one[context] for one in by.values() if context in one], position)
            yield row


def law_rows(losses: dict[Cell, Losses], parameters: dict[str, int]) -> Iterable[Row]:
    """L = (N_c / N)^alpha at equal tokens (Kaplan et al. 2020, arXiv:2001.08361, eq. 1.1), N without embeddings.

    At each context that models of two sizes or more were trained at, scored at that context and at the others: a line
    through the logarithms of all seeds' losses; alpha with its 95% interval, which holds if the law does.
    """
    for trained, scored in sorted({(t, c) for (_, t, p), by in losses.items() if p == REFERENCE for c in contexts(by)}):
        points = [
            (float(parameters[model]), by_context[scored])
            for (model, t, position), by_seed in losses.items()
            if position == REFERENCE and t == trained
            for by_context in by_seed.values()
            if scored in by_context
        ]
        if len({n for n, _ in points}) < 2:
            continue
        fit = power_law(points)
        yield {
            "of": "law",
            "position": REFERENCE,
            "trained": trained,
            "context": scored,
            "runs": len(points),
            "alpha": -fit.exponent,
            "alpha_low": -fit.high,
            "alpha_high": -fit.low,
            "ln_factor": math.log(fit.factor),
        }


def pair_rows(losses: dict[Cell, Losses], parameters: dict[str, int]) -> Iterable[Row]:
    """alpha from one size to the next, -ln(L'/L) / ln(N'/N), paired by seed: equal along a law, falling where it bends."""
    order = sorted(parameters, key=parameters.__getitem__)
    for trained in sorted({t for _, t, p in losses if p == REFERENCE}):
        for small, large in zip(order, order[1:]):
            ratio = math.log(parameters[large] / parameters[small])
            found = [
                -math.log(b[trained] / a[trained]) / ratio
                for a, b in by_seed(losses, (small, trained, REFERENCE), (large, trained, REFERENCE))
            ]
            if found:
                yield {"of": "pair", "from": small, "to": large, "trained": trained, **mean(found, "alpha")}


def gain_rows(losses: dict[Cell, Losses]) -> Iterable[Row]:
    """Loss at the longer trained context less loss at the shorter one, each where it was trained, paired by seed.

    `same`: both scored at the longer one, which the shorter one's models have never seen.
    """
    for model, position in sorted({(model, position) for model, _, position in losses}):
        trained = sorted(t for m, t, p in losses if (m, p) == (model, position))
        for short, long in zip(trained, trained[1:]):
            pairs = by_seed(losses, (model, short, position), (model, long, position))
            own = [b[long] - a[short] for a, b in pairs]
            same = [b[long] - a[long] for a, b in pairs if long in a]
            if own and same:
                row = {
                    "of": "gain",
                    "model": model,
                    "position": position,
                    "context": long,
                    "shorter": short,
                    "seeds": len(own),
                }
                yield {**row, **mean(own, "own"), **mean(same, "same")}


def beyond_rows(losses: dict[Cell, Losses]) -> Iterable[Row]:
    """Loss at each context beyond the trained one less loss at the trained one, by seed."""
    for (model, trained, position), by in sorted(losses.items()):
        for context in contexts(by):
            rises = [one[context] - one[trained] for one in by.values() if context in one]
            if context > trained and rises:
                row = {"of": "beyond", "model": model, "position": position, "trained": trained, "context": context}
                yield {**row, **mean(rises, "rise")}


def scheme_rows(losses: dict[Cell, Losses]) -> Iterable[Row]:
    """Loss of a scheme less that of rope at the trained context, paired by seed."""
    for model, trained, position in sorted(losses):
        pairs = by_seed(losses, (model, trained, REFERENCE), (model, trained, position))
        differences = [b[trained] - a[trained] for a, b in pairs]
        if position != REFERENCE and differences:
            row = {"of": "scheme", "model": model, "position": position, "trained": trained, "seeds": len(differences)}
            yield {**row, **mean(differences, "difference")}


def cost_rows(runs: Sequence[Run]) -> Iterable[Row]:
    """A training step of one window: seconds, bytes, and both a token against the shortest context measured."""
    for run in runs:
        if run.record.command != "profile":
            continue
        config, measured = run.record.config, run.measurements()
        seconds, peaks = dict(curve(measured, "step_seconds")), dict(curve(measured, "peak_memory_bytes"))
        shortest = min(seconds, default=0)
        for context in sorted(seconds.keys() & peaks.keys()):
            yield {
                "of": "cost",
                "model": config["model"]["name"],
                "position": config["position"]["name"],
                "context": context,
                "step_seconds": seconds[context],
                "peak_MiB": peaks[context] / 2**20,
                "times_a_token": seconds[context] / context / (seconds[shortest] / shortest),
            }


def contexts(by: Losses) -> list[int]:
    return sorted({context for one in by.values() for context in one})


def by_seed(losses: dict[Cell, Losses], first: Cell, second: Cell) -> list[tuple[dict[int, float], dict[int, float]]]:
    """What two cells lost, for the seeds that both have."""
    a, b = losses.get(first, {}), losses.get(second, {})
    return [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]


def draw_loss(losses: dict[Cell, Losses]) -> None:
    """Loss by context: a panel a size and trained context, a curve a scheme, the mean over seeds and its interval."""
    schemes = sorted({position for _, _, position in losses}, key=lambda name: (name != REFERENCE, name))
    sizes = [m for m in dict.fromkeys(m for m, _, _ in losses) if len({p for n, _, p in losses if n == m}) > 1]
    rows = [
        {"model": model, "trained": trained, "position": position, "context": context, **mean(values, "nats")}
        for (model, trained, position), by in losses.items()
        if model in sizes
        for context in contexts(by)
        if (values := [one[context] for one in by.values() if context in one])
    ]
    scored = sorted({row["context"] for row in rows})
    ends = [value for row in rows for value in (row["nats"], row["nats_low"], row["nats_high"]) if value is not None]
    y_scale = altair.Scale(domain=[min(ends) - 0.05, max(ends) + 0.05], nice=False, zero=False)
    colour = altair.Color(
        "position:N", title=None, sort=schemes, scale=altair.Scale(domain=schemes, range=list(PALETTE[: len(schemes)])),
        legend=altair.Legend(orient="bottom", symbolOpacity=1, symbolStrokeWidth=3),
    )  # fmt: skip
    panels = []
    for model in sizes:
        line = []
        for trained in sorted({row["trained"] for row in rows if row["model"] == model}):
            here = [row for row in rows if (row["model"], row["trained"]) == (model, trained)]
            base = altair.Chart(altair.Data(values=here)).encode(
                x=altair.X(
                    "context:Q",
                    scale=altair.Scale(type="log", base=2, domain=[scored[0], scored[-1]], nice=False),
                    axis=altair.Axis(values=scored, title="context scored (tokens)", format="d", grid=False),
                ),
                color=colour,
            )
            at = altair.Chart(altair.Data(values=[{"context": trained}])).mark_rule(
                strokeDash=[4, 4], color="#777777"
            ).encode(x="context:Q")  # fmt: skip
            band = base.mark_area(opacity=0.15).encode(y=altair.Y("nats_low:Q", scale=y_scale), y2="nats_high:Q")
            y = altair.Y("nats:Q", scale=y_scale, axis=altair.Axis(title="test loss (nats/token)", gridOpacity=0.5))
            lines = base.encode(y=y).mark_line(strokeWidth=2, point=altair.OverlayMarkDef(size=40, filled=True))
            title = altair.Title(f"{model}, trained at {trained}", fontSize=13, anchor="start")
            line.append(altair.layer(at, band, lines).properties(width=300, height=210, title=title))
        panels.append(altair.hconcat(*line))
    heading = altair.Title("Loss by context: mean over seeds and 95%", anchor="start", fontSize=15, offset=12)
    save(styled(altair.vconcat(*panels).properties(title=heading)), results_folder("context_law") / "loss.png")


def draw_law(losses: dict[Cell, Losses], parameters: dict[str, int], laws: Sequence[Row]) -> None:
    """Loss by parameters at each context trained, every seed a point, and the fitted lines; both axes logarithmic."""
    fitted = {row["trained"]: row for row in laws if row["trained"] == row["context"]}
    names = {t: f"{t} tokens: N^-{row['alpha']:.3f}" for t, row in sorted(fitted.items())}
    points = [
        {"parameters": parameters[model], "nats": one[trained], "trained": names[trained]}
        for (model, trained, position), by in losses.items()
        if position == REFERENCE and trained in names
        for one in by.values()
    ]
    if not points:
        return
    ends = min(parameters.values()), max(parameters.values())
    lines = [
        {"parameters": n, "nats": math.exp(row["ln_factor"]) * n ** -row["alpha"], "trained": names[t]}
        for t, row in fitted.items()
        for n in ends
    ]
    domain = list(names.values())
    colour = altair.Color(
        "trained:N", title="trained and scored at", scale=altair.Scale(domain=domain, range=list(PALETTE[: len(domain)])),
        legend=altair.Legend(orient="top-right", symbolOpacity=1),
    )  # fmt: skip
    x = altair.X(
        "parameters:Q", scale=altair.Scale(type="log", domain=[ends[0] / 1.3, ends[1] * 1.3], nice=False),
        axis=altair.Axis(title="parameters without embeddings", format="~s", grid=False, values=sorted(parameters.values())),
    )  # fmt: skip
    heights = [row["nats"] for row in (*points, *lines)]
    y = altair.Y(
        "nats:Q", scale=altair.Scale(type="log", domain=[min(heights) * 0.98, max(heights) * 1.02], nice=False),
        axis=altair.Axis(title="test loss (nats/token)", gridOpacity=0.5, tickCount=6, format=".1f"),
    )  # fmt: skip
    seeds = altair.Chart(altair.Data(values=points)).mark_point(filled=True, size=55, opacity=0.8)
    laid = altair.Chart(altair.Data(values=lines)).mark_line(strokeWidth=1.5, strokeDash=[6, 3])
    chart = altair.layer(*(one.encode(x=x, y=y, color=colour) for one in (laid, seeds)))
    heading = altair.Title("RoPE: loss by size at one budget of tokens", anchor="start", fontSize=15, offset=12)
    save(styled(chart.properties(width=440, height=320, title=heading)), results_folder("context_law") / "law.png")


if __name__ == "__main__":
    run_script(main)
