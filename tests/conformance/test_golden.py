"""Numbers made by other people's code, or from a paper's equation to 40 digits, are what our schemes give (golden/*.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctxlab.model.position.base import POSITIONS, Position
from tests.conformance import reference
from tests.conformance.golden import inputs
from tests.conformance.test_positions import scores
from tests.model.builders import small

TABLES = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "golden").glob("*.json"))}
CASES = [(name, n) for name, table in TABLES.items() for n in range(len(table["cases"]))]
cases = pytest.mark.parametrize(("name", "n"), CASES)


def table_scheme(name: str, case: dict[str, Any]) -> Position:
    """The scheme with the parameters of a table, one layer, in float64."""
    heads = inputs.HEADS
    model = small(d_model=inputs.WIDTH, n_layers=1, n_heads=heads, n_kv_heads=heads, head_dim=inputs.HEAD_DIM)
    kind = POSITIONS.get(name)
    made = kind(kind.Config(name=name, **case["settings"]), model, 64).double()
    parameters = dict(made.named_parameters())
    given = case.get("parameters", {})
    assert parameters.keys() == given.keys()
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(torch.tensor(given[key], dtype=torch.float64).view_as(parameter))
    return made


def rows(case: dict[str, Any], row: Any, positions: Tensor) -> Tensor:
    """Queries or keys (1,H,T,D) at these positions; 0 where a table is of a bias alone."""
    if not case["content"]:
        return torch.zeros(1, inputs.HEADS, len(positions), inputs.HEAD_DIM, dtype=torch.float64)
    found = [[row(h, p) for p in positions.tolist()] for h in range(inputs.HEADS)]
    return torch.tensor(found, dtype=torch.float64)[None]


def by_query(name: str, case: dict[str, Any], made: Position, naive: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each query: scores of the keys that the table has, (H,n), what it says of them, and all scores of the query.

    Every query is the last of its sequence. A scheme of angles is asked at the positions themselves, one of a bias at all
    keys from the first one on.
    """
    found = []
    told = case.get("scores") or case["weights"]
    for n, i in enumerate(case["queries"]):
        wanted = [j for j in case["keys"] if j <= i]
        listed = made.form == "separable"
        at, keys = torch.tensor([i]), torch.tensor(wanted) if listed else torch.arange(i + 1)
        tokens = [inputs.token(p) for p in keys.tolist()] if name == "fox" else torch.zeros(len(keys), inputs.WIDTH)
        x = torch.as_tensor(tokens, dtype=torch.float64)[None]
        q, k = rows(case, inputs.query, at), rows(case, inputs.key, keys)
        with torch.no_grad():
            if naive:
                score = reference.SCORES[name](reference.Place(made, 0, x), q, k, at, keys)
            else:
                score = scores(made, x, q, k, at, keys)
        score = score[0, :, 0]  # (H,S)
        expected = torch.tensor([[s for s in head[n] if s is not None] for head in told], dtype=torch.float64)
        found.append((score if listed else score[:, wanted], expected, score))
    return found


@cases
@pytest.mark.parametrize("naive", [False, True], ids=["hooks", "reference"])
def test_equals_the_table(name: str, n: int, naive: bool) -> None:
    """So do the hooks, and so does the naive reference that all other tests compare with."""
    case = TABLES[name]["cases"][n]
    made = table_scheme(name, case)
    for score, expected, everything in by_query(name, case, made, naive):
        if "weights" in case:
            score = (score - everything.logsumexp(-1, keepdim=True)).exp()
        torch.testing.assert_close(score, expected, atol=1e-10, rtol=1e-11)


@pytest.mark.parametrize("name", TABLES)
def test_says_where_it_is_from(name: str) -> None:
    table = TABLES[name]
    assert table["scheme"] == name
    assert table["source"]
    assert table["paper"] in POSITIONS.get(name).paper
    assert table["inputs"] == inputs.FORMULAS
