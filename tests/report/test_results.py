"""What tells runs apart, and how loss rises with length: by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ctxlab.records.schema import DocumentSums
from ctxlab.report.results import (
    by_context,
    cell,
    differing_keys,
    flatten,
    labels,
    paired,
    rise,
    telling_keys,
    training_speed,
    value_at,
)
from tests.records.builders import make_run, missing, result, scores


def test_a_part_is_called_by_its_name() -> None:
    config = {"context": 256, "name": "x", "position": {"name": "rope", "theta": 1e4}, "eval": {"a": {"b": [1, 2]}}}
    assert flatten(config) == {
        "context": 256, "name": "x", "position": "rope", "position.theta": 1e4, "eval.a.b": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "keys"),
    [
        ({"seed": 1}, {"seed": 2}, ["seed"]),
        ({"position": {"name": "rope", "theta": 1}}, {"position": {"name": "alibi"}}, ["position"]),
        ({"position": {"name": "rope", "theta": 1}}, {"position": {"name": "rope", "theta": 2}}, ["position.theta"]),
        ({"note": "a", "paths": {"runs": "x"}, "name": "a"}, {"note": "b", "paths": {"runs": "y"}, "name": "b"}, []),
        ({"a": 1}, {"a": True}, ["a"]),
        ({"a": [1]}, {"a": [1]}, []),
        ({"a": 1}, {}, ["a"]),
    ],
)
def test_what_differs(first: dict[str, object], second: dict[str, object], keys: list[str]) -> None:
    assert differing_keys([first, second]) == keys


def test_values_as_text() -> None:
    config = {"position": {"name": "rope"}, "trainer": {"lengths": [1, 2], "compile": False}}
    assert [value_at(config, key) for key in ("position", "trainer.lengths", "trainer.compile", "gone")] == [
        "rope", "[1, 2]", "false", "-",
    ]  # fmt: skip


def test_parts_that_a_model_is_without_tell_nothing_that_its_name_does_not() -> None:
    def config(model: str, position: str, seed: int = 1) -> dict[str, object]:
        scheme: object = position if position == "none" else {"name": position}
        return {"model": {"name": model}, "position": scheme, "seed": seed}

    tiny, lstm = config("tiny", "rope"), config("lstm", "none")
    assert differing_keys([tiny, lstm]) == ["model", "position"]
    assert telling_keys([tiny, lstm]) == ["model"]
    assert telling_keys([tiny, lstm, config("tiny", "alibi")]) == ["model", "position"]
    assert telling_keys([tiny, config("tiny", "rope", seed=2)]) == ["seed"]
    assert telling_keys([config("tiny", "rope"), config("tiny", "none")]) == ["position"]


def test_the_speed_of_a_training_leaves_the_first_row_of_each_attempt_out(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert training_speed(run) is None
    rows = [(1, 1, 5.0), (2, 1, 100.0), (3, 1, 300.0), (4, 2, 7.0), (5, 2, 200.0)]
    for step, attempt, speed in rows:
        run.log({"split": "train", "step": step, "attempt": attempt, "tokens_per_second": speed})
        run.log({"split": "validation", "step": step, "attempt": attempt, "perplexity": 9.0})
    assert training_speed(run) == 200.0


def test_runs_are_called_by_what_differs_else_by_id(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, status="waiting", config={"position": {"name": name}, "seed": seed})
        for name, seed in (("rope", 1), ("alibi", 2), ("alibi", 2))
    ]
    assert labels(runs) == ["1 rope", runs[1].id, runs[2].id]
    assert labels(runs[:1]) == [runs[0].id]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("nats_per_token", 3.74049, "3.740"), ("perplexity", 42.5049, "42.50"), ("perplexity", 123456.0, "1.23e+05"),
        ("peak_memory_bytes", 1536.0, "1.5 KiB"), ("step_seconds", 0.0123, "12.3 ms"),
        ("tokens_per_second", 12345.0, "12.3k"), ("learning_rate", 0.00012345, "0.000123"),
    ],
)  # fmt: skip
def test_numbers_have_their_units(name: str, value: float, text: str) -> None:
    assert cell(result(name, value)) == text


def test_a_cell_without_a_number_says_why() -> None:
    assert cell(None) == "-"
    assert [cell(missing(256, status, "x")[0]) for status in ("undefined", "no_document", "out_of_memory")] == [
        "undefined", "no text", "out of memory",
    ]  # fmt: skip
    assert cell(result("nats_per_token", 3.0, low=2.9, high=3.1), interval=True) == "3.000 ±0.100"


class TestRise:
    def test_from_the_trained_context_to_four_times_it(self, tmp_path: Path) -> None:
        run = make_run(tmp_path, status="waiting")
        assert rise(run, {}) == "-"
        near, far = scores(256, 3.748), scores(1024, 3.740)
        assert rise(run, by_context(near + far)) == "-0.008"
        assert rise(run, by_context([*near, *missing(1024, "undefined", "x")])) == "undefined"
        assert rise(run, by_context([*missing(256, "failed", "x"), *far])) == "failed"

    def test_its_interval_is_paired_over_documents(self, tmp_path: Path) -> None:
        """Rises of 0.1, 0.2 and 0.3 nats a token in equal documents: mean 0.2, sd 0.1, t(0.975, 2) = 4.3027."""

        class Sums:
            names, targets, n_bytes = ["a", "b", "c"], [100, 100, 100], [300, 300, 300]

            def __init__(self, nats: list[float]) -> None:
                self.nats = nats

        run = make_run(tmp_path, status="waiting")
        run.measure(*scores(256, 3.0), *scores(1024, 3.2))
        run.write_documents({256: Sums([200.0, 300.0, 400.0]), 1024: Sums([210.0, 320.0, 430.0])})
        half = 4.3027 * 0.1 / math.sqrt(3)
        assert rise(run, by_context(run.measurements())) == f"+0.200 ±{half:.3f}"

    def test_other_documents_are_not_paired(self) -> None:
        first = DocumentSums(context=1, split="test", names=("a", "b"), nats=(1.0, 2.0), targets=(1, 1), n_bytes=(1, 1))
        assert paired(first, first) == (0.0, 0.0)
        assert paired(first, None) is None
        assert paired(first, first.model_copy(update={"targets": (1, 2)})) is None
