"""The shape of a run record: statuses, the closed table of metric names, and the typed rows of its files.

A change of these shapes raises SCHEMA, and `read_record` learns to read the number before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ctxlab.errors import RecordError
from ctxlab.registry import nearest

SCHEMA = 1

STATUSES = (
    "waiting", "running", "done", "failed", "out_of_memory", "timed_out", "killed", "interrupted", "skipped",
)  # fmt: skip
ENDED = tuple(s for s in STATUSES if s not in ("waiting", "running"))

# `done` rows have a value; the others say why there is none.
MEASUREMENT_STATUSES = (
    "done", "undefined", "does_not_fit", "no_document", "out_of_memory", "timed_out", "failed",
)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A name that rows may use: its SI unit, whether less of it is better, and what it is."""

    unit: str
    lower_is_better: bool
    text: str


METRICS: dict[str, Metric] = {
    "loss": Metric("nats/token", True, "the training objective, smoothing and all"),
    "nats_per_token": Metric("nats/token", True, "negative log-likelihood per target token, never smoothed"),
    "perplexity": Metric("1", True, "exp(nats per token)"),
    "bits_per_byte": Metric("bits/byte", True, "negative log2-likelihood per UTF-8 byte of the text"),
    "nats_per_word": Metric("nats/word", True, "negative log-likelihood per word, a run of anything but white space"),
    "word_perplexity": Metric("1", True, "exp(nats per word)"),
    "in_context_score": Metric("nats/token", True, "nats per token late in a window less those early in it"),
    "extrapolation_ratio": Metric("1", False, "the most trained contexts whose last tokens lose no more than epsilon"),
    "effective_context": Metric("tokens", False, "shortest length within 1% of the perplexity at the longest"),
    "relative_effective_context": Metric("tokens", False, "length from which on a run gains less than 1% in its group"),
    "accuracy": Metric("1", False, "share of right answers"),
    "macro_f1": Metric("1", False, "mean over labels of the F1 of each against all others"),
    "exact_match": Metric("1", False, "share of answers that are a right one, word for word, by SQuAD's rules"),
    "f1": Metric("1", False, "overlap in words of answers with the right ones, by SQuAD's rules"),
    "examples": Metric("1", False, "how many there are of what the axes say"),
    "score": Metric("1", False, "a harness's own metric of one of its tasks, whose facts say which way is better"),
    "bleu": Metric("1", False, "corpus BLEU"),
    "chrf": Metric("1", False, "corpus chrF"),
    "peak_memory_bytes": Metric("B", True, "peak memory over the idle process"),
    "part_bytes": Metric("B", True, "what one part of a step's memory takes when most is taken"),
    "longest_context": Metric("tokens", False, "longest context whose step is predicted to fit a memory"),
    "largest_batch": Metric("rows", False, "rows of a context that are predicted to fit a memory at once"),
    "cache_bytes": Metric("B", True, "size of the key-value cache"),
    "step_seconds": Metric("s", True, "time of one training step"),
    "prefill_seconds": Metric("s", True, "time to read a prompt"),
    "decode_seconds_per_token": Metric("s/token", True, "time of one generated token"),
    "tokens_per_second": Metric("tokens/s", False, "training or generation speed"),
    "flops_per_second": Metric("FLOP/s", False, "arithmetic rate"),
    "flops_utilization": Metric("1", False, "arithmetic rate over the best that this machine's matmul reached"),
    "scaling_exponent": Metric("1", True, "p in value = factor context^p, fitted over the measured contexts"),
    "learning_rate": Metric("1", True, "of the first parameter group"),
    "gradient_norm": Metric("1", True, "L2 norm of the whole gradient before clipping"),
}

# Axes by which a text is scored in another way than in windows that follow one another: beside the context they say how.
WAY_AXES = ("stride", "sinks", "bos")
# Axes of which one number at one context is a part.
_PART_AXES = ("depth", "part")

# What a row of metrics.jsonl has besides metrics.
ROW_KEYS = ("split", "step", "tokens", "seconds", "attempt")
SPLITS = ("train", "validation", "test")


def known_metric(name: str) -> str:
    """The name, if the table has it. Raises ValueError naming the nearest."""
    if name not in METRICS:
        raise ValueError(f"no metric is called '{name}'{nearest(name, METRICS)}")
    return name


def check_row(row: dict[str, Any]) -> None:
    """Raises ValueError for a row of metrics with a name, or a split, that there is not."""
    for name in row:
        if name not in METRICS and name not in ROW_KEYS:
            known_metric(name)
    if row.get("split") not in SPLITS:
        raise ValueError(f"split: '{row.get('split')}' is none of {', '.join(SPLITS)}")


def is_headline(axes: Mapping[str, Any]) -> bool:
    """Whether a number with these axes is what a run reached at its context: of windows that follow one another, whole."""
    return not axes.keys() & {*WAY_AXES, *_PART_AXES}


def _one_of(choices: tuple[str, ...]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"'{value}' is none of {', '.join(choices)}")
        return value

    return AfterValidator(check)


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measurement(_Row):
    """One result. `value` is None where there is none, with the `status` and `reason` why.

    A value that is not finite is no value: it is recorded as `failed`, with what it was as the reason.
    """

    name: Annotated[str, AfterValidator(known_metric)]
    value: float | None
    unit: str
    low: float | None = Field(default=None, description="95% interval")
    high: float | None = None
    context: int | None = None
    split: str | None = None
    protocol: str = ""
    normaliser: str | None = None
    n_targets: int | None = None
    n_docs: int | None = None
    status: Annotated[str, _one_of(MEASUREMENT_STATUSES)] = "done"
    reason: str = ""
    axes: dict[str, Any] = Field(default_factory=dict, description="of its evaluation: part of what is measured")
    facts: dict[str, Any] = Field(default_factory=dict, description="beside the value: no part of what is measured")

    @model_validator(mode="before")
    @classmethod
    def _finite(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        value = given.get("value")
        if isinstance(value, float) and not math.isfinite(value):
            given = {**given, "value": None, "low": None, "high": None, "status": "failed", "reason": f"it is {value}"}
        for end in ("low", "high"):
            if isinstance(given.get(end), float) and not math.isfinite(given[end]):
                given = {**given, "low": None, "high": None}
        return given

    @model_validator(mode="after")
    def _whole(self) -> Measurement:
        unit = METRICS[self.name].unit
        if self.unit != unit:
            raise ValueError(f"unit: {self.name} is in {unit}, not {self.unit}")
        if (self.value is None) == (self.status == "done"):
            having = "without" if self.value is None else "with"
            raise ValueError(f"status: a measurement {having} a value is not {self.status}")
        if (self.low is None) != (self.high is None):
            raise ValueError("low: an interval has two ends")
        return self


class DocumentSums(_Row):
    """What the numbers of one context are sums of, document by document: two runs are compared in pairs of these."""

    context: int
    split: str
    axes: dict[str, Any] = Field(default_factory=dict)
    names: tuple[str, ...]
    nats: tuple[float, ...]
    targets: tuple[int, ...] = Field(description="target tokens scored")
    n_bytes: tuple[int, ...] = Field(description="UTF-8 bytes of the targets' text")


class TaskItem(_Row):
    """One example of a task and what was answered: two runs are compared in pairs of these."""

    task: str
    context: int
    depth: float | None = Field(default=None, description="where its answer was asked to stand; None: anywhere")
    item: int
    score: float = Field(description="0 to 1")
    wanted: tuple[str, ...] = ()
    answer: str | None = Field(default=None, description="what was generated, where something was")
    place: float | None = Field(default=None, description="where its answer stands, 0 to 1, where it has one place")
    axes: dict[str, Any] = Field(default_factory=dict)


class SweepCell(_Row):
    """Which cell of which sweep a run is."""

    id: str
    cell: int


class Provenance(_Row):
    """Where a run's numbers come from: code, libraries, data, machine."""

    seed: int | None = None
    ctxlab: str = ""
    commit: str | None = None
    python: str = ""
    libraries: dict[str, str] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    hardware: dict[str, Any] = Field(default_factory=dict)
    threads: int | None = None
    precision: str | None = None
    device: str | None = None
    memory_source: str | None = None
    resolved: dict[str, Any] = Field(default_factory=dict, description="what `auto` settings became")
    plugins: tuple[tuple[str, str], ...] = Field(default=(), description="(path, sha256) of each --plugin")


class RunRecord(_Row):
    """run.json: what a run is, how it went, and how to do it again."""

    schema_number: int = Field(default=SCHEMA, alias="schema")
    id: str
    name: str
    command: str
    line: str
    status: Annotated[str, _one_of(STATUSES)]
    reason: str = ""
    started: str | None = None
    finished: str | None = None
    wall_seconds: float | None = None
    attempt: int = 1
    parent: str | None = None
    sweep: SweepCell | None = None
    experiment: str | None = None
    tags: tuple[str, ...] = ()
    note: str = ""
    config: dict[str, Any] = Field(default_factory=dict)
    parameters: dict[str, int] = Field(default_factory=dict, description="all, without_embeddings")
    provenance: Provenance = Provenance()
    artifacts: dict[str, str] = Field(default_factory=dict, description="what -> path below the run's folder")
    process: dict[str, Any] = Field(default_factory=dict, description="host, pid, its start, begun: while it runs")

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @property
    def plugins(self) -> tuple[tuple[str, str], ...]:
        return self.provenance.plugins


def read_record(text: str, where: str) -> RunRecord:
    """A run.json of this schema. Raises RecordError, one line, for a newer one and for anything else."""
    try:
        plain = json.loads(text)
        number = plain["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{where}: not a run record ({type(error).__name__}: {error})") from error
    if not isinstance(number, int) or number > SCHEMA:
        raise RecordError(f"{where}: written by a newer ctxlab (schema {number}; this one reads up to {SCHEMA})")
    try:
        return RunRecord.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise RecordError(f"{where}: not a run record ({field}: {first['msg']})") from error
