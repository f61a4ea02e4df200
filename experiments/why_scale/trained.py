"""What became of attention in runs whose scores were divided or not: weights on test text, and gradients in training.

Words are ids of runs in the folder of runs, or what those begin with. A row is a
way, means over its runs with the 95% interval of Student's t.

    python experiments/why_scale/trained.py why_scale
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ctxlab.cli.environment import set_process_defaults

set_process_defaults()  # before torch is imported

import torch

from ctxlab.config.plugins import load
from ctxlab.data.prepare import TextDataset, prepare
from ctxlab.data.source import SOURCES
from ctxlab.data.windows import EvalSegments
from ctxlab.model.seeing import Seen, look
from ctxlab.records.run import Run
from ctxlab.study.script import cache_of, given_runs, mean, run_script
from ctxlab.train.checkpoint import open_run

WINDOWS = 64  # of the test split
FIRST, LAST = 20, 100  # steps at the beginning and at the end of training


def measure(run: Run) -> dict[str, float]:
    """Means over layers, heads and the queries of test windows that see at least half of them; medians over steps.

    entropy in nats, largest: the largest weight, saturated: share of queries with one weight above 0.99.
    """
    loaded = open_run(run)
    data = SOURCES.config(run.record.config["data"])
    dataset = prepare(data, loaded.tokenizer, cache=cache_of(run))
    assert isinstance(dataset, TextDataset)
    segments = EvalSegments(dataset.splits["test"], loaded.context, max_segments=WINDOWS)
    tokens = torch.stack([torch.from_numpy(segments.segment(n)[1][:-1].astype("int64")) for n in range(segments.n)])
    sums: dict[str, list[float]] = defaultdict(list)

    def visit(seen: Seen) -> None:
        for _, rows, p in seen.rows():
            late = p[:, max(0, tokens.shape[1] // 2 - rows.start) :].double()
            if late.numel():
                sums["entropy"] += torch.special.entr(late).sum(-1).flatten().tolist()
                sums["largest"] += late.amax(-1).flatten().tolist()
                sums["saturated"] += (late.amax(-1) > 0.99).double().flatten().tolist()

    look(loaded.model, tokens, visit)
    norms = [row["gradient_norm"] for row in run.metrics() if row["split"] == "train"]
    means = {name: statistics.fmean(values) for name, values in sums.items()}
    return {
        **means,
        "first_gradient_norm": statistics.median(norms[:FIRST]),
        "last_gradient_norm": statistics.median(norms[-LAST:]),
    }


def main(selectors: Sequence[str]) -> None:
    """Raises CtxlabError, one line, for what cannot be read."""
    ways: dict[tuple[bool, bool], list[dict[str, float]]] = defaultdict(list)
    for run in given_runs(selectors):
        for path, sha256 in run.record.plugins:
            load(Path(path), sha256)
        position = run.record.config["position"]
        ways[position["unit"], position["divided"]].append(measure(run))
    for (unit, divided), found in sorted(ways.items()):
        row: dict[str, object] = {"unit": unit, "divided": divided, "runs": len(found)}
        for name in found[0]:
            row |= mean([one[name] for one in found], name)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run_script(main)
