"""What dividing by sqrt(d_k) does to a softmax at initialisation: queries and keys of independent numbers of mean 0 and
variance 1, as the footnote of Vaswani et al. 2017 (arXiv:1706.03762, section 3.2.1) has them.

    s_ij = c q_i . k_j,  Var s_ij = c^2 d_k,  p_i = softmax_j s_ij over 64 keys,  o_i = sum_j p_ij v_j,  c = 1 or 1 / sqrt(d_k)

A row is a width, with or without the division: means over seeds, each with the 95% interval of Student's t.

    python experiments/why_scale/saturation.py
"""

from __future__ import annotations

import json
from pathlib import Path

import altair
import torch
from torch import Tensor

from ctxlab.report.plots import PALETTE, save, styled
from ctxlab.study.script import mean, results_folder

WIDTHS, SEEDS = (4, 8, 16, 32, 64, 128, 256, 512), (1, 2, 3)
SETS, QUERIES, KEYS = 64, 64, 64
WAYS = {"scaled": "divided by sqrt(d_k)", "plain": "not divided"}


def measure(width: int, way: str, seed: int) -> dict[str, float]:
    """One seed's numbers over its 64 sets of 64 queries.

    entropy: -sum_j p_ij ln p_ij in nats (ln 64 = 4.159 where all keys have the same), largest: max_j p_ij, means.
    saturated: share of queries with one weight above 0.99.
    jacobian: ||dp_i / ds_i||, Frobenius, of dp_j / ds_k = p_j (delta_jk - p_k), mean and median: the root of the mean square
    norm of a gradient with respect to a query's scores, when that with respect to its weights has variance 1.
    gradient: || d(u_i . o_i) / dq_i ||, u_i of variance 1 / d_k, median: what of it a query gets, through c and its keys.
    """
    random = torch.Generator().manual_seed(seed)
    q, k, v, u = (
        torch.randn(SETS, n, width, generator=random, dtype=torch.float64) for n in (QUERIES, KEYS, KEYS, QUERIES)
    )
    q.requires_grad_(True)
    scores = q @ k.mT * (width**-0.5 if way == "scaled" else 1.0)
    p = scores.softmax(-1)
    gradient = torch.autograd.grad((u * width**-0.5 * (p @ v)).sum(), q)[0].norm(dim=-1)
    with torch.no_grad():
        squares = p.square()
        others = (squares.sum(-1).square() - squares.square().sum(-1)).clamp(
            min=0
        )  # of j != k; rounding can be below 0
        jacobian = ((squares * (1 - p).square()).sum(-1) + others).sqrt()
        found: dict[str, Tensor] = {
            "variance": scores.var(),
            "entropy": torch.special.entr(p).sum(-1).mean(),
            "largest": p.amax(-1).mean(),
            "saturated": (p.amax(-1) > 0.99).double().mean(),
            "jacobian": jacobian.mean(),
            "jacobian_median": jacobian.median(),
            "gradient_median": gradient.median(),
        }
    return {name: float(value) for name, value in found.items()}


def main() -> None:
    rows = []
    for way in WAYS:
        for width in WIDTHS:
            seeds = [measure(width, way, seed) for seed in SEEDS]
            row: dict[str, object] = {"scores": way, "d_k": width, "expected_variance": 1 if way == "scaled" else width}
            for name in seeds[0]:
                row |= mean([one[name] for one in seeds], name)
            rows.append(row)
            print(json.dumps(row), flush=True)
    draw(rows, results_folder("why_scale") / "saturation.png")


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """The largest weight and what the softmax lets through, by width."""
    colour = altair.Color(
        "way:N", title=None, scale=altair.Scale(domain=list(WAYS.values()), range=list(PALETTE[:2])),
        legend=altair.Legend(orient="bottom"),
    )  # fmt: skip
    panels = []
    for name, title in (
        ("largest", "largest of 64 weights"),
        ("jacobian_median", "norm of the softmax's Jacobian, median"),
    ):
        points = [{"d_k": row["d_k"], "way": WAYS[str(row["scores"])], "value": row[name]} for row in rows]
        base = altair.Chart(altair.Data(values=points)).encode(
            x=altair.X(
                "d_k:Q", scale=altair.Scale(type="log", base=2), axis=altair.Axis(values=list(WIDTHS), title="d_k")
            ),
            y=altair.Y("value:Q", scale=altair.Scale(domainMin=0), axis=altair.Axis(title=title, gridOpacity=0.5)),
            color=colour,
        )
        panels.append((base.mark_line() + base.mark_point(filled=True, size=50)).properties(width=300, height=240))
    heading = "Random queries and keys of variance 1: softmax with and without the division"
    save(styled(altair.hconcat(*panels).properties(title=heading)), path)


if __name__ == "__main__":
    main()
