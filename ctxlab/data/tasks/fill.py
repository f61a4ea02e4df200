"""The longest prompt that has room: its cost is added up, one count of the whole says what the sum got wrong."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

_GUIDED = 6  # steps by the sum; what it could not find by then is found by halving


def fill(
    build: Callable[[int], str],
    cost: Callable[[int], float],
    count: Callable[[str], int],
    room: int,
    *,
    least: int,
    most: int,
) -> str | None:
    """Of the texts build(least) ... build(most), the longest of at most `room` tokens; None where there is none.

    `cost(n)` says about how many tokens build(n) has, and never falls. Tokens at a border depend on both its sides, so no
    sum is exact: the text is counted whole, and the search goes on, corrected by the difference, until it fits and
    another unit would not. Every step narrows the bracket (too_short, too_long), so it ends whatever `cost` says.
    """
    found: str | None = None
    below, above, off = least - 1, most + 1, 0.0
    for step in range(most - least + 1):
        guess = least - 1 + bisect_right(range(least, most + 1), room - off, key=cost)
        n = min(max(guess, below + 1), above - 1) if step < _GUIDED else (below + above) // 2
        text = build(n)
        used = count(text)
        off = used - cost(n)
        if used <= room:
            found, below = text, n
            if n == most or cost(n + 1) + off > room:
                break
        else:
            above = n
        if below + 1 >= above:
            break
    return found
