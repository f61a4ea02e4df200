"""Text up to the first stop string, however it is cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ctxlab.data.tokenizers.until import Until

LETTERS = st.text("ab\n", max_size=12)


@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_is_the_text_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    """A later piece never brings a stop string that begins before one already whole, unless it ends in the same piece."""
    text = "".join(pieces)
    until = Until(iter(pieces), stops)
    said = "".join(until)
    whole = [len(said) + len(stop) for stop in stops if text.startswith(stop, len(said))]
    if until.stopped:
        assert text.startswith(said)
        assert whole
    else:
        assert said == text
    seen = 0  # as far as the piece in which the first stop string is whole
    for piece in pieces:
        seen += len(piece)
        found = [at for stop in stops if (at := text[:seen].find(stop)) >= 0]
        if found:
            assert until.stopped
            assert said == text[: min(found)]
            break
    else:
        assert not until.stopped


def test_hands_on_what_cannot_be_a_stop_string_at_once() -> None:
    asked: list[str] = []

    def pieces():  # type: ignore[no-untyped-def]
        for piece in ("one", " two", "\nQ", "2", "\nQ:", " never"):
            asked.append(piece)
            yield piece

    until = Until(pieces(), ["\nQ:"])
    found = []
    for text in until:
        found.append((text, len(asked)))
    assert found == [("one", 1), (" two", 2), ("\nQ2", 4)]
    assert until.stopped
    assert asked[-1] == "\nQ:"
