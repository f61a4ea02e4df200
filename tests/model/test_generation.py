"""Decoding: the tokens are those of full forwards, sampling follows its distribution, limits hold."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from ctxlab.errors import ConfigError, RunError, UndefinedBeyondTraining
from ctxlab.model.generation import DecodingConfig, chances, choose, generate
from tests.model.builders import build, tokens

GREEDY = DecodingConfig(temperature=0.0, max_new_tokens=24)


@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "nope", "sinusoidal"])
def test_greedy_equals_full_forwards_without_a_cache(position: str) -> None:
    model = build(position, context=16)  # prompt and continuation go past it
    prompt = tokens(1, 20)[0].tolist()
    text = list(prompt)
    with torch.no_grad():
        for _ in range(24):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert list(generate(model, prompt, GREEDY)) == text[20:]


def test_tokens_are_yielded_one_by_one() -> None:
    model = build()
    calls = 0
    original = model.hidden

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    model.hidden = counted  # type: ignore[method-assign]
    stream = generate(model, [1, 2, 3], GREEDY)
    next(stream)
    assert calls == 1


def test_same_seed_same_tokens_other_seed_other_tokens() -> None:
    model = build()
    config = DecodingConfig(max_new_tokens=32)
    one, again, other = (list(generate(model, [5], config, seed=seed)) for seed in (7, 7, 8))
    assert one == again
    assert one != other


def test_stops_before_a_stop_token() -> None:
    model = build()
    everything = list(generate(model, [5], GREEDY))
    stop = everything[4]
    assert list(generate(model, [5], GREEDY, stop_ids=[stop])) == everything[: everything.index(stop)]


def test_learned_positions_end_with_the_trained_context() -> None:
    model = build("learned", context=8)
    found: list[int] = []
    with pytest.raises(UndefinedBeyondTraining, match="position 8: learned positions are defined up to 7 only"):
        found.extend(generate(model, [1, 2, 3, 4, 5], GREEDY))
    assert len(found) == 4  # behind positions 4, 5, 6 and 7


@pytest.mark.parametrize("length", [5, 12, 13, 30])
def test_a_streaming_cache_goes_on_from_a_prompt_of_any_length(length: int) -> None:
    """One layer: what is drawn is what follows the first 3 and the last 9 tokens alone."""
    model = build("rope", n_layers=1)
    prompt = tokens(1, length)[0].tolist()
    text = list(prompt)
    with torch.no_grad():
        for _ in range(24):
            kept = text if len(text) <= 12 else text[:3] + text[-9:]
            text.append(int(model(torch.tensor([kept]))[0, -1].argmax()))
    config = DecodingConfig(temperature=0.0, max_new_tokens=24, cache="streaming", cache_sinks=3, cache_window=9)
    assert list(generate(model, prompt, config)) == text[length:]


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompt: expected at least one token, got an empty prompt"):
        next(generate(build(), []))


def frequencies(config: DecodingConfig, logits: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    drawn = torch.tensor([choose(logits, config, random) for _ in range(draws)])
    return torch.bincount(drawn, minlength=len(logits)) / draws


LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.1}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),  # of 4/9, 3/9, 2/9
        ({"min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),  # at least 0.24
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"min_p": 0.4, "top_k": 3}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
    ],
)
def test_sampling_distribution(settings: dict[str, float], expected: list[float]) -> None:
    found = frequencies(DecodingConfig(**settings), LOGITS)  # type: ignore[arg-type]
    target = torch.tensor(expected)
    assert (found[target == 0] == 0).all()
    assert (found - target).abs().max() < 4 * (0.25 / 4000) ** 0.5  # four standard errors


def by_sorting(logits: torch.Tensor, config: DecodingConfig) -> torch.Tensor:
    """Every token's chance (V,), from all of them in falling order, one by one."""
    order = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    order = order[: config.top_k or None]
    top = float(logits.max())
    weights = [math.exp((float(logits[token]) - top) / config.temperature) for token in order]
    p = [weight / sum(weights) for weight in weights]
    left = torch.zeros(len(logits), dtype=torch.float64)
    for place, token in enumerate(order):
        if (config.top_p == 1 or math.fsum(p[:place]) < config.top_p) and p[place] >= config.min_p * p[0]:
            left[token] = p[place]
    return left / left.sum()


@pytest.mark.parametrize("vocab_size", [5, 64, 700])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 30.0])
@pytest.mark.parametrize(
    "cut",
    [
        {}, {"top_k": 3}, {"top_p": 0.3}, {"top_p": 0.97}, {"min_p": 0.03}, {"top_p": 0.8, "min_p": 0.2},
        {"top_k": 65, "top_p": 0.85}, {"top_k": 4, "min_p": 0.5}, {"top_k": 300, "top_p": 0.9, "min_p": 0.01},
    ],
)  # fmt: skip
def test_chances_are_those_of_a_sorted_vocabulary(vocab_size: int, temperature: float, cut: dict[str, float]) -> None:
    config = DecodingConfig(temperature=temperature, **cut)  # type: ignore[arg-type]
    logits = 4 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    p, ids = chances(logits, config)
    found = p if ids is None else torch.zeros(vocab_size).scatter(0, ids, p)
    expected = by_sorting(logits, config)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close((found / found.sum()).double(), expected, atol=1e-6, rtol=1e-4)


def test_of_equal_tokens_at_the_edge_of_a_nucleus_the_first_stay() -> None:
    logits = torch.log(torch.tensor([0.125, 0.25, 0.125, 0.125, 0.25, 0.125]))
    for top_p, kept in ((0.55, [0, 1, 4]), (0.7, [0, 1, 2, 4]), (0.2, [1]), (0.8, [0, 1, 2, 3, 4])):
        config = DecodingConfig(top_p=top_p)
        assert chances(logits, config)[0].nonzero()[:, 0].tolist() == kept
        assert by_sorting(logits, config).nonzero()[:, 0].tolist() == kept
    many = torch.zeros(1000)  # more alike than are looked at first
    assert chances(many, DecodingConfig(top_p=0.3005))[0].nonzero()[:, 0].tolist() == list(range(301))


def test_without_cuts_nothing_is_sorted() -> None:
    class Sorts(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.n += func.overloadpacket in (torch.ops.aten.sort, torch.ops.aten.topk)
            return func(*args, **(kwargs or {}))

    random = torch.Generator().manual_seed(0)
    for settings, n in (({}, 0), ({"min_p": 0.1}, 0), ({"top_k": 2}, 1)):
        with Sorts() as sorts:
            choose(LOGITS, DecodingConfig(**settings), random)
        assert sorts.n == n


def test_what_is_no_number_is_not_drawn_from() -> None:
    with pytest.raises(RunError, match="the model's logits are no numbers"):
        choose(torch.tensor([0.0, math.nan]), DecodingConfig(), torch.Generator())


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
@pytest.mark.parametrize("cut", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.5}])
@pytest.mark.parametrize("scale", [1.0, 1e38])
def test_a_temperature_near_0_is_that_of_0(temperature: float, cut: dict[str, float], scale: float) -> None:
    logits = torch.tensor([0.5, 3.0, 1.0, -2.0]) * scale
    config = DecodingConfig(temperature=temperature, **cut)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(0)
    assert [choose(logits, config, random) for _ in range(20)] == [1] * 20


def test_two_that_are_likeliest_stay_so_at_any_temperature() -> None:
    found = frequencies(DecodingConfig(temperature=1e-40), torch.tensor([7.0, 3.0, 7.0, 6.9]), draws=1000)
    assert found[1] == found[3] == 0
    assert abs(found[0] - 0.5) < 4 * (0.25 / 1000) ** 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature\n.*greater than or equal to 0"),
        ({"top_p": 0.0}, "top_p\n.*greater than 0"),
        ({"top_p": 1.5}, "top_p\n.*less than or equal to 1"),
        ({"top_k": -1}, "top_k\n.*greater than or equal to 0"),
        ({"max_new_tokens": 0}, "max_new_tokens\n.*greater than or equal to 1"),
        ({"temprature": 1.0}, "temprature\n.*not permitted"),
    ],
)
def test_refusals(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DecodingConfig(**wrong)  # type: ignore[arg-type]


def test_under_autocast_a_weight_is_cast_once_for_all_tokens() -> None:
    class Casts(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.of: Counter[tuple[int, ...]] = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten._to_copy.default and args[0].ndim == 2:
                self.of[tuple(args[0].shape)] += 1
            return func(*args, **(kwargs or {}))

    model = build(d_ff=40)
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        assert len(list(generate(model, [1, 2, 3], GREEDY))) == 24
    n_layers = len(model.blocks)
    assert casts.of[40, model.config.d_model] == 2 * n_layers  # gate and up of each layer, whatever the tokens
