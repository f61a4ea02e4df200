"""The shapes of the record: what is written today is read tomorrow, and what is not a record is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ctxlab.errors import RecordError
from ctxlab.records.run import Run, write_record
from ctxlab.records.schema import METRICS, SCHEMA, Measurement, read_record
from tests.records.builders import result

GOLDEN = Path(__file__).parent / "golden" / "schema-1"


def plain() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((GOLDEN / "run.json").read_text())
    return loaded


def test_the_schema_has_the_number_of_the_golden_files() -> None:
    """Whoever changes the shapes raises SCHEMA, adds golden files of the new number and keeps reading these."""
    assert SCHEMA == 1


def test_a_record_of_schema_1_reads_and_writes_back_to_the_same_text(tmp_path: Path) -> None:
    text = (GOLDEN / "run.json").read_text()
    record = read_record(text, "run.json")
    assert (record.id, record.status, record.attempt) == ("nano-rope-256-k3f9", "done", 2)
    assert record.sweep is not None
    assert (record.sweep.id, record.sweep.cell) == ("extrapolation-p2zq", 3)
    assert record.plugins == (("/home/ada/spiral.py", "9f" * 32),)
    assert record.provenance.data["corpus"]["name"] == "shakespeare"
    write_record(tmp_path, record)
    assert (tmp_path / "run.json").read_text() == text


def test_rows_of_schema_1_read_back() -> None:
    run = Run(GOLDEN)
    assert [(row["step"], row["split"], row["loss"]) for row in run.metrics()] == [
        (10, "train", 6.5), (20, "train", 5.25), (20, "validation", 5.5),
    ]  # fmt: skip
    first, second = run.measurements()
    assert (first.name, first.value, first.low, first.high, first.context) == ("perplexity", 42.5, 40.0, 45.0, 256)
    assert (second.value, second.status, second.reason) == (None, "undefined", "learned positions end at 256")
    (documents,) = run.documents()
    assert documents.names == ("Hamlet", "King Lear")
    assert sum(documents.nats) / sum(documents.targets) == 3.5


def test_a_measurement_of_schema_1_writes_back_to_the_same_text() -> None:
    lines = (GOLDEN / "measurements.jsonl").read_text().splitlines()
    assert [Measurement.model_validate_json(line).model_dump_json() for line in lines] == lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, r"^run.json: written by a newer ctxlab \(schema 2; this one reads up to 1\)$"),
        ({"schema": "1"}, "newer ctxlab"),
        ({"status": "finished"}, r"^run.json: not a run record \(status: .*'finished' is none of waiting, running, "),
        ({"attempt": "2"}, r"\(attempt: Input should be a valid integer\)$"),
        ({"colour": "red"}, r"\(colour: Extra inputs are not permitted\)$"),
        ({"id": None}, r"\(id: Input should be a valid string\)$"),
    ],
)
def test_other_records_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message) as refused:
        read_record(json.dumps({**plain(), **change}), "run.json")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"id": "x"}', '"schema"'])
def test_what_is_no_record_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(RecordError, match=r"^here: not a run record \(.*\)$") as refused:
        read_record(text, "here")
    assert "\n" not in str(refused.value)


def test_names_of_measurements_are_a_closed_table() -> None:
    with pytest.raises(ValidationError, match="no metric is called 'perplexty'; did you mean 'perplexity'"):
        Measurement(name="perplexty", value=1.0, unit="1")


def test_units_are_those_of_the_table() -> None:
    with pytest.raises(ValidationError, match="peak_memory_bytes is in B, not MiB"):
        Measurement(name="peak_memory_bytes", value=1.0, unit="MiB")
    assert {metric.unit for name, metric in METRICS.items() if name.endswith("_bytes")} == {"B"}
    assert {metric.unit for name, metric in METRICS.items() if name.endswith("_seconds")} == {"s"}


def test_no_value_needs_a_status_and_a_value_needs_none() -> None:
    with pytest.raises(ValidationError, match="without a value is not done"):
        result("perplexity", None)
    with pytest.raises(ValidationError, match="with a value is not undefined"):
        result("perplexity", 3.0, status="undefined")
    with pytest.raises(ValidationError, match="an interval has two ends"):
        result("perplexity", 3.0, low=2.0)
    with pytest.raises(ValidationError, match="'lost' is none of done, undefined"):
        result("perplexity", None, status="lost")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_a_failure_with_the_reason(value: float) -> None:
    one = result("nats_per_token", value, low=value, high=value)
    assert (one.value, one.low, one.high, one.status, one.reason) == (None, None, None, "failed", f"it is {value}")


def test_an_interval_without_end_is_no_interval() -> None:
    one = result("perplexity", 3.0, low=2.0, high=float("inf"))
    assert (one.value, one.low, one.high) == (3.0, None, None)
