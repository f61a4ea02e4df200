"""Text that comes in pieces, up to the first of some stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class Until:
    """The text of `pieces` before the first of `stops`, piece by piece; `stopped` says afterwards whether one was found.

    What may be the beginning of a stop string waits until the next piece decides. Nothing more is asked of `pieces` once one
    is there.
    """

    def __init__(self, pieces: Iterable[str], stops: Sequence[str]) -> None:
        self.pieces, self.stops = pieces, tuple(stops)
        self.stopped = False

    def __iter__(self) -> Iterator[str]:
        held = ""  # said already, and not yet handed on
        for piece in self.pieces:
            held += piece
            found = [at for stop in self.stops if (at := held.find(stop)) >= 0]
            if found:
                self.stopped = True
                held = held[: min(found)]
                break
            safe = len(held) - max((self._begun(held, stop) for stop in self.stops), default=0)
            if safe:
                yield held[:safe]
                held = held[safe:]
        if held:
            yield held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """How many of a text's last characters are the first of a stop string."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
