"""Runs taken together: what tells them apart, means and intervals against a hand computation, curves by their identities."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.errors import ConfigError
from ctxlab.records.store import RunStore
from ctxlab.report.groups import (
    METRICS,
    View,
    average_curve,
    by_context,
    grouped,
    smoothed,
    telling,
    thinned,
)
from ctxlab.report.subjects import subjects_in, subjects_of, with_evaluations
from tests.records.builders import costs, make_run, result, scores
from tests.report.builders import repetitions

T_2 = 4.302652729911275  # Student's t, 0.975, two degrees of freedom
CURVES = st.lists(st.floats(-5, 5), min_size=1, max_size=60).map(
    lambda ys: [(10 * (n + 1), y) for n, y in enumerate(ys)]
)


def test_seeds_are_one_group_with_the_mean_and_interval_of_the_textbook(tmp_path: Path) -> None:
    groups = grouped(subjects_of(repetitions(tmp_path)))
    assert [(group.label, group.panel, len(group.members)) for group in groups] == [("rope", "", 3), ("alibi", "", 3)]
    (at_256, at_512) = by_context(groups[0], "nats_per_token")
    half = T_2 * 0.2 / math.sqrt(3)  # 3.0, 3.2, 3.4: standard deviation 0.2
    assert at_256 == pytest.approx((256, 3.2, 3.2 - half, 3.2 + half, 3), abs=1e-9)
    assert at_512.y == pytest.approx(3.3)


def test_costs_are_averaged_in_logarithms_so_no_interval_reaches_zero(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, config={"seed": seed}, status="done") for seed in (1, 2)]
    for run, seconds in zip(runs, (1.0, 4.0), strict=True):
        run.measure(*costs(256, 2**20, seconds))
    (point,) = by_context(grouped(subjects_of(runs))[0], "step_seconds", log=True)
    assert point.y == pytest.approx(2.0)
    assert point.low is not None
    assert point.high is not None
    assert 0 < point.low < point.y < point.high
    assert point.low * point.high == pytest.approx(4.0)


def test_a_run_alone_keeps_its_own_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="done")
    run.measure(*scores(256, 3.0, half=0.05))
    (point,) = by_context(grouped(subjects_of([run]))[0], "nats_per_token")
    assert point == pytest.approx((256, 3.0, 2.95, 3.05, 1))


def test_keys_tell_apart_and_say_nothing_twice(tmp_path: Path) -> None:
    """The batch follows the context here, and the seed is never a key: neither separates more."""
    runs = [
        make_run(tmp_path, config={
            "position": {"name": name, **({"theta": 1e4} if name == "rope" else {})}, "context": context, "seed": seed,
            "trainer": {"batch_tokens": 16 * context},
        })
        for name in ("rope", "alibi") for context in (128, 256) for seed in (1, 2)
    ]  # fmt: skip
    subjects = subjects_of(runs)
    assert telling(subjects) == ["position", "context"]
    assert [group.label for group in grouped(subjects)] == [
        "rope, context 128", "rope, context 256", "alibi, context 128", "alibi, context 256",
    ]  # fmt: skip


def test_more_groups_than_colours_get_a_panel_for_each_of_the_rest(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, config={"position": {"name": name}, "context": context})
        for name in ("rope", "alibi", "nope")
        for context in (512, 128, 256)
    ]
    groups = grouped(subjects_of(runs))
    assert {group.colour for group in groups} == {"rope", "alibi", "nope"}
    assert list(dict.fromkeys(group.panel for group in groups)) == ["context 128", "context 256", "context 512"]
    assert len({group.label for group in groups}) == 9


def test_a_view_may_group_by_any_key(tmp_path: Path) -> None:
    groups = grouped(subjects_of(repetitions(tmp_path)), View(group=("seed",)))
    assert [(group.label, len(group.members)) for group in groups] == [("seed 1", 2), ("seed 2", 2), ("seed 3", 2)]


@given(
    st.builds(
        View,
        runs=st.lists(st.from_regex(r"[a-z][a-z0-9._-]{0,8}", fullmatch=True), unique=True).map(tuple),
        group=st.lists(st.sampled_from(["position", "model.d_model", "a&b", "ü"]), unique=True).map(tuple),
        metric=st.sampled_from(METRICS),
        smooth=st.sampled_from([0.0, 0.5, 0.99]),
        log_x=st.booleans(),
        log_y=st.booleans(),
        outliers=st.booleans(),
        filter=st.text(max_size=8),
        sort=st.sampled_from(["", "perplexity", "started:descending"]),
    )
)
def test_a_view_is_its_query(view: View) -> None:
    from urllib.parse import parse_qsl

    assert View.of_query(dict(parse_qsl(view.query()))) == view


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"metric": "perplexty"}, "metric: expected .*perplexity.*got 'perplexty'"),
        ({"smooth": "1"}, "smooth: expected a number from 0 to below 1, got '1'"),
        ({"smooth": "nan"}, "smooth"),
        ({"smooth": "<b>"}, "smooth"),
    ],
)
def test_a_view_that_is_none_is_refused(query: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        View.of_query(query)


@given(CURVES, st.floats(0, 0.99))
def test_smoothing_stays_within_what_it_smooths_and_leaves_what_is_level(
    curve: list[tuple[int, float]], w: float
) -> None:
    ys = [y for _, y in smoothed(curve, w)]
    assert min(y for _, y in curve) - 1e-9 <= min(ys) <= max(ys) <= max(y for _, y in curve) + 1e-9
    level = [(x, 2.5) for x, _ in curve]
    assert [y for _, y in smoothed(level, w)] == pytest.approx([2.5] * len(level))


def test_smoothing_by_hand() -> None:
    """w = 1/2: s = 1/2, 1 3/4 of (1, 3); over 1/2, 3/4."""
    assert smoothed([(1, 1.0), (2, 3.0)], 0.5) == [(1, pytest.approx(1.0)), (2, pytest.approx(1.75 / 0.75))]


@given(CURVES, st.integers(1, 20))
def test_thinning_keeps_the_end_and_what_equal_stretches_sum_to(curve: list[tuple[int, float]], most: int) -> None:
    thin = thinned(curve, most)
    assert len(thin) == min(len(curve), most)
    assert thin[-1][0] == curve[-1][0]
    if len(curve) % most == 0:
        assert sum(y for _, y in thin) / len(thin) == pytest.approx(sum(y for _, y in curve) / len(curve), abs=1e-9)


def test_curves_are_averaged_where_all_have_been_and_are_straight_between_points() -> None:
    points = average_curve([[(0, 0.0), (10, 1.0), (20, 2.0)], [(0, 4.0), (16, 0.0)]])
    assert [(p.x, p.y, p.n) for p in points] == [(0, pytest.approx(2.0), 2), (10, pytest.approx(1.25), 2)]


def test_an_evaluation_is_told_with_the_settings_of_its_run(tmp_path: Path) -> None:
    runs = repetitions(tmp_path)
    store = RunStore(tmp_path)
    each = store.create("eval", "again", config={"run": [run.id for run in runs], "stride": 8}, line="")
    for run in runs:
        each.measure(result("accuracy", 0.5, 64, axes={"run": run.id, "task": "copy"}))
    each.finish("done")
    assert [run.id for run in with_evaluations(runs[:1], store.runs())] == [runs[0].id, each.id]
    subjects = subjects_of([each])
    assert [(one.whose, one.settings["position"], one.settings["eval.stride"]) for one in subjects] == [
        (run.id, run.record.config["position"]["name"], 8) for run in runs
    ]
    assert [len(group.members) for group in grouped(subjects)] == [3, 3]


def test_a_run_that_an_evaluation_names_is_looked_for_among_its_neighbours_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "elsewhere", stem="secret")
    each = RunStore(tmp_path / "runs").create("eval", "again", config={"run": ["x"]}, line="")
    there = next((tmp_path / "elsewhere").glob("secret-*")).name
    each.measure(result("accuracy", 0.5, 64, axes={"run": f"../elsewhere/{there}"}))
    (subject,) = subjects_of([each])
    assert "position" not in subject.settings


def test_saved_results_are_grouped_as_their_summary_says(tmp_path: Path) -> None:
    for name, value in (("a-1", 0.5), ("a-2", 0.7), ("b-1", 0.1)):
        (tmp_path / f"{name}.jsonl").write_text(result("accuracy", value, 64).model_dump_json() + "\nnot json\n")
    mean = result("accuracy", 0.6, 64, facts={"of": "a", "runs": ["a-1", "a-2"]})
    (tmp_path / "summary.jsonl").write_text(mean.model_dump_json() + "\n")
    groups = grouped(subjects_in(tmp_path))
    assert [(group.label, len(group.members)) for group in groups] == [("a", 2), ("b-1", 1)]
    assert by_context(groups[0], "accuracy")[0].y == pytest.approx(0.6)
