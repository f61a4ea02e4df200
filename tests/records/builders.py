"""Runs and results made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ctxlab.records.run import Run
from ctxlab.records.schema import METRICS, Measurement
from ctxlab.records.store import RunStore

CONFIG: dict[str, Any] = {
    "seed": 1,
    "context": 256,
    "name": "auto",
    "model": {"name": "nano", "d_model": 128, "n_layers": 4},
    "position": {"name": "rope", "theta": 10000.0},
    "trainer": {"max_tokens": 1_000_000, "max_steps": "none"},
    "paths": {"runs": "runs", "cache": "auto"},
    "logger": {"name": "wandb", "mode": "auto"},
}


def make_run(root: Path, **changes: Any) -> Run:
    """A run of `ctxlab train` in `root`, running unless `status` says otherwise."""
    config = {**CONFIG, **changes.pop("config", {})}
    stem = changes.pop("stem", f"{config['model']['name']}-{config['position']['name']}-{config['context']}")
    return RunStore(root).create("train", stem, config=config, line="ctxlab train", **changes)


def result(name: str, value: float | None, context: int | None = 256, **fields: Any) -> Measurement:
    return Measurement(name=name, value=value, unit=METRICS[name].unit, context=context, **fields)


def scores(context: int, nats: float, *, bytes_per_token: float = 3.0, half: float = 0.05) -> list[Measurement]:
    """The three numbers of one context, with intervals, as the evaluation writes them."""
    common: dict[str, Any] = {
        "split": "test", "protocol": "non-overlapping", "n_targets": 190_000, "n_docs": 9, "axes": {"segment": 2048},
    }  # fmt: skip
    bits = nats / math.log(2) / bytes_per_token
    return [
        result("nats_per_token", nats, context, low=nats - half, high=nats + half, normaliser="token", **common),
        result(
            "perplexity", math.exp(nats), context, low=math.exp(nats - half), high=math.exp(nats + half),
            normaliser="token", **common,
        ),
        result("bits_per_byte", bits, context, low=bits - 0.02, high=bits + 0.02, normaliser="byte", **common),
    ]  # fmt: skip


def costs(context: int, memory: float, seconds: float) -> list[Measurement]:
    """Memory and time of a step, as the profile writes them."""
    protocol = "one training step, batch 1"
    return [
        result("peak_memory_bytes", memory, context, protocol=protocol, facts={"source": "VmHWM"}),
        result("step_seconds", seconds, context, protocol=protocol),
        result("tokens_per_second", context / seconds, context, protocol=protocol),
    ]


def missing(context: int, status: str, reason: str) -> list[Measurement]:
    names = ("nats_per_token", "perplexity", "bits_per_byte")
    return [
        result(name, None, context, status=status, reason=reason, split="test", protocol="non-overlapping")
        for name in names
    ]
