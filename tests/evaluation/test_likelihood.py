"""Likelihoods of continuations against full forwards in float64, one request at a time, and against greedy decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlab.errors import UndefinedBeyondTraining
from ctxlab.evaluation.likelihood import Likelihood, Request, likelihoods, request_windows
from ctxlab.model.generation import DecodingConfig, generate
from ctxlab.model.transformer import Transformer
from ctxlab.train.scoring import Window
from tests.model.builders import VOCAB, build

CPU = torch.device("cpu")


def requests_of(*sizes: tuple[int, int], seed: int = 0) -> list[Request]:
    """Random tokens, (context, continuation) of each."""
    draw = np.random.default_rng(seed)
    return [Request(draw.integers(0, VOCAB, context + new).astype(np.uint32), new) for context, new in sizes]


def score(model: Transformer, requests: list[Request], **options: Any) -> list[Likelihood]:
    defaults: dict[str, Any] = {"longest": 64, "device": CPU, "precision": "fp32", "batch_tokens": 256}
    return likelihoods(model, requests, **defaults | options)


def by_hand(model: Transformer, request: Request) -> float:
    """Nats of the continuation: one forward of this request alone, and a softmax over all logits."""
    ids = torch.from_numpy(request.tokens.astype(np.int64))
    with torch.no_grad():
        scores = model(ids[None, :-1]).log_softmax(-1)[0]  # (T - 1, V)
    places = range(len(ids) - 1 - request.scored, len(ids) - 1)
    return -sum(scores[place, ids[place + 1]].item() for place in places)


def test_the_windows_of_the_docstring() -> None:
    assert request_windows(11, 10, 4) == [Window(0, 4, 4), Window(4, 4, 4), Window(6, 4, 2)]


@given(size=st.integers(2, 60), scored=st.integers(0, 59), longest=st.integers(1, 70))
def test_every_scored_token_is_the_target_of_one_window_that_is_as_long_as_can_be(
    size: int, scored: int, longest: int
) -> None:
    scored = min(scored, size - 1)
    targets = []
    for start, width, new in request_windows(size, scored, longest):
        assert 1 <= new <= width <= longest
        assert start == 0 or width == longest, "context that would fit is left out"
        targets += range(start + width + 1 - new, start + width + 1)
    assert targets == list(range(size - scored, size))


@pytest.mark.parametrize("position", ["rope", "alibi", "learned", "t5"])
@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_equal_full_forwards_in_float64(position: str, batch_tokens: int) -> None:
    model = build(position).double()
    requests = requests_of((1, 1), (5, 3), (40, 24), (1, 63), (30, 1), (12, 4), (12, 4), (2, 0))
    found = score(model, requests, batch_tokens=batch_tokens)
    for request, likelihood in zip(requests, found, strict=True):
        assert likelihood.nats == pytest.approx(by_hand(model, request), rel=1e-10)
        assert not likelihood.cut
    assert found[-1] == Likelihood(0.0, True, False), "nothing scored"


def test_fp32_is_float64_to_1e_6() -> None:
    requests = requests_of((5, 3), (40, 24), (1, 63))
    single, double = build("rope"), build("rope").double()
    for request, likelihood in zip(requests, score(single, requests), strict=True):
        assert likelihood.nats == pytest.approx(by_hand(double, request), rel=1e-6)


def test_a_context_that_is_too_long_loses_its_beginning_and_no_scored_token() -> None:
    model = build("rope").double()
    (long,) = requests_of((50, 10))
    (found,) = score(model, [long], longest=16)
    assert found.cut
    assert found.nats == pytest.approx(by_hand(model, Request(long.tokens[-17:], 10)), rel=1e-10)
    (just,) = requests_of((7, 10))  # 16 inputs
    assert not score(model, [just], longest=16)[0].cut


def test_a_text_longer_than_a_window_is_the_sum_of_its_windows() -> None:
    model = build("alibi").double()
    (text,) = requests_of((1, 37))
    (found,) = score(model, [text], longest=16)
    parts = [Request(text.tokens[:17], 16), Request(text.tokens[16:33], 16), Request(text.tokens[21:38], 5)]
    assert not found.cut
    assert found.nats == pytest.approx(sum(by_hand(model, part) for part in parts), rel=1e-10)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 12))
def test_greedy_is_what_decoding_says(seed: int, size: int) -> None:
    model = build("rope", seed=seed % 7)
    prompt = np.random.default_rng(seed).integers(0, VOCAB, size).tolist()
    said = list(generate(model, prompt, DecodingConfig(max_new_tokens=6, temperature=0)))
    wrong = [*said[:-1], (said[-1] + 1) % VOCAB]
    first = [(said[0] + 1) % VOCAB, *said[1:]]
    requests = [Request(np.array(prompt + answer, dtype=np.uint32), 6) for answer in (said, wrong, first)]
    assert [found.greedy for found in score(model, requests)] == [True, False, False]


def test_answers_of_one_token_to_one_question_share_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("rope").double()
    (question,) = requests_of((20, 0))
    requests = [Request(np.append(question.tokens, np.uint32(answer)), 1) for answer in range(VOCAB)]
    forwards = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda block, **more: forwards.append(block.shape) or hidden(block, **more))
    heard: list[int] = []
    found = score(model, requests, advance=heard.append)
    assert forwards == [(1, 20)]
    assert sum(heard) == VOCAB
    assert sum(np.exp(-likelihood.nats) for likelihood in found) == pytest.approx(1, rel=1e-12)
    assert sum(likelihood.greedy for likelihood in found) == 1


def test_positions_that_end_say_so() -> None:
    with pytest.raises(UndefinedBeyondTraining):
        score(build("learned", context=8), requests_of((10, 10)))
