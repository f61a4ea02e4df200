"""What the heads of runs that differ by their number of heads attend to, on test text: printed, and drawn beside the loss.

Words are ids of runs in the folder of runs, or what those begin with. A row is a
number of heads, means over its runs with the 95% interval of Student's t.

    python experiments/why_heads/heads.py why_heads
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

from ctxlab.cli.environment import set_process_defaults

set_process_defaults()  # before torch is imported

import altair
import torch

from ctxlab.data.prepare import TextDataset, prepare
from ctxlab.data.source import SOURCES
from ctxlab.data.windows import EvalSegments
from ctxlab.evaluation.heads import HeadSums
from ctxlab.model.seeing import Seen, look
from ctxlab.records.run import Run
from ctxlab.report.plots import PALETTE, save, styled
from ctxlab.study.script import cache_of, given_runs, mean, results_folder, run_script
from ctxlab.train.checkpoint import open_run

WINDOWS = 64  # of the test split


def measure(run: Run) -> tuple[dict[str, float], list[float]]:
    """Numbers of a run, and the previous-token score of each of its heads.

    loss: nats per token of the test text. previous: the largest previous-token score of its heads. near, far: the smallest and
    the largest mean distance (tokens). entropy: mean over heads, nats. apart: 1/2 sum_j |p_ij - p'_ij|, from 0 (the same
    weights) to 1 (no key in common), mean over queries and pairs of heads of a layer.
    """
    loaded = open_run(run)
    dataset = prepare(
        SOURCES.config(run.record.config["data"]),
        loaded.tokenizer,
        cache=cache_of(run),
    )
    assert isinstance(dataset, TextDataset)
    segments = EvalSegments(dataset.splits["test"], loaded.context, max_segments=WINDOWS)
    tokens = torch.stack([torch.from_numpy(segments.segment(n)[1][:-1].astype("int64")) for n in range(segments.n)])
    T = tokens.shape[1]
    sums: dict[tuple[int, int], HeadSums] = {}
    apart: list[float] = []

    def visit(seen: Seen) -> None:
        p = seen.weights().double()  # (B,H,T,T)
        for head in range(seen.n_heads):
            one = sums[seen.layer, head] = HeadSums(T, T, crosses=False, has_sink=False)
            for window in p[:, head]:
                one.add(slice(0, T), window)
        for a, b in combinations(range(seen.n_heads), 2):
            apart.append(float((p[:, a] - p[:, b]).abs().sum(-1).mean() / 2))

    look(loaded.model, tokens, visit)
    heads = [one.summary() for one in sums.values()]
    previous = [(head.previous or 0.0) / segments.n for head in heads]
    distances = [(head.distance or 0.0) / segments.n for head in heads]
    losses = [m for m in run.measurements() if (m.name, m.context) == ("nats_per_token", loaded.context)]
    (loss,) = (m.value for m in losses if "baseline" not in m.axes)
    assert loss is not None
    found = {
        "loss": loss,
        "previous": max(previous),
        "near": min(distances),
        "far": max(distances),
        "entropy": statistics.fmean(head.entropy / segments.n for head in heads),
    }
    return {**found, **({"apart": statistics.fmean(apart)} if apart else {})}, previous


def main(selectors: Sequence[str]) -> None:
    """Raises CtxlabError, one line, for what cannot be read."""
    ways: dict[int, list[dict[str, float]]] = defaultdict(list)
    heads: list[dict[str, float]] = []
    for run in given_runs(selectors):
        n_heads = run.record.config["model"]["n_heads"]
        found, previous = measure(run)
        ways[n_heads].append(found)
        heads += [{"heads": n_heads, "previous": score} for score in previous]
    rows = []
    for n_heads, several in sorted(ways.items()):
        row: dict[str, object] = {"n_heads": n_heads, "runs": len(several)}
        for name in several[0]:
            row |= mean([one[name] for one in several], name)
        rows.append(row)
        print(json.dumps(row), flush=True)
    draw(rows, heads)


def draw(rows: list[dict[str, object]], heads: list[dict[str, float]]) -> None:
    """The loss by the number of heads, and every head's previous-token score."""
    losses = altair.Chart(altair.Data(values=rows)).encode(
        x=altair.X("n_heads:O", axis=altair.Axis(title="heads, equal width in all", labelAngle=0))
    )
    y = altair.Scale(zero=False)
    title = "nats per byte, test; mean and 95% over seeds"
    loss = losses.mark_rule(color=PALETTE[0]).encode(
        y=altair.Y("loss_low:Q", scale=y, axis=altair.Axis(title=title, gridOpacity=0.5)), y2="loss_high:Q"
    ) + losses.mark_point(filled=True, size=70, color=PALETTE[0], opacity=1).encode(y=altair.Y("loss:Q", scale=y))
    each = altair.Chart(altair.Data(values=heads)).mark_point(size=45, color=PALETTE[1]).encode(
        x=altair.X("heads:O", axis=altair.Axis(title="heads, equal width in all", labelAngle=0)),
        y=altair.Y(
            "previous:Q", scale=altair.Scale(domain=[0, 1]),
            axis=altair.Axis(title="previous-token score, each head", gridOpacity=0.5),
        ),
    )  # fmt: skip
    panels = [panel.properties(width=260, height=260) for panel in (loss, each)]
    save(
        styled(altair.hconcat(*panels).properties(title="1 to 8 heads of 64 to 8")),
        results_folder("why_heads") / "heads.png",
    )


if __name__ == "__main__":
    run_script(main)
