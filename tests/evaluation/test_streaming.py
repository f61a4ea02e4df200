"""A moving cache: equal to sliding windows where nothing that is dropped can be felt, and different where it can."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ctxlab.data.windows import EvalSegments
from ctxlab.evaluation.perplexity import PerplexityConfig, evaluate_perplexity
from ctxlab.model.attention.base import ATTENTIONS, Attention
from ctxlab.model.transformer import Transformer
from ctxlab.records.schema import Measurement
from ctxlab.train.scoring import score_streaming, score_windows
from tests.evaluation.builders import dataset_of, random_documents, split_of
from tests.evaluation.by_hand import streamed_nats
from tests.model.builders import VOCAB, build

SEGMENT = 40
DOCUMENTS = random_documents([2 * SEGMENT + 1, SEGMENT + 3], VOCAB)
COMMON: dict[str, Any] = {"device": torch.device("cpu"), "precision": "fp32", "batch_tokens": 64}


def window(size: int) -> Attention.Config:
    return ATTENTIONS.get("sliding_window").Config(name="sliding_window", size=size)  # type: ignore[call-arg]


def in_windows(model: Transformer, length: int, stride: int | None = None) -> np.ndarray:
    return score_windows(model, EvalSegments(split_of(DOCUMENTS), SEGMENT), length, stride=stride, **COMMON)


def streamed(model: Transformer, size: int, sinks: int = 0) -> np.ndarray:
    segments = EvalSegments(split_of(DOCUMENTS), SEGMENT)
    return score_streaming(model, segments, sinks=sinks, window=size - sinks, **COMMON)


RELATIVE = ("rope", "alibi", "t5", "kerple", "nope", "rope_nope")


@pytest.mark.parametrize("position", RELATIVE)
def test_where_every_layer_is_windowed_what_it_reaches_is_enough(position: str) -> None:
    """n (W - 1) + 1 = 3 * 4 + 1 = 13 tokens: a moving cache, overlapping windows and one forward over all are the same."""
    model = build(position, attention=window(5), n_layers=3).double()
    whole = in_windows(model, SEGMENT)
    assert in_windows(model, 13, stride=1) == pytest.approx(whole, abs=1e-9)
    assert streamed(model, 13) == pytest.approx(whole, abs=1e-9)
    assert np.abs(in_windows(model, 12, stride=1) - whole).max() > 1e-6, "one token less is felt"


@pytest.mark.parametrize("position", RELATIVE)
def test_a_moving_cache_over_full_attention_is_attention_in_windows_and_no_sliding_window(position: str) -> None:
    """Its keys have seen what has left it, so in every layer it is a window of that size; sliding windows start anew."""
    model = build(position, n_layers=3).double()
    windowed = build(position, attention=window(8), n_layers=3).double()
    windowed.load_state_dict(model.state_dict())
    found = streamed(model, 8)
    assert found == pytest.approx(in_windows(windowed, SEGMENT), abs=1e-9)
    assert np.abs(found - in_windows(model, 8, stride=1)).max() / SEGMENT > 0.01  # nats a token


def test_in_one_layer_keys_know_nothing_of_what_was_dropped() -> None:
    model = build("alibi", n_layers=1).double()
    assert streamed(model, 8) == pytest.approx(in_windows(model, 8, stride=1), abs=1e-9)


@pytest.mark.parametrize("position", ["alibi", "nope"])
@pytest.mark.parametrize(("size", "sinks"), [(8, 0), (8, 3), (9, 1), (SEGMENT - 1, 4)])
def test_equals_attention_written_out_for_every_query(position: str, size: int, sinks: int) -> None:
    model = build(position, n_layers=2).double()
    starts = [(0, 0), (0, SEGMENT), (1, 0)]
    expected = [
        sum(streamed_nats(model, DOCUMENTS[n][at : at + SEGMENT + 1], sinks=sinks, window=size - sinks))
        for n, at in starts
    ]
    assert streamed(model, size, sinks) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("size", [SEGMENT, 3 * SEGMENT])
def test_a_cache_that_holds_the_segment_is_one_forward(size: int) -> None:
    model = build("rope").double()
    assert streamed(model, size, 4) == pytest.approx(in_windows(model, SEGMENT), abs=1e-9)


def rows(model: Transformer, **settings: Any) -> dict[tuple[int, str], Measurement]:
    config = PerplexityConfig(**{"lengths": (8, SEGMENT), "segment": SEGMENT, "min_documents": 1} | settings)
    where: dict[str, Any] = {"trained_context": 16, "device": torch.device("cpu"), "precision": "fp32"}
    found = evaluate_perplexity(model, dataset_of(split_of(DOCUMENTS)), config, **where).measurements
    return {(m.context, m.protocol): m for m in found if m.name == "nats_per_token" and m.context is not None}


def test_streaming_is_a_protocol_of_its_own() -> None:
    model = build("rope").double()
    found = rows(model, streaming=(8, 20, 64), sinks=2)
    assert set(found) == {
        (8, "non-overlapping"), (SEGMENT, "non-overlapping"), (8, "streaming"), (20, "streaming"), (64, "streaming"),
    }  # fmt: skip
    row = found[8, "streaming"]
    assert row.axes == {"segment": SEGMENT, "sinks": 2}
    assert row.value == pytest.approx(streamed(model, 8, 2).sum() / (3 * SEGMENT), abs=1e-9)
    plain = found[8, "non-overlapping"].value
    assert row.value is not None
    assert plain is not None
    assert row.facts["difference"] == pytest.approx(row.value - plain, abs=1e-12)
    assert found[20, "streaming"].facts == {}, "there are no windows of 20 to compare with"
    assert found[64, "streaming"].status == "no_document"


@pytest.mark.parametrize(
    ("position", "attention", "sinks", "why"),
    [
        ("sinusoidal", "full", 2, "is part of the keys and values themselves"),
        ("fox", "full", 2, "carries sums over all tokens"),
        ("rope", "chunked", 0, "which chunked attention cannot follow; use full"),
        ("rope", "sliding_window", 2, "which sliding_window attention cannot follow; use full, or no sinks"),
        ("nope", "linear", 0, "which linear attention cannot follow"),
    ],
)  # fmt: skip
def test_what_cannot_be_streamed_says_why_and_the_others_go_on(
    position: str, attention: str, sinks: int, why: str
) -> None:
    found = rows(build(position, attention=attention), streaming=(8,), sinks=sinks)
    row = found[8, "streaming"]
    assert (row.status, row.value) == ("undefined", None)
    assert why in row.reason
    assert not row.reason.startswith("decoding")
    assert found[8, "non-overlapping"].value is not None
    assert found[SEGMENT, "non-overlapping"].value is not None
