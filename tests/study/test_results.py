"""What a study's results come to: changes of loss of one way of scoring, pictures of what was asked by depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctxlab.records.run import Run
from ctxlab.records.schema import DocumentSums
from ctxlab.study.results import FIGURE, MAPS, SUMMARY, save_report
from tests.records.builders import make_run, result


def scored(root: Path) -> Run:
    """A run at 256 whose loss rises by 0.25 at 512; with bos and over a moving cache it is something else."""
    run = make_run(root)
    for axes, more in (({}, 0.0), ({"bos": True}, 5.0), ({"sinks": 4}, 7.0), ({"stride": 64}, 9.0)):
        for context, nats in ((256, 3.0), (512, 3.25)):
            where: dict[str, Any] = {"split": "test", "axes": axes}
            run.measure(result("nats_per_token", nats + more * context, context, **where))
            sums = {"nats": (10 * nats, 20 * nats + context / 256), "targets": (10, 20), "n_bytes": (30, 60)}
            run.add_documents(DocumentSums(context=context, split="test", axes=axes, names=("a", "b"), **sums))
    return run


def test_the_change_with_length_is_that_of_windows_side_by_side(tmp_path: Path) -> None:
    save_report("mine", [scored(tmp_path / "runs")], tmp_path)
    (row,) = [json.loads(line) for line in (tmp_path / SUMMARY).read_text().splitlines()]
    assert (row["context"], row["facts"]["difference"], row["facts"]["difference_context"]) == (512, 0.25, 256)
    assert (tmp_path / FIGURE).exists()
    assert not (tmp_path / MAPS).exists()


def test_what_was_asked_by_depth_is_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    facts = {"items": 20, "chance": 0.1, "oracle": 1.0, "examples": "x"}
    for depth in (0.0, 1.0):
        axes = {"task": "needle", "depth": depth}
        run.measure(result("accuracy", depth, 256, low=0.0, high=1.0, axes=axes, protocol="p", facts=facts))
    save_report("mine", [run], tmp_path)
    assert (tmp_path / MAPS).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / FIGURE).exists()
