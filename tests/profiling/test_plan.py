"""What a plan says beyond single predictions: known errors, what could be changed."""

from __future__ import annotations

import json
from pathlib import Path

from ctxlab.profiling.plan import changes, known_error, planned
from tests.profiling.builders import point


def test_known_errors_are_those_of_the_files_points_that_are_like_the_plan(tmp_path: Path) -> None:
    traced = {"precision": "fp32", "way": "traced"}
    rows = [
        {"device": "cpu", "status": "done", "measured_bytes": 5e8, "error": 0.02, "error_bytes": 1e7},
        {"device": "cpu", "status": "done", "measured_bytes": 4e8, "error": -0.08, "error_bytes": -3.2e7},
        {"device": "cpu", "status": "done", "measured_bytes": 3e8, "error": 0.01, "error_bytes": 3e6},
        {"device": "cpu", "status": "done", "measured_bytes": 1e8, "error": -0.3, "error_bytes": -3e7},
        {"device": "cpu", "status": "timed_out", "measured_bytes": None},
        {"device": "cpu", "status": "done", "room": 1.03},
        {"summary": "all"},
    ]
    rows = [
        {**traced, **row, "model": "nano", "position": "rope", "recompute": "none", "context": n}
        if "device" in row
        else row
        for n, row in enumerate(rows)
    ]
    rows += [{**rows[0], "precision": "bf16", "error": 0.5}, {**rows[0], "way": "closed form", "error": 0.2}]
    files = [tmp_path / "some.txt", tmp_path / "others.txt"]
    for file, some in zip(files, (rows[:2], rows[2:])):
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
    found = known_error(files, "cpu", "fp32", {"traced", "continued from traces"})
    assert found is not None
    assert (found.n_points, found.median, found.worst, found.worst_bytes) == (4, 0.02, 0.08, 3e7)
    assert known_error(files * 2, "cpu", "fp32", {"traced"}) == found  # nothing counts twice
    for precision, way, error in (("bf16", "traced", 0.5), ("fp32", "closed form", 0.2)):
        other = known_error(files, "cpu", precision, {way})
        assert other is not None
        assert (other.n_points, other.median) == (1, error)
    assert known_error(files, "cpu", "bf16", {"closed form"}) is None
    assert known_error(files, "cuda", "fp32", {"traced"}) is None
    assert known_error([], "cpu", "fp32", {"traced"}) is None


def test_what_could_be_changed_is_what_is_not_set_yet() -> None:
    words = [word for word, _ in changes(point("nano", 64))]
    assert words[:3] == ["trainer.recompute=selective", "trainer.recompute=block", "trainer.precision=bf16"]
    assert "attention=sliding_window attention.size=1024" in words
    assert words[-1] == "trainer.recompute=block trainer.precision=bf16"
    set_already = [word for word, _ in changes(point("nano", 64, recompute="block", precision="bf16"))]
    assert not any("recompute" in word or "precision" in word for word in set_already)
    assert next(word for word, _ in changes(point("lstm_nano", 64, "none"))) == "trainer.precision=bf16"


def test_what_backward_needs_could_wait_where_there_is_another_place() -> None:
    assert "trainer.offload=disk" in [word for word, _ in changes(point("nano", 64))]
    assert ("trainer.offload=cpu", "cpu") in [(w, p.offload) for w, p in changes(point("nano", 64, device="cuda"))]
    assert not any("offload" in word for word, _ in changes(point("nano", 64, offload="disk")))


def test_a_plan_has_a_row_for_everything_and_recomputation_goes_further() -> None:
    at = point("nano", 128)
    others = [(word, other) for word, other in changes(at) if word == "trainer.recompute=block"]
    rows = planned(at, (64, 128), 300 * 2**20, others=others)
    named = {name: [row for row in rows if row.name == name] for name in {row.name for row in rows}}
    for name in ("peak_memory_bytes", "cache_bytes"):
        assert [row.context for row in named[name]] == [64, 128]
    for peak in named["peak_memory_bytes"]:
        assert peak.value == sum(row.value or 0 for row in named["part_bytes"] if row.context == peak.context)
    longest = {row.axes["change"]: row.value or 0 for row in named["longest_context"]}
    assert longest["none"] < longest["trainer.recompute=block"]
    # Keys and values of 4 layers of 128 numbers each, fp32.
    assert [row.value for row in named["cache_bytes"]] == [2 * 4 * 128 * 4 * n for n in (64, 128)]


def test_seconds_are_at_least_those_of_the_operations_at_a_matmuls_rate() -> None:
    (peak,) = [row for row in planned(point("nano", 64), (64,), 2**30, rate=1e9) if row.name == "peak_memory_bytes"]
    assert peak.facts["least_seconds"] == peak.facts["flops"] / 1e9
    (peak,) = [row for row in planned(point("nano", 64), (64,), 2**30) if row.name == "peak_memory_bytes"]
    assert "least_seconds" not in peak.facts
