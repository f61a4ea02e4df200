"""Points to measure, by the sizes of conf/model/, and what closed forms say of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ctxlab.model import count
from ctxlab.model.base import ARCHITECTURES, read_parts
from ctxlab.profiling.measure import Point
from ctxlab.train.optim.base import OPTIMIZERS

MIB = 2**20
VOCAB = 2048
_CONF = Path(__file__).parents[2] / "conf" / "model"


def point(model: str, context: int, position: str = "rope", optim: str = "adamw", **settings: Any) -> Point:
    """A training step of a model of conf/model/ on the CPU, AdamW and fp32 unless told otherwise."""
    sizes = yaml.safe_load((_CONF / f"{model}.yaml").read_text())
    architecture = ARCHITECTURES.get(sizes["architecture"])
    given = {
        "model": architecture.Config(**sizes).model_dump(mode="json"),
        "position": {"name": position} if architecture.parts else "none",
        "attention": {"name": "full"} if architecture.parts else "none",
        "optim": OPTIMIZERS.get(optim).Config(name=optim).model_dump(mode="json"),
        "vocab_size": VOCAB,
        "context": context,
        "precision": "fp32",
        "device": "cpu",
    }
    return Point(**given | settings)


@dataclass(frozen=True)
class Closed:
    """What a step of a point holds by closed form, in bytes; AdamW has two numbers a weight."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def all(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def closed(point: Point) -> Closed:
    parts = read_parts(point.__dict__)
    sizes = {"vocab_size": point.vocab_size, "context": point.context}
    weights = 4 * count.parameters(*parts, **sizes).total
    activations = count.activation_bytes(*parts, recompute=point.recompute, loss_chunk=point.chunk, **sizes)
    return Closed(weights, weights, 2 * weights, activations)
