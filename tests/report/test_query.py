"""Filters, keys and order over records made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctxlab.errors import RecordError
from ctxlab.records.index import RunIndex
from ctxlab.records.store import RunStore
from ctxlab.report.query import Row, find_key, matching, ordered, rows
from tests.records.builders import costs, make_run, scores


@pytest.fixture
def table(tmp_path: Path) -> list[Row]:
    """Three trained runs and an evaluation of the first one."""
    for number, (position, context, nats) in enumerate((("rope", 256, 3.0), ("alibi", 512, 3.5), ("nope", 2048, 4.0))):
        run = make_run(
            tmp_path, status="waiting", stem=position, tags=["long"] if context > 256 else [],
            config={"position": {"name": position}, "context": context, "seed": number},
            experiment="extrapolation" if number else None,
        )  # fmt: skip
        run.measure(*scores(context, nats), *scores(4096, 5.0), *costs(context, (number + 1) * 2**30, 0.5))
        run.update(status="done" if number else "failed", started=f"2026-01-0{number + 1}T00:00:00.000+00:00")
    parent = RunStore(tmp_path).resolve("rope")
    child = make_run(tmp_path, stem="eval-rope", status="waiting", parent=parent.id)
    child.update(config={"run": [parent.id]}, command="eval")
    child.measure(*scores(256, 2.5))
    return rows(RunIndex(tmp_path).summaries())


def names(found: list[Row]) -> set[str]:
    return {row.run.record.name for row in found}


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["position=alibi"], {"alibi"}),
        (["position=alibi,rope"], {"alibi", "rope"}),
        (["position!=alibi", "command=train"], {"rope", "nope"}),
        (["context=2k"], {"nope"}),
        (["context>=512"], {"alibi", "nope"}),
        (["seed<1", "command=train"], {"rope"}),
        (["status=done"], {"alibi", "nope"}),
        (["tags=long"], {"alibi", "nope"}),
        (["tags=short"], set()),
        (["d_model=128", "n_layers>3", "command=train"], {"rope", "alibi", "nope"}),
        (["perplexity<34"], {"rope", "alibi", "eval-rope"}),
        (["nats_per_token@4k=5"], {"rope", "alibi", "nope"}),
        (["peak_memory_bytes<=2GiB"], {"rope", "alibi"}),
        (["step_seconds<1min", "context>512"], {"nope"}),
        (["started>2026-01-02"], {"alibi", "nope"}),
        (["experiment=none"], {"rope", "eval-rope"}),
        (["extrapolation"], {"alibi", "nope"}),
        (["eval-"], {"eval-rope"}),
        (["trainer.max_steps=none"], {"rope", "alibi", "nope"}),
        ([], {"rope", "alibi", "nope", "eval-rope"}),
    ],
)
def test_filters(table: list[Row], filters: list[str], expected: set[str]) -> None:
    assert names(matching(table, filters)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("positoin=rope", "^positoin: no run has a setting, field or metric of that name; did you mean 'position'"),
        ("perplexty<3", "did you mean 'perplexity'"),
        ("perplexity@long<3", "^perplexity@long: 'long' is not a number with a unit$"),
        ("perplexity<cheap", "^perplexity<cheap: 'cheap' is not a number with a unit$"),
        ("zzz=1", "^zzz: no run has a setting, field or metric of that name$"),
    ],
)
def test_what_no_run_has_is_refused(table: list[Row], text: str, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        matching(table, [text])


def test_a_short_name_must_be_of_one_setting(tmp_path: Path) -> None:
    make_run(tmp_path, status="waiting", config={"optim": {"name": "adamw", "theta": 1}})
    with pytest.raises(RecordError, match=r"^theta: which of optim.theta, position.theta\?$"):
        find_key("theta", rows(RunIndex(tmp_path).summaries()))


def test_an_evaluation_is_read_at_its_parents_trained_context(table: list[Row]) -> None:
    row = next(row for row in table if row.run.record.name == "eval-rope")
    assert find_key("nats_per_token", table).value(row) == 2.5


def test_order_puts_what_has_no_value_last(table: list[Row]) -> None:
    def by(key: str, *, reverse: bool = False) -> list[str]:
        return [row.run.record.name for row in ordered(table, find_key(key, table), reverse=reverse)]

    assert by("nats_per_token") == ["eval-rope", "rope", "alibi", "nope"]
    assert by("seed") == ["rope", "alibi", "nope", "eval-rope"]
    assert by("seed", reverse=True) == ["nope", "alibi", "rope", "eval-rope"]
    assert by("position") == ["alibi", "nope", "rope", "eval-rope"]
