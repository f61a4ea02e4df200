"""The page of what heads attend to: one HTML file that needs nothing else, read by people and drawn by its own script."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files

import numpy as np

from ctxlab.report.attention import COLUMNS, MEANING, NAMES, Axes, Map, Step, number, shown_numbers

_TEMPLATE = "attention_page.html"


def page(
    maps: Sequence[Map],
    axes: Mapping[str, Axes],
    *,
    title: str,
    texts: Sequence[str],
    facts: Sequence[str],
    steps: Sequence[Step] = (),
) -> str:
    """The page of these heads. texts: what was read and written, facts: what else is to be known; a paragraph each.

    Weights are in it as numbers of 16 bits, 65535 being 1: to within 0.00001 of what they are.
    """
    names = shown_numbers(maps)
    data = {
        "title": title,
        "facts": [*texts, *facts],
        "plain": len(texts),
        "scale": "A query a row, a key a column; the colour is the square root of the weight, from 0 to 1.",
        "axes": {kind: {"rows": list(one.rows), "columns": list(one.columns)} for kind, one in axes.items()},
        "columns": [COLUMNS[name].title for name in names],
        "meaning": {name: MEANING[name] for name in names},
        "maps": [
            {
                "kind": one.kind, "name": NAMES[one.kind], "layer": one.layer, "head": one.head,
                "numbers": [number(name, one.numbers.get(name)) for name in names],
                "weights": _packed(one.weights),
            }
            for one in maps
        ],
        "steps": [
            {
                "read": step.read, "chosen": step.chosen, "p": step.p,
                "others": [list(other) for other in step.others], "sources": [list(one) for one in step.sources],
            }
            for step in steps
        ],
    }  # fmt: skip
    template = files("ctxlab.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    before, after = template.split("DATA", 1)
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text may end the element that it is in
    return before.replace("TITLE", html.escape(title)) + text + after


def _packed(weights: np.ndarray) -> str:
    whole = np.round(weights.clip(0, 1) * 65535).astype("<u2")
    return base64.b64encode(whole.tobytes()).decode()
