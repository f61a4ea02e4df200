"""Overlapping windows: which targets each scores and what it sees, against whole forwards and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.evaluation.perplexity import PerplexityConfig, evaluate_perplexity
from ctxlab.model.transformer import Transformer
from ctxlab.train.scoring import Window, windows
from tests.evaluation.builders import dataset_of, random_documents, split_of
from tests.model.builders import VOCAB, build

CPU = torch.device("cpu")


@given(segment=st.integers(1, 80), length=st.integers(1, 40), stride=st.one_of(st.none(), st.integers(1, 50)))
def test_every_target_is_scored_once_with_as_much_past_as_was_promised(
    segment: int, length: int, stride: int | None
) -> None:
    scored: list[int] = []
    for start, width, new in windows(segment, length, stride):
        assert start >= 0
        assert start + width <= segment
        assert width <= length
        assert 1 <= new <= width
        targets = range(start + width - new, start + width)
        scored += targets
        if stride is not None and stride < length:
            past = [target - start for target in targets]  # inputs before the one that predicts it
            assert start == 0 or min(past) >= length - stride
    assert scored == list(range(segment))


def test_windows_by_hand() -> None:
    assert windows(10, 4) == [Window(0, 4, 4), Window(4, 4, 4), Window(8, 2, 2)]
    assert windows(10, 4, 1) == [Window(0, 4, 4), *(Window(start, 4, 1) for start in range(1, 7))]
    assert windows(10, 4, 3) == [Window(0, 4, 4), Window(3, 4, 3), Window(6, 4, 3)]
    assert windows(9, 4, 3) == [Window(0, 4, 4), Window(3, 4, 3), Window(5, 4, 2)]
    assert windows(3, 4, 2) == [Window(0, 3, 3)]
    assert windows(10, 4, 4) == windows(10, 4)


def by_full_forwards(model: Transformer, documents: list[list[int]], segment: int, length: int, stride: int) -> float:
    """Nats per token in float64: for each target a forward of its own, over the window that a reader would slide there."""
    double = build(model.position.config.name).double()
    double.load_state_dict(model.state_dict())
    total, count = 0.0, 0
    for document in documents:
        for first in range(0, len(document) - segment, segment):
            piece = document[first : first + segment + 1]
            for target in range(1, segment + 1):
                # The first window ends at `length`; every later one ends `stride` further on, the last with the segment.
                end = (
                    length
                    if target <= length
                    else min(segment, length + math.ceil((target - length) / stride) * stride)
                )
                begin = max(0, min(end, segment) - length)
                with torch.no_grad():
                    scores = double(torch.tensor([piece[begin:target]])).log_softmax(-1)[0, -1]
                total -= scores[piece[target]].item()
                count += 1
    return total / count


@pytest.mark.parametrize("position", ["rope", "alibi", "sinusoidal"])
def test_equals_a_forward_for_every_target(position: str) -> None:
    documents = random_documents([33, 50], VOCAB)
    model = build(position)
    config = PerplexityConfig(lengths=(8, 16), strides=(3, 8), segment=16, min_documents=1)
    where: dict[str, Any] = {"trained_context": 16, "device": CPU, "precision": "fp32"}
    measurements, *_ = evaluate_perplexity(model, dataset_of(split_of(documents)), config, **where)
    found = {(m.context, m.axes.get("stride")): m for m in measurements if m.name == "nats_per_token" and m.context}
    assert set(found) == {(8, None), (8, 3), (16, None), (16, 3), (16, 8)}  # 8 in windows of 8 is no overlap
    plain = found[8, None].value
    assert plain is not None
    for (length, stride), m in found.items():
        assert m.n_targets == 32 + 48
        assert m.protocol == ("non-overlapping" if stride is None else "sliding")
        if stride is not None:
            assert length is not None
            expected = by_full_forwards(model, documents, 16, length, stride)
            assert m.value == pytest.approx(expected, rel=2e-6)
            if length == 8:
                assert m.facts["difference"] == pytest.approx(expected - plain, abs=1e-5)


def test_one_length_alone_has_room_to_move_in() -> None:
    """A segment as long as the window would leave nothing to overlap with: 8 windows, as far as the documents go."""
    model = build("rope")
    where: dict[str, Any] = {"trained_context": 16, "device": CPU, "precision": "fp32"}
    for sizes, segment in (([200, 300], 64), ([41, 300], 40), ([8 + 1, 300], 8)):
        dataset = dataset_of(split_of(random_documents(sizes, VOCAB)))
        config = PerplexityConfig(lengths=(8,), strides=(2,), min_documents=2)
        found = [m for m in evaluate_perplexity(model, dataset, config, **where).measurements if m.context]
        assert {m.axes["segment"] for m in found} == {segment}
        (difference,) = (m.facts["difference"] for m in found if m.name == "nats_per_token" and "stride" in m.axes)
        assert (difference == 0) == (segment == 8)
    plain = PerplexityConfig(lengths=(8,), min_documents=2)
    dataset = dataset_of(split_of(random_documents([200, 300], VOCAB)))
    assert {
        m.axes["segment"] for m in evaluate_perplexity(model, dataset, plain, **where).measurements if m.context
    } == {8}
