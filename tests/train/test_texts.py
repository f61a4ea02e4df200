"""What a run says to many prompts: as full forwards without a cache say it, up to where its positions end."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from ctxlab.data.tokenizers.byte import Byte
from ctxlab.data.tokenizers.sides import Tokenizers
from ctxlab.errors import UndefinedBeyondTraining
from ctxlab.model.beam import beam_search
from ctxlab.model.generation import DecodingConfig, room
from ctxlab.train.checkpoint import LoadedRun
from tests.model.builders import build

BYTES = Byte(Byte.Config())
GREEDY = DecodingConfig(temperature=0)
# 24 bytes are read to the last position, 25 are one too many.
PROMPTS = ["ab", "abcdef", "", "x" * 24, "x" * 25, "to be", "x" * 23]


def loaded(position: str = "learned", **settings: Any) -> LoadedRun:
    """A run of a model with 24 positions, which never says </s> where nothing is said of it."""
    model = build(position, context=24, vocab_size=BYTES.vocab_size, **settings)
    return LoadedRun(cast(Any, None), model, Tokenizers.joint(BYTES), cast(Any, None))


@torch.no_grad()
def by_full_forwards(run: LoadedRun, prompt: str, most: int) -> str:
    """Greedy decoding without a cache, while there is a position to read the text at."""
    model: Any = run.model
    ids = BYTES.encode(prompt)
    read: dict[str, Any] = {}
    if run.translates:
        if len(ids) >= 24:
            return ""
        read, ids = {"source": torch.tensor([[*ids, BYTES.eos_id]])}, []
    text = ids or [BYTES.bos_id]
    begun = len(text)
    while len(text) <= 24 and len(text) < begun + most:
        token = int(model.logits(model.hidden(torch.tensor([text]), **read))[0, -1].argmax())
        if token == BYTES.eos_id:
            break
        text = [*text, token]
    return BYTES.decode(text[begun:])


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_texts_end_where_positions_do_and_nothing_is_lost(architecture: str) -> None:
    run = loaded(architecture=architecture)
    short: list[int] = []
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n

    found = run.texts(PROMPTS, GREEDY, batch=3, short=short.append, advance=advance)
    longer = [by_full_forwards(run, prompt, 300) for prompt in PROMPTS]
    assert found == longer
    assert done == len(PROMPTS)
    assert [len(text) > 0 for text in longer] == [
        len(prompt) <= 24 - (architecture == "encoder_decoder") for prompt in PROMPTS
    ]
    assert sorted(short) == list(range(len(PROMPTS)))
    # What max_new_tokens ends is not short of anything.
    short.clear()
    few = run.texts(PROMPTS, DecodingConfig(temperature=0, max_new_tokens=2), short=short.append)
    assert few == [by_full_forwards(run, prompt, 2) for prompt in PROMPTS]
    assert sorted(short) == [3, 4]


def test_a_stop_string_is_an_end_of_its_own() -> None:
    run = loaded()
    stop = run.texts(["ab"], GREEDY)[0][-1:]  # at the last position there is
    short: list[int] = []
    assert stop not in run.texts(["ab"], GREEDY.model_copy(update={"stop_strings": (stop,)}), short=short.append)[0]
    assert short == []


@pytest.mark.parametrize(("architecture", "most"), [("decoder", 23), ("encoder_decoder", 24)])
def test_a_search_ends_there_too(architecture: str, most: int) -> None:
    """It finds what a search for as many tokens as there are positions for finds; one more cannot be had."""
    run = loaded(architecture=architecture)
    config = DecodingConfig(num_beams=3)
    begun, encoded = run._begun(["ab"])
    expected = beam_search(run.model, begun, config, limits=[most], encoded=encoded)[0][0]
    assert run.texts(["ab", "x" * 25], config) == [BYTES.decode(expected.tokens), ""]
    with pytest.raises(UndefinedBeyondTraining):
        beam_search(run.model, begun, config, limits=[most + 1], encoded=run._begun(["ab"])[1])
    pieces: list[str] = []
    with pytest.raises(UndefinedBeyondTraining, match="position 24: the model has 24 positions"):
        pieces.extend(run.stream("ab", config))
    assert pieces == [BYTES.decode(expected.tokens)]


def test_positions_without_an_end_and_those_within_a_streaming_cache() -> None:
    assert room(loaded("rope").model, 1000, DecodingConfig()) == 256
    table = loaded().model
    streaming = {"cache": "streaming", "cache_sinks": 4}
    assert room(table, 1000, DecodingConfig.model_validate({**streaming, "cache_window": 20})) == 256
    assert room(table, 5, DecodingConfig.model_validate({**streaming, "cache_window": 21})) == 20


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_search_ends_with_a_stop_string(num_beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All hypotheses that are likely say one of the letters early, and no more is read than until they do."""
    run = loaded("rope")
    stops = tuple(chr(code) for code in range(64, 127))
    config = DecodingConfig(
        num_beams=num_beams, temperature=float(num_beams > 1), max_new_tokens=60, stop_strings=stops
    )
    calls = 0
    hidden = run.model.hidden

    def counted(*args: Any, **more: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return hidden(*args, **more)

    monkeypatch.setattr(run.model, "hidden", counted)
    said = run.texts(["ab", "abcdef"], config)
    assert not any(stop in text for stop in stops for text in said)
    assert calls < 30
