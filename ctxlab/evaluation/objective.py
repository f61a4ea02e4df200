"""The training objective on held-out text: what a masked or denoising model leaves unsaid."""

from __future__ import annotations

import torch
from pydantic import Field

from ctxlab.data.prepare import TextDataset
from ctxlab.data.progress import Progress, silent
from ctxlab.evaluation.intervals import ratio_interval
from ctxlab.evaluation.perplexity import exp
from ctxlab.model.base import Model
from ctxlab.records.schema import Measurement
from ctxlab.registry import ComponentConfig
from ctxlab.train.answers import answer_labels
from ctxlab.train.objectives.windows import Denoising
from ctxlab.train.precision import Precision


class HeldOutConfig(ComponentConfig):
    """How much held-out text is spoiled and said again."""

    rows: int = Field(512, ge=1, description="rows of the test split, evenly from its documents, at most")
    batch_tokens: int = Field(16_384, ge=1, description="tokens read at once", json_schema_extra={"identity": False})


def evaluate_objective(
    model: Model,
    dataset: TextDataset,
    objective: Denoising,
    config: HeldOutConfig,
    *,
    context: int,
    device: torch.device,
    precision: Precision,
    split: str = "test",
    progress: Progress = silent,
) -> list[Measurement]:
    """nats per token that is to be said, its perplexity, and how often the likeliest is right; 95% intervals over documents.

    The same places are hidden for every model with this tokenizer.
    """
    model.eval()
    rows, names = objective.held_out(dataset, split, context, config.rows)
    found = answer_labels(
        model, rows, pad_id=dataset.tokenizer.pad_id, device=device, precision=precision,
        batch_tokens=config.batch_tokens, advance=progress(f"scoring {objective.config.name}", len(rows)),
    )  # fmt: skip
    sums: dict[str, list[float]] = {}
    for name, count, right, nats in zip(names, found.labels, found.right, found.nats, strict=True):
        document = sums.setdefault(name, [0.0, 0.0, 0.0])
        for at, value in enumerate((count, right, nats)):
            document[at] += float(value)
    counts, rights, nats = ([document[at] for document in sums.values()] for at in range(3))
    common = {
        "context": context, "split": split, "protocol": objective.config.name, "n_targets": int(sum(counts)),
        "n_docs": len(sums), "axes": {"objective": objective.config.name}, "normaliser": "token",
    }  # fmt: skip
    measurements = []
    for name, unit, values in (("nats_per_token", "nats/token", nats), ("accuracy", "1", rights)):
        low, high = ratio_interval(values, counts) or (None, None)
        value = sum(values) / sum(counts)
        measurements.append(Measurement(name=name, value=value, unit=unit, low=low, high=high, **common))
        if name == "nats_per_token":
            bounds = {"low": None if low is None else exp(low), "high": None if high is None else exp(high)}
            measurements.append(Measurement(name="perplexity", value=exp(value), unit="1", **bounds, **common))
    return measurements
