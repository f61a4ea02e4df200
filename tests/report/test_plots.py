"""Figures: what they draw, and that they are what their endings say."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

from PIL import Image

from ctxlab.report.plots import PALETTE, loss_curves, loss_figure, save_loss_by_length, training_chart
from tests.records.builders import make_run, scores
from tests.report.builders import CONTEXTS, CURVES, text_of, trained_run


def layers(curves: dict[str, list[tuple[int, float]]], trained: list[int]) -> list[dict[str, Any]]:
    spec = loss_figure(curves, trained, heading="test")
    drawn: list[dict[str, Any]] = spec.to_dict()["layer"]
    return drawn


def values(layer: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = layer["data"]["values"]
    return rows


def test_every_point_is_drawn_and_the_trained_length_marked() -> None:
    curves = {name: list(zip(CONTEXTS, nats, strict=False)) for name, nats in CURVES.items()}
    rule, text, line, *_ = layers(curves, [256, 1 << 20])
    drawn = {(row["curve"], row["context"], row["nats"]) for row in values(line)}
    assert drawn == {(name, c, v) for name, points in curves.items() for c, v in points}
    assert [row["context"] for row in values(rule)] == [256]  # the other lies beyond the axis
    assert values(text)[0]["text"] == "trained"
    x = line["encoding"]["x"]
    assert (x["scale"]["type"], x["axis"]["values"]) == ("log", list(CONTEXTS))


def test_names_at_the_ends_do_not_run_into_each_other() -> None:
    curves = {f"run {n}": [(256, 3.0), (512, 3.5 + n / 1000)] for n in range(12)}
    places = [row["label"] for row in values(layers(curves, [256])[-1])]
    low, high = layers(curves, [256])[-1]["encoding"]["y"]["scale"]["domain"]
    gap = (high - low) * 15 / 340
    assert all(b - a >= gap * 0.999 for a, b in itertools.pairwise(places))
    assert low <= places[0]
    assert places[-1] <= high


def test_a_curve_that_ends_early_says_where() -> None:
    curves = {name: list(zip(CONTEXTS, nats, strict=False)) for name, nats in CURVES.items()}
    assert {row["text"] for row in values(layers(curves, [256])[-1])} == {"rope", "alibi", "learned (to 256)"}


def test_colours_of_neighbours_differ_in_lightness_for_those_who_see_no_hue() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    # WCAG's contrast against the white paper: a line has to be seen at all.
    assert all(1.05 / (luminance(colour) + 0.05) > 2.0 for colour in PALETTE)
    assert len(set(PALETTE)) == len(PALETTE)


def test_png_and_svg(tmp_path: Path) -> None:
    runs = [trained_run(tmp_path / "runs", name) for name in CURVES]
    png = save_loss_by_length(runs, tmp_path / "figure.png")
    assert png is not None
    with Image.open(io.BytesIO(png.read_bytes())) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
    assert {tuple(int(c[n : n + 2], 16) for n in (1, 3, 5)) for c in PALETTE[:3]} <= colours
    svg = save_loss_by_length(runs, tmp_path / "figure.svg")
    assert svg is not None
    text = svg.read_text()
    assert text.startswith("<svg")
    assert all(name in text for name in CURVES)


def test_no_curve_is_no_figure(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", status="waiting")
    run.measure(*scores(256, 3.0))
    assert loss_curves([run]) == {}
    assert save_loss_by_length([run], tmp_path / "figure.png") is None
    assert not (tmp_path / "figure.png").exists()


def test_loss_by_tokens() -> None:
    rows = [{"split": "train", "tokens": 1000 * n, "loss": 7.0 - n} for n in range(5)]
    rows += [{"split": "validation", "tokens": 4000, "loss": None}]
    chart = training_chart(rows)
    assert chart is not None
    text = text_of(chart).splitlines()
    assert text[0] == "loss by tokens seen (nats/token)"
    assert text[-1].split() == ["0", "1k", "2k", "3k", "4k"]
    assert training_chart(rows[:1]) is None
