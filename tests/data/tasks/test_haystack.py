"""Text to hide things in: whole units of the corpus, from every place of it, never more tokens than asked for."""

from __future__ import annotations

import numpy as np
import pytest

from ctxlab.data.tasks.base import generator
from ctxlab.data.tasks.fill import fill
from ctxlab.data.tasks.haystack import LONGEST, CorpusHaystack, insert, place, units
from ctxlab.errors import DataError
from tests.data.builders import prose, trained
from tests.data.tasks.tools import TEXTS, haystack, split_of

PLAY = "**LEAR**  \nBlow, winds! and crack. Rage, blow!\n\nYou 3.5 cataracts and\nhurricanoes spout  "
CHINESE = "天地玄黄。宇宙洪荒！\n日月盈昃" + "辰" * 400


def test_units_end_with_sentences_and_lines() -> None:
    assert units(PLAY) == [
        "**LEAR**  \n", "Blow, winds! ", "and crack. ", "Rage, blow!\n\n", "You 3.5 cataracts and\n", "hurricanoes spout  ",
    ]  # fmt: skip
    assert units(CHINESE)[:2] == ["天地玄黄。", "宇宙洪荒！\n"]
    assert units("") == []


@pytest.mark.parametrize(
    "text", [PLAY, CHINESE, prose(5, 60), "x" * 1000, "a " * 500, "\n\n\n", " ", "\n.a", "e. \n \n b"]
)
def test_units_are_the_text_and_none_is_long(text: str) -> None:
    assert "".join(units(text)) == text
    assert all(0 < len(unit.rstrip()) <= LONGEST for unit in units(text) if unit.strip())


def test_a_needle_stands_behind_the_nearest_end_of_a_sentence() -> None:
    pieces = units(PLAY)
    lengths = np.cumsum([0, *map(len, pieces)])
    for share in np.linspace(0, 1, 41):
        allowed = [0, 2, 3, 4, len(pieces)]  # not between the lines of one sentence, nor behind a name
        distances = [abs(lengths[n] - share * lengths[-1]) for n in allowed]
        assert place(pieces, share) == allowed[int(np.argmin(distances))]


def test_what_is_put_in_stands_on_the_line_before_unless_that_has_ended() -> None:
    pieces = ["One. ", "Two.\n\n", "Three."]
    assert insert(pieces, ["A.", "B."], [1, 2]) == "One. A. Two.\n\nB.\nThree."
    assert insert(pieces, ["A."], [0]) == "A. One. Two.\n\nThree."
    assert insert(pieces, ["A."], [3]) == "One. Two.\n\nThree. A."
    assert insert(pieces, ["A.", "B.", "C."], [2, 0, 2]) == "B. One. Two.\n\nC.\nA.\nThree."


@pytest.mark.parametrize("kind", ["byte", "unigram", "bpe"])
def test_text_is_whole_units_of_the_corpus_and_almost_as_long_as_asked_for(kind: str) -> None:
    joined = " ".join(" ".join([*TEXTS, *TEXTS]).split())
    longest = max(trained(kind).count(unit) for text in TEXTS for unit in units(text))
    for seed in range(200):
        asked = int(generator("asked", seed).integers(80, 1200))
        text = haystack(kind).text(generator(seed), asked)
        # a piece that begins with a space is another one at the beginning of a text
        assert asked - longest - 2 <= trained(kind).count(text) <= asked + 2
        found = joined.find(" ".join(text.split()))
        assert found >= 0
        assert not found or joined[found - 2] == "."


def test_text_goes_on_behind_the_last_document_and_comes_round() -> None:
    text = haystack("byte").text(generator(1), 3 * len(haystack("byte").split.tokens))
    assert all(text.count(whole) >= 2 for whole in TEXTS)


def test_every_place_of_a_corpus_comes_up() -> None:
    many = [haystack("byte").text(generator(seed), 300) for seed in range(1500)]
    sentences = {unit.strip() for text in many for unit in units(text)}
    everything = {unit.strip() for text in TEXTS for unit in units(text)}
    assert sentences <= everything
    assert len(sentences) > 0.95 * len(everything)


def test_a_text_without_ends_is_cut_between_words_and_half_a_character_is_left_out() -> None:
    for text in ("word " * 2000, "\u4e2d" * 2000, "x" * 5000):
        hay = CorpusHaystack(split_of([text], trained("byte")), trained("byte"))
        for seed in range(40):
            found = hay.text(generator(seed), 400)
            assert 400 - 3 * LONGEST <= len(found.encode()) <= 400
            assert found in text * 2 or "\n" in found


def test_what_has_no_room_for_one_sentence_is_its_first_words() -> None:
    for seed in range(50):
        text = haystack("byte").text(generator(seed), 12)
        assert 0 < len(text) <= 12
        assert any(text in whole for whole in TEXTS)


def test_a_split_without_text_is_refused() -> None:
    with pytest.raises(DataError, match="no text in the test split"):
        CorpusHaystack(split_of(["", ""], trained("byte")), trained("byte"))


@pytest.mark.parametrize("slope", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("offset", [-40, 0, 40])
def test_fill_finds_the_longest_that_fits_whatever_the_sum_says(slope: float, offset: int) -> None:
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return len(text)

    for room in (1, 7, 99, 1000, 5000):
        counted.clear()
        found = fill(lambda n: "x" * (7 * n), lambda n: slope * 7 * n + offset, count, room, least=1, most=500)
        longest = min(room // 7, 500)
        if not longest:
            assert found is None
        elif slope == 1.0:
            assert found is not None
            assert len(found) == 7 * longest
            assert len(counted) <= 3
        else:
            assert found is not None
            assert len(found) <= room
            assert len(found) > min(room, 3500) - 7 * max(1, slope, 1 / slope) - 7
        assert len(counted) <= 16
