"""Pictures of memory_scaling: how far predictions are off, and how activations grow with and without the matrix of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair

from ctxlab.report.plots import PALETTE, save, scaling_figure, styled

MIB = 2**20


def save_errors(rows: Sequence[Mapping[str, Any]], large: float, path: Path) -> None:
    """Every measured point by its peak: what the prediction is off in MiB, and as a share, of steps of `large` bytes and more.

    0 is what was measured; above it the prediction says too much.
    """
    done = [row for row in rows if row.get("status") == "done"]
    points = [
        {
            "measured": row["measured_bytes"] / MIB,
            "bytes": row["error_bytes"] / MIB,
            "share": 100 * row["error"],
            "policy": row["recompute"],
            "is_large": row["measured_bytes"] >= large,
        }
        for row in done
    ]
    policies = list(dict.fromkeys(point["policy"] for point in points))
    colour = altair.Color(
        "policy:N", scale=altair.Scale(domain=policies, range=list(PALETTE[: len(policies)])),
        legend=altair.Legend(title="recompute", orient="bottom"),
    )  # fmt: skip
    panels = []
    for name, title, shown in (
        ("bytes", "prediction less measurement (MiB)", points),
        ("share", "prediction less measurement (%)", [point for point in points if point["is_large"]]),
    ):
        marks = altair.Chart(altair.Data(values=shown)).mark_point(filled=True, size=55, opacity=0.8).encode(
            x=altair.X(
                "measured:Q", scale=altair.Scale(type="log", base=2, nice=False, padding=12),
                axis=altair.Axis(title="measured peak over the idle process (MiB)", grid=False, format="d"),
            ),
            y=altair.Y(f"{name}:Q", axis=altair.Axis(title=title, gridOpacity=0.5)),
            color=colour,
            shape=altair.Shape("policy:N", scale=altair.Scale(domain=policies), legend=None),
        )  # fmt: skip
        zero = altair.Chart(altair.Data(values=[{"y": 0}])).mark_rule(color="#777777").encode(y="y:Q")
        panels.append(altair.layer(zero, marks).properties(width=380, height=280))
    heading = altair.Title("Memory of a step, predicted and measured", anchor="start", offset=14, fontSize=15)
    save(styled(altair.hconcat(*panels).properties(title=heading)), path)


def save_growth(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Activations by context, both axes logarithmic: attention that keeps its scores, and attention that does not."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if "activation_bytes" in row:
            name = {"naive": "scores kept", "fused": "scores not kept"}[row["attention"]]
            curves.setdefault(name, []).append((row["context"], row["activation_bytes"] / MIB))
    save(scaling_figure([("activations of a step (MiB)", curves)], heading="The matrix of scores"), path)
