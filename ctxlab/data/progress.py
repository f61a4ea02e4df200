"""How long work says how far it is: `start(text, total)` returns `advance(n)`."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int], Callable[[int], None]]


def silent(text: str, total: int) -> Callable[[int], None]:
    """Says nothing."""
    return lambda n: None
