"""Windows longer than a batch: read in parts over a growing cache, they score as one forward does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctxlab.data.windows import EvalSegments
from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.transformer import Transformer
from ctxlab.train.scoring import score_windows
from tests.evaluation.builders import random_documents, split_of
from tests.model.builders import VOCAB, build

LENGTH = 96
HYBRID = ATTENTIONS.get("sliding_window").Config(name="sliding_window", size=16, global_every=2)  # type: ignore[call-arg]


def scored(model: Transformer, batch_tokens: int, stride: int | None = None, length: int = LENGTH) -> np.ndarray:
    segments = EvalSegments(split_of(random_documents([2 * LENGTH + 1, LENGTH + 9], VOCAB)), LENGTH)
    return score_windows(
        model, segments, length, stride=stride, batch_tokens=batch_tokens, device=torch.device("cpu"), precision="fp32"
    )


@pytest.mark.parametrize("chunk", [1, 7, 32, 95])
@pytest.mark.parametrize(
    ("position", "attention"),
    [
        ("rope", "full"), ("alibi", "full"), ("t5", "full"), ("kerple", "full"), ("fire", "full"), ("fox", "full"),
        ("sinusoidal", "full"), ("rope_nope", "full"), ("rope_nope", HYBRID), ("nope", "linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "hybrid",
)  # fmt: skip
def test_a_window_in_parts_scores_as_in_one_forward(position: str, attention: Any, chunk: int) -> None:
    model = build(position, attention=attention, context=LENGTH)
    whole, parts = scored(model, 4096) / LENGTH, scored(model, chunk) / LENGTH
    assert whole.shape == (3,)
    assert parts == pytest.approx(whole, abs=1e-5)
    blind = scored(model, 4096, length=chunk) / LENGTH
    assert np.abs(blind - whole).max() > 1e-3, "nothing but the last part matters: a weak test"


@pytest.mark.parametrize("chunk", [1, 10, 31])
def test_windows_that_overlap_are_read_in_parts_too(chunk: int) -> None:
    model = build("alibi")
    assert scored(model, chunk, stride=5, length=32) == pytest.approx(
        scored(model, 4096, stride=5, length=32), abs=1e-4
    )


def test_no_more_than_one_part_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("rope")
    asked: list[tuple[int, ...]] = []
    hidden = model.hidden

    def spy(tokens: Tensor, **options: Any) -> Tensor:
        asked.append((*tokens.shape, options["cache"].length))
        return hidden(tokens, **options)

    monkeypatch.setattr(model, "hidden", spy)
    scored(model, 40)
    assert asked == [(1, 40, 0), (1, 40, 40), (1, 16, 80)] * 3
