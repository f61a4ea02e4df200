"""Prompts decoded side by side, and beam search: against each prompt alone, greedy decoding and exhaustive search."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ctxlab.errors import ConfigError, UndefinedBeyondTraining
from ctxlab.model.base import Model
from ctxlab.model.beam import Hypothesis, beam_search
from ctxlab.model.generation import DecodingConfig, decode, generate, penalized
from ctxlab.model.position.base import POSITIONS
from tests.model.builders import build, tokens

SCHEMES = sorted(POSITIONS.names())
PROMPTS = [tokens(1, n, seed=number)[0].tolist() for number, n in enumerate((5, 9, 1, 5, 14))]


def search(
    model: Model, prompts: list[list[int]], stop_ids: tuple[int, ...] = (), **settings: object
) -> list[list[Hypothesis]]:
    return beam_search(model, prompts, DecodingConfig.model_validate(settings), stop_ids=stop_ids)


@pytest.mark.parametrize(("position", "temperature"), [*((scheme, 0.0) for scheme in SCHEMES), ("rope", 1.5)])
def test_side_by_side_is_one_by_one(position: str, temperature: float) -> None:
    model = build(position, context=32)
    config = DecodingConfig(max_new_tokens=9, temperature=temperature)
    alone = [list(generate(model, prompt, config, seed=3 + row)) for row, prompt in enumerate(PROMPTS)]
    stop = alone[0][3]  # some end early: rows leave, and the others go on
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in alone]
    assert decode(model, PROMPTS, config, seeds=range(3, 8)) == alone
    assert decode(model, PROMPTS, config, seeds=range(3, 8), stop_ids=[stop]) == expected


@pytest.mark.parametrize("attention", ["sliding_window", "linear", "chunked"])
def test_side_by_side_under_other_mechanisms(attention: str) -> None:
    model = build("sinusoidal", attention=attention)
    config = DecodingConfig(max_new_tokens=12, temperature=0)
    assert decode(model, PROMPTS, config) == [list(generate(model, prompt, config)) for prompt in PROMPTS]


def test_side_by_side_over_a_streaming_cache() -> None:
    model = build("rope")
    config = DecodingConfig(max_new_tokens=12, temperature=0, cache="streaming", cache_sinks=2, cache_window=6)
    alone = [list(generate(model, prompt, config)) for prompt in PROMPTS]
    stop = alone[1][7]
    assert decode(model, PROMPTS, config) == alone
    assert decode(model, PROMPTS, config, stop_ids=[stop])[1] == alone[1][: alone[1].index(stop)]


def test_an_ended_row_is_not_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    config = DecodingConfig(max_new_tokens=12, temperature=0)
    free = decode(model, PROMPTS[:2], config)
    stop = next(token for token in free[0] if token not in free[1])
    shapes: list[torch.Size] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda new, **more: shapes.append(new.shape) or hidden(new, **more))
    decode(model, PROMPTS[:2], config, stop_ids=[stop])
    at = free[0].index(stop)
    assert shapes[0] == (2, 5)
    assert [shape[0] for shape in shapes] == [2] * (1 + at) + [1] * (len(shapes) - 1 - at)
    assert (
        len(shapes) == 1 + 4 + 11
    )  # the common beginning, what else the longer prompt has, all new tokens but the last


def test_a_row_is_over_when_its_caller_says_so() -> None:
    model = build()
    config = DecodingConfig(max_new_tokens=12, temperature=0)
    free = decode(model, PROMPTS, config)
    found = decode(model, PROMPTS, config, is_over=lambda ids: sum(ids) > 150)
    for ids, whole in zip(found, free, strict=True):
        n = next((n for n in range(1, 13) if sum(whole[:n]) > 150), 12)
        assert ids == whole[:n]


# Beam search


@pytest.mark.parametrize("position", ["rope", "fox", "fire", "learned"])
def test_one_beam_is_greedy(position: str) -> None:
    model = build(position, context=32)
    config = DecodingConfig(max_new_tokens=9, temperature=0)
    free = decode(model, PROMPTS, config)
    stop = free[0][3]
    greedy = decode(model, PROMPTS, config, stop_ids=[stop])
    found = search(model, PROMPTS, (stop,), max_new_tokens=9, num_beams=1)
    assert [hypotheses[0].tokens for hypotheses in found] == greedy
    assert {len(hypotheses) for hypotheses in found} == {1}


def log_p_of(
    model: Model, prompt: list[int], behind: tuple[int, ...], process: Any = lambda ids, logits: logits
) -> float:
    """ln p of tokens behind a prompt, by one full forward without a cache; `process` changes the logits behind a text."""
    text = torch.tensor([[*prompt, *behind]])
    with torch.no_grad():
        logits = model(text[:, :-1])
    ends = range(len(prompt), text.shape[1])
    return sum(float(process(text[:, :n], logits[:, n - 1]).double().log_softmax(-1)[0, text[0, n]]) for n in ends)


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0, -1.0])
def test_full_width_is_exhaustive_search(length_penalty: float) -> None:
    V, longest, end = 4, 4, 2
    model = build("rope", vocab_size=V).double()
    with torch.no_grad():
        model.embedding.weight.mul_(4)  # far from uniform
    every = [
        behind
        for n in range(1, longest + 1)
        for behind in itertools.product(range(V), repeat=n)
        if end not in behind[:-1] and (behind[-1] == end or n == longest)
    ]
    prompts = [[1, 3], [0, 3, 1]]
    found = search(
        model, prompts, (end,), max_new_tokens=longest, num_beams=2 * len(every), length_penalty=length_penalty
    )
    for prompt, hypotheses in zip(prompts, found, strict=True):
        scored = []
        for behind in every:
            log_p = log_p_of(model, prompt, behind)
            score = log_p / ((5 + len(behind)) / 6) ** length_penalty
            scored.append((list(behind[:-1] if behind[-1] == end else behind), log_p, score))
        scored.sort(key=lambda one: -one[2])
        assert [h.tokens for h in hypotheses] == [tokens for tokens, _, _ in scored]
        assert [h.log_p for h in hypotheses] == pytest.approx([log_p for _, log_p, _ in scored], rel=1e-9)
        assert [h.score for h in hypotheses] == pytest.approx([score for _, _, score in scored], rel=1e-9)


def by_hand(
    model: Model,
    prompt: list[int],
    K: int,
    longest: int,
    ends: Collection[int],
    a: float,
    is_over: Callable[[list[int]], bool] = lambda _: False,
    **how: Any,
) -> list[tuple[list[int], float]]:
    """The search of one prompt by full forwards, as its description reads."""
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    aside: list[tuple[list[int], float]] = []
    for n in range(1, longest + 1):
        lp, most = ((5 + n) / 6) ** a, ((5 + longest) / 6) ** a
        every = [
            ((*behind, token), log_p_of(model, prompt, (*behind, token), **how))
            for behind, _ in live
            for token in range(model.vocab_size)
        ]
        every.sort(key=lambda one: -one[1])
        over = [behind[-1] in ends or is_over(list(behind)) for behind, _ in every]
        for (behind, p), ended in zip(every[:K], over):
            if ended:
                aside.append((list(behind[:-1] if behind[-1] in ends else behind), p / lp))
        live = [one for one, ended in zip(every, over) if not ended][:K]
        if not live or (len(aside) >= K and (K == 1 or live[0][1] / most <= max(score for _, score in aside))):
            break
    else:
        if len(aside) < K:
            aside += [(list(b), p / lp) for b, p in live]
    return sorted(aside, key=lambda one: -one[1])[:K]


@pytest.mark.parametrize(("K", "a"), [(2, 0.6), (3, 0.0), (4, 1.0)])
def test_search_is_as_described_and_side_by_side_is_alone(K: int, a: float) -> None:
    model = build("alibi", vocab_size=12).double()
    with torch.no_grad():
        model.embedding.weight.mul_(4)
    prompts = [[1, 3], [7], [4, 4, 9, 2], [5]]
    found = search(model, prompts, (0,), max_new_tokens=7, num_beams=K, length_penalty=a)
    for prompt, hypotheses in zip(prompts, found, strict=True):
        expected = by_hand(model, prompt, K, 7, {0}, a)
        assert [h.tokens for h in hypotheses] == [ids for ids, _ in expected]
        assert [h.score for h in hypotheses] == pytest.approx([score for _, score in expected], rel=1e-9)


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_one_beam_is_greedy_under_a_penalty(position: str, penalty: float) -> None:
    model = build(position, context=32)
    config = DecodingConfig(max_new_tokens=15, temperature=0, repetition_penalty=penalty)
    greedy = decode(model, PROMPTS, config)
    assert greedy != decode(model, PROMPTS, config.model_copy(update={"repetition_penalty": 1.0}))
    assert [hypotheses[0].tokens for hypotheses in beam_search(model, PROMPTS, config)] == greedy


def test_a_penalty_in_a_search_is_that_of_hugging_face_on_logits() -> None:
    process = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor(penalty=1.7)
    model = build("alibi", vocab_size=12).double()
    prompts = [[1, 3], [7], [4, 4, 9, 2]]
    found = search(model, prompts, (0,), max_new_tokens=6, num_beams=3, repetition_penalty=1.7)
    for prompt, hypotheses in zip(prompts, found, strict=True):
        expected = by_hand(model, prompt, 3, 6, {0}, 0.6, process=process)
        assert [h.tokens for h in hypotheses] == [ids for ids, _ in expected]
        assert [h.score for h in hypotheses] == pytest.approx([score for _, score in expected], rel=1e-9)


def is_odd(ids: list[int]) -> bool:
    return len(ids) > 1 and ids[-1] % 2 == 1


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize(
    ("stop_ids", "is_over"),
    [
        ((), is_odd),
        ((0,), is_odd),
        (range(1, 12), lambda _: False),  # few go on: no K of the best 2 K do
        (range(12), lambda _: False),
        ((), lambda _: True),
    ],
)
def test_a_search_of_what_ends_in_many_ways(
    K: int, stop_ids: Collection[int], is_over: Callable[[list[int]], bool]
) -> None:
    model = build("alibi", vocab_size=12).double()
    with torch.no_grad():
        model.embedding.weight.mul_(4)
    prompts = [[1, 3], [7], [4, 4, 9, 2]]
    config = DecodingConfig(max_new_tokens=5, num_beams=K)
    found = beam_search(model, prompts, config, stop_ids=stop_ids, is_over=is_over)
    for prompt, hypotheses in zip(prompts, found, strict=True):
        expected = by_hand(model, prompt, K, 5, stop_ids, 0.6, is_over)
        assert [h.tokens for h in hypotheses] == [ids for ids, _ in expected]
        assert [h.score for h in hypotheses] == pytest.approx([score for _, score in expected], rel=1e-9)
    if K == 1:
        greedy = DecodingConfig(max_new_tokens=5, temperature=0)
        said = decode(model, prompts, greedy, stop_ids=stop_ids, is_over=is_over)
        assert [hypotheses[0].tokens for hypotheses in found] == said


def test_prompts_have_limits_of_their_own() -> None:
    model, limits = build("rope"), [3, 1, 6]
    config = DecodingConfig(temperature=0, max_new_tokens=9)
    whole = decode(model, PROMPTS[:3], config)
    assert decode(model, PROMPTS[:3], config, limits=limits) == [ids[:n] for ids, n in zip(whole, limits, strict=True)]
    beams = DecodingConfig(num_beams=3)
    found = beam_search(model, PROMPTS[:3], beams, limits=limits)
    for prompt, limit, hypotheses in zip(PROMPTS[:3], limits, found, strict=True):
        alone = search(model, [prompt], num_beams=3, max_new_tokens=limit)[0]
        assert [h.tokens for h in hypotheses] == [h.tokens for h in alone]


def test_hypotheses_differ_and_the_best_comes_first() -> None:
    model = build("rope", vocab_size=12)
    found = search(model, [[3, 1]], (0,), max_new_tokens=5, num_beams=5)[0]
    assert len(found) == 5
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    assert len({tuple(h.tokens) for h in found}) == 5


# Settings


def test_a_penalty_on_repetition_is_that_of_hugging_face() -> None:
    processor = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor(penalty=1.7)
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    texts = tokens(3, 9, seed=4) % 40
    expected = processor(texts, logits.clone())
    config = DecodingConfig(repetition_penalty=1.7)
    for row in range(3):
        assert torch.equal(penalized(logits[row], texts[row].tolist(), config), expected[row])
    model = build()
    free = list(generate(model, [5], DecodingConfig(max_new_tokens=20, temperature=0)))
    held = list(generate(model, [5], DecodingConfig(max_new_tokens=20, temperature=0, repetition_penalty=1e9)))
    assert len(set(free)) < 20
    assert len({5, *held}) == 21


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_beams": 4, "top_k": 3}, "num_beams: a search draws nothing; leave out top_k=3"),
        ({"num_beams": 4, "temperature": 0.7}, "leave out temperature=0.7"),
        ({"num_beams": 4, "cache": "streaming"}, "leave out cache=streaming"),
        ({"stop_strings": ("a", "")}, "stop_strings: an empty one is everywhere"),
        ({"min_p": 1.5}, "less than or equal to 1"),
        ({"repetition_penalty": 0}, "greater than 0"),
    ],
)
def test_refusals(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DecodingConfig.model_validate(wrong)


def test_an_empty_prompt_among_others_is_refused() -> None:
    for run in (decode, beam_search):
        with pytest.raises(ConfigError, match="prompt: expected at least one token"):
            run(build(), [[1], []], DecodingConfig())


def test_positions_end() -> None:
    model = build("learned", context=8)
    with pytest.raises(UndefinedBeyondTraining, match="position 8"):
        search(model, [[1, 2, 3, 4, 5]], max_new_tokens=5, num_beams=2)
    assert len(search(model, [[1, 2, 3, 4, 5]], max_new_tokens=4, num_beams=2)[0][0].tokens) == 4
