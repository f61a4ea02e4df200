"""The inputs of the golden tables: formulas in plain Python, the same for whoever makes a table and whoever is held to it."""

from __future__ import annotations

import math

HEADS, HEAD_DIM, WIDTH = 2, 8, 16
FORMULAS = (
    "2 heads h, 8 columns c a head, 16 columns c of x, positions p, all from 0: "
    "q[h,p,c] = 2 sin(0.37 (h+1)(p+1) + 1.3 c c), k[h,p,c] = 2 cos(0.53 (h+1)(p+2) + 0.7 c c), "
    "x[p,c] = sin(0.29 (p+1)(c+1)). Scores are [head][query][key]; null: the key lies ahead of the query."
)


def query(head: int, position: int) -> list[float]:
    return [2 * math.sin(0.37 * (head + 1) * (position + 1) + 1.3 * c * c) for c in range(HEAD_DIM)]


def key(head: int, position: int) -> list[float]:
    return [2 * math.cos(0.53 * (head + 1) * (position + 2) + 0.7 * c * c) for c in range(HEAD_DIM)]


def token(position: int) -> list[float]:
    """What queries and keys would be projected from; schemes that read it get it as it is."""
    return [math.sin(0.29 * (position + 1) * (c + 1)) for c in range(WIDTH)]
