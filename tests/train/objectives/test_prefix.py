"""Prefix language modelling: where the prefix ends, what is said behind it, and the lines that have none."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ctxlab.config import rules
from ctxlab.config.overrides import split
from ctxlab.config.prepare import prepare
from ctxlab.data.prepare import TextDataset
from ctxlab.data.stream import Stage, TrainStream
from ctxlab.data.tasks.base import generator
from ctxlab.data.tokenizers.byte import Byte
from ctxlab.data.windows import IGNORED
from ctxlab.errors import IncompatibleError
from ctxlab.model.base import Parts, build_model
from ctxlab.train.initial import Initial
from ctxlab.train.objectives.prefix import Prefix
from tests.evaluation.builders import split_of
from tests.train.builders import dataset, settings, train

BYTES = Byte(Byte.Config())


def test_every_length_of_a_prefix_is_as_likely_and_what_is_behind_it_is_said() -> None:
    objective, n, draws = Prefix(Prefix.Config()), 8, 8000
    tokens = np.arange(n + 1)
    found: Counter[int] = Counter()
    for seed in range(draws):
        row = objective.row(tokens, generator("p", seed), BYTES)
        assert row.tokens.tolist() == list(range(n))
        scored = np.flatnonzero(row.targets != IGNORED)
        assert scored.tolist() == list(range(scored[0], n))  # all from the first on
        assert row.targets[scored].tolist() == (scored + 1).tolist()  # what follows
        found[int(scored[0]) + 1] += 1
    assert sorted(found) == list(range(1, n + 1))
    expected = draws / n
    assert (
        sum((count - expected) ** 2 / expected for count in found.values()) < 24.3
    )  # chi squared, 7 degrees, p = 0.001


def test_prefixes_are_drawn_by_seed_and_epoch() -> None:
    documents = [np.random.default_rng(seed).integers(4, 260, 400).tolist() for seed in range(6)]
    data = TextDataset({name: split_of(documents, name) for name in ("train", "validation", "test")}, BYTES, {})
    objective = Prefix(Prefix.Config())
    rows, again, other = (objective.rows(data, 64, seed=seed, packed=False) for seed in (1, 1, 2))
    lengths = [[int((made.row(at, epoch).targets == IGNORED).sum()) for at in range(made.n)]
               for made, epoch in ((rows, 0), (again, 0), (other, 0), (rows, 1))]  # fmt: skip
    assert lengths[0] == lengths[1]
    assert lengths[0] != lengths[2]
    assert lengths[0] != lengths[3]
    assert all(len(rows.row(at, 0).tokens) == 64 for at in range(rows.n))


def test_a_step_is_that_of_every_row_alone(tmp_path: Path) -> None:
    """The loss of the first step against each row's two parts, read as an encoder reads and as a decoder goes on.

    The weights are large: as they are drawn for training, one more token that is seen changes the seventh digit.
    """
    data, objective = dataset(tmp_path, longest=600), Prefix(Prefix.Config())
    config = replace(settings(max_steps=1, micro_batch=2), objective=objective.config)
    stage = Stage(config.context, 8, 8, 1)
    stream = TrainStream(
        lambda context: objective.rows(data, context, seed=1, packed=False), seed=1, stages=(stage,), pad_id=0
    )  # fmt: skip
    torch.manual_seed(1)
    parts = Parts(config.model, config.position, config.attention)
    model = build_model(parts, vocab_size=data.tokenizer.vocab_size, context=config.context, prefix=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.25)
    found = train(tmp_path, data, config, initial=Initial(model.state_dict())).rows.of("train")[0]
    batch, total, scored = stream[0], 0.0, 0
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
        length = int((targets != IGNORED).nonzero()[0]) + 1
        cache = model.new_cache()
        with torch.no_grad():
            read = model.logits(model.hidden(tokens[None, :length], cache=cache, prefix="all"))
            rest = [model(tokens[None, at : at + 1], cache=cache) for at in range(length, len(tokens))]
        logits = torch.cat([read, *rest], dim=1)[0]
        total += float(F.cross_entropy(logits.double(), targets, reduction="sum", ignore_index=IGNORED))
        scored += int((targets != IGNORED).sum())
    assert 8 < scored < 8 * config.context
    assert found["nats_per_token"] == pytest.approx(total / scored, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["position=alibi"], "position.name: alibi tells no order without a causal mask, and objective=prefix has none within "
         "the prefix; use learned, p_rope, partial_rope, pope, rope, sinusoidal or t5"),
        (["position=nope"], "position.name: nope tells no order without a causal mask"),
        (["attention=recurrent"], "attention.name: recurrent attention carries a memory from row to row, and a row of "
         "objective=prefix begins with its prefix; use full or sliding_window"),
        (["model.architecture=encoder"], "objective: prefix trains model.architecture=decoder, not encoder"),
        (["model=lstm"], "objective: prefix trains model.architecture=decoder, not lstm"),
        (["data.packed=true"], "data.packed: prefix makes its rows of one document each; use false"),
    ],
)  # fmt: skip
def test_what_has_no_prefix_is_refused(words: list[str], said: str) -> None:
    (cell,) = prepare(split("train", ["model=nano", "objective=prefix", *words])).cells
    assert cell.skipped.startswith(said)
    with pytest.raises(IncompatibleError):
        rules.check(cell.typed)


def test_it_is_scored_by_its_objective_and_by_perplexity() -> None:
    for words, parts in (([], ("objective",)), (["eval=[objective,perplexity]"], ("perplexity", "objective"))):
        (cell,) = prepare(split("train", ["model=nano", "objective=prefix", *words])).cells
        assert not cell.skipped
        assert tuple(part for part, asked in cell.typed.eval if asked != "none") == parts
