"""Which of a run's stacks a model of another architecture begins with: where each of its weights was in the run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ctxlab.errors import ConfigError
from ctxlab.model.base import ARCHITECTURES, Model
from ctxlab.model.transformer import Stack

ENCODER = "encoder."  # what reads a source is named below it, beside what writes
_STACK = ("blocks.", "position.", "embedding_norm.", "norm.")  # what a stack is made of, whichever it is
_HEAD = ("head.", "head_layer.")
EMBEDDING = "embedding.weight"


@dataclass
class Arranged:
    """Where weights come from, by their names here."""

    origin: dict[str, str]  # name here -> name in the run
    new: set[str] = field(default_factory=set)  # names here that the run has nothing for
    stacks: dict[str, str] = field(default_factory=dict)  # stack here -> what it was in the run, where that is another


def arrange(names: Iterable[str], before: str, model: Model) -> Arranged:
    """Of the weights of a run of the architecture `before`, those that a model begins with.

    One stack becomes both halves of an encoder-decoder, whose cross-attention is new (Rothe et al. 2020, arXiv:1907.12461,
    section 3: BERT2BERT). Of an encoder-decoder the half that looks the same way goes on alone: the decoder without its
    cross-attention, the encoder without the head, which has read the other half. What has embedded both sides becomes two
    matrices where there are two. Raises ConfigError where the architectures are not made of the same blocks.
    """
    own, now = model.state_dict(), model.config.architecture
    old, new = ARCHITECTURES.get(before), type(model)
    found = Arranged({name: name for name in names})
    if before != now:
        if not (issubclass(old, Stack) and issubclass(new, Stack)):
            raise ConfigError(
                f"init: {now} has no weights that a run of {before} could have trained; start from another run, or with "
                f"model.architecture={before}"
            )
        found.stacks = {now: before}
        if new.reads_source and not old.reads_source:
            found.stacks = {"encoder": before, "decoder": before}
            found.origin |= {ENCODER + name: name for name in found.origin if name.startswith(_STACK)}
            found.new = {name for name in own if _crosses(name)}
        elif old.reads_source and not new.reads_source:
            half = "decoder" if new.causal else "encoder"
            found.stacks = {now: half}
            found.origin = _decoder(found.origin) if new.causal else _encoder(found.origin)
            found.new = set() if new.causal else {name for name in own if name.startswith(_HEAD)}
    if new.reads_source and ENCODER + EMBEDDING in own and EMBEDDING in found.origin:
        found.origin.setdefault(ENCODER + EMBEDDING, EMBEDDING)
    return found


def _decoder(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names if not name.startswith(ENCODER) and not _crosses(name)}


def _encoder(names: Iterable[str]) -> dict[str, str]:
    names = set(names)
    found = {name.removeprefix(ENCODER): name for name in names if name.startswith(ENCODER)}
    found |= {name: name for name in names if name.startswith("task_head.")}
    return {EMBEDDING: EMBEDDING} | found  # one of its own, or the one that both halves share


def _crosses(name: str) -> bool:
    return ".cross_attention." in name or ".cross_attention_norm." in name
