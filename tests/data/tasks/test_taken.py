"""The values of a text: found wherever they stand, held against a search for each of them."""

from __future__ import annotations

import random
import uuid
from pathlib import Path
from typing import Any

import pytest

from ctxlab.data.corpora.text import Text
from ctxlab.data.tasks import taken, words
from ctxlab.data.tasks.base import held_out
from ctxlab.data.tasks.taken import Taken, taken_values, values_in
from ctxlab.errors import DataError
from tests.data.builders import prose

UUID = "0f0e1a2b-1234-4abc-8def-001122334455"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("in 1623, 12", {"162", "623", "1623"}),
        ("x0075x", set()),
        ("tel.1002003", {"100", "1002", "10020", "100200", "1002003", "200", "2003"}),
        ("a Happy-Lion!", {"happy-lion"}),
        ("unhappy-lionize", {"happy-lion"}),
        ("old-happy-lion happy -lion happy- lion happy-\nlion", {"happy-lion"}),
        ("\u00e9happy-lion\u00e9", {"happy-lion"}),
        (f"<{UUID.upper()}>", {UUID}),
        (f"ff{UUID}00", {UUID}),
        (UUID[1:], set()),
        (UUID[:-1], set()),
    ],
)
def test_values_are_found_wherever_they_stand(text: str, wanted: set[str]) -> None:
    found = {value for value in values_in(text) if value not in UUID or value == UUID}
    if "-lion" in text:
        found = {value for value in found if value.endswith("-lion")}
    assert found == wanted | {value for value in found if value.isdigit() and UUID.lower() in text.lower()}


def test_nothing_that_a_search_would_find_is_missed() -> None:
    rng = random.Random(1)
    adjectives, nouns = words.adjectives(), words.nouns()
    alphabet = [*"-1290129034567" * 2, " ", "\n", *rng.sample(adjectives, 6), *rng.sample(nouns, 6), "A", "z"]
    text = "".join(rng.choices(alphabet, k=6000))
    found = set(values_in(text))
    numbers = {str(number) for number in range(100, 100_000) if str(number) in text}
    assert {value for value in found if value.isdigit() and len(value) <= 5} == numbers
    lower = text.lower()
    pairs = {
        f"{a}-{n}" for a in adjectives if f"{a}-" in lower for n in nouns if f"-{n}" in lower and f"{a}-{n}" in lower
    }
    assert {value for value in found if "-" in value} == pairs
    assert len(numbers) > 100
    assert len(pairs) > 10


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Text.Config, list[str]]:
    """Forty documents, each with values of its own."""
    rng = random.Random(2)
    texts = []
    for number in range(40):
        values = [str(rng.randrange(10**6, 10**7)) for _ in range(20)] + [
            str(uuid.UUID(int=rng.getrandbits(128), version=4))
        ]
        texts.append(prose(number, 8) + " ".join(values) + "\n" + prose(number + 1, 3))
        (tmp_path / f"{number:02}.txt").write_text(texts[-1])
    return Text.Config(path=str(tmp_path / "*.txt")), texts


def test_the_values_of_the_training_text_and_of_no_other(
    corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, texts = corpus
    text = taken.training_text(config, cache=tmp_path)
    train = ["".join(document.lines) for document in text.documents]
    assert sorted(train) == sorted(set(texts) & set(train))
    assert 20 < len(train) < 40
    assert sum(len(one.encode()) for one in train) == text.n_bytes
    inside = {value for one in train for value in values_in(one)}
    outside = {value for one in texts if one not in train for value in values_in(one)} - inside
    done: list[int] = []
    found = taken_values(config, cache=tmp_path, progress=lambda *_: done.append)
    assert sum(done) >= text.n_bytes
    assert {value for value in inside | outside if value in found} == {value for value in inside if held_out(value)}
    assert len(found) == sum(map(held_out, inside)) > 500
    again = [taken_values(config, cache=tmp_path, progress=lambda *_: done.append)]
    monkeypatch.setattr(taken, "_CHUNK", 100)
    monkeypatch.setattr(taken, "_AT_ONCE", 50)
    (file,) = (tmp_path / "splits").glob("*.values-*.npy")
    content = file.read_bytes()
    file.unlink()
    again.append(taken_values(config, cache=tmp_path))
    assert file.read_bytes() == content
    assert {len(one) for one in again} == {len(found)}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "values.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"values.npy is damaged .*; remove it and run again"):
        Taken(tmp_path / "values.npy")
