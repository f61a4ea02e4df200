"""What heads attend to, drawn: shades by the weight, every head within any width, a page that holds its numbers and no more."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ctxlab.report.attention import (
    ASCII_SHADES,
    SHADES,
    Axes,
    Map,
    Maps,
    Step,
    figure,
    heads_table,
    picture_side,
    side,
    steps_table,
)
from ctxlab.report.attention_page import page
from ctxlab.report.plots import save

WEIGHTS = np.array([[1.0, 0.0, 0.0], [0.64, 0.36, 0.0], [0.16, 0.04, 0.039]])
NUMBERS = {"entropy": 1.5, "distance": 2.0, "previous": 0.25, "first": 0.5, "induction": None, "sink": None}


THREE = Axes("abc", "abc")


def head(number: int, layer: int = 1, kind: str = "self", weights: np.ndarray = WEIGHTS) -> Map:
    return Map(kind, layer, number, weights, NUMBERS)


def drawn(width: int, *, encoding: str = "utf-8", heads: int = 1, axes: Axes = THREE) -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    n = len(axes.rows), len(axes.columns)
    maps = [head(one + 1, weights=WEIGHTS if n == (3, 3) else np.zeros(n)) for one in range(heads)]
    Console(file=file, width=width, color_system=None).print(Maps(maps, {"self": axes}))
    file.seek(0)
    return file.read().splitlines()


@pytest.mark.parametrize(("encoding", "shades"), [("utf-8", SHADES), ("ascii", ASCII_SHADES)])
def test_a_shade_says_how_much_a_weight_is(encoding: str, shades: str) -> None:
    _, light, middle, dark, full = shades
    lines = drawn(80, encoding=encoding)
    assert lines[0].endswith(f"{light} from 4%, {middle} from 16%, {dark} from 36%, {full} from 64%")
    assert lines[-3:] == [f"1 a {full * 2}", f"2 b {full * 2}{dark * 2}", f"3 c {middle * 2}{light * 2}"]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_every_head_is_there_and_no_line_is_wider_than_the_terminal(width: int) -> None:
    many = Axes(["a token of many words"] * side(width), ["x"] * side(width))
    for axes, heads in ((Axes("abc", "abc"), 12), (many, 3)):
        lines = drawn(width, heads=heads, axes=axes)
        assert max(map(len, lines[1:])) <= width
        titles = [int(n) for line in lines for n in re.findall(r"head (\d+)", line)]
        assert titles == list(range(1, heads + 1))


def test_columns_are_numbered_at_their_places() -> None:
    for n, cell in ((12, 2), (40, 1)):
        lines = drawn(12 * 2 + 6 if n == 12 else 50, axes=Axes(["a"] * n, ["b"] * n))
        ruler = next(line for line in lines if line.split()[:2] == ["1", "5"])
        margin = len(f"{n} a ")
        for number in (5, 10):
            assert ruler[: margin + number * cell].endswith(str(number))


def test_too_many_heads_are_not_drawn_one_by_one() -> None:
    lines = drawn(80, heads=200, axes=Axes(["a"] * 40, ["b"] * 40))
    assert lines == ["(200 heads: too many to draw here; layers=[1] heads=[1,2] draws some)"]


def test_numbers_that_no_head_has_are_left_out() -> None:
    table = heads_table([head(1), head(2, layer=3)])
    assert table.titles == ["attention", "layer", "head", "entropy (nats)", "distance (tokens)", "previous", "first"]
    assert table.rows[1] == ["self", "3", "2", "1.50", "2.0", "0.25", "0.50"]


STEP = Step("<s>", "I", 0.625, [("We", 0.125)], [("Je", 0.5), ("</s>", 0.25)])


def test_a_row_a_step() -> None:
    assert steps_table([STEP]).rows == [["1", "<s>", "I", "0.625", "We 0.125", "Je 0.50  </s> 0.25"]]


def test_the_page_holds_every_weight_and_needs_nothing_else() -> None:
    axes = {"self": Axes(["</script>", "<b>", "&"], ["x", "y", "z"])}
    text = page([head(1), head(2)], axes, title="a <run>", texts=["text: </script><i>"], facts=["a fact"], steps=[STEP])
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    data = json.loads(found[0])
    assert data["axes"]["self"]["rows"] == ["</script>", "<b>", "&"]
    assert (data["facts"], data["plain"]) == (["text: </script><i>", "a fact"], 1)
    for one in data["maps"]:
        values = np.frombuffer(base64.b64decode(one["weights"]), dtype="<u2").reshape(3, 3) / 65535
        np.testing.assert_allclose(values, WEIGHTS, atol=0.5 / 65535 + 1e-12)
        assert one["numbers"] == ["1.50", "2.0", "0.25", "0.50"]
    assert data["steps"][0]["sources"] == [["Je", 0.5], ["</s>", 0.25]]
    assert text.count("</script>") == 2  # of the data and of the script: no text ends one
    assert "<title>a &lt;run&gt;</title>" in text
    assert not re.findall(r"""(?:src|href|url\(|import|fetch)\s*[=(]?\s*["']?(?:https?:)?//""", text)


def test_a_picture_has_the_colour_of_each_weight(tmp_path: Path) -> None:
    """A head of one weight of 1 in four has a quarter of its map in the darkest colour."""
    weights = np.array([[1.0, 0.0], [0.0, 0.0]])
    save(figure([head(1, weights=weights)], {"self": Axes("ab", "ab")}, heading="one"), tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as picture:
        drawn = {colour: n for n, colour in picture.convert("RGB").getcolors(maxcolors=10**6)}
    quarter = (2 * 420 / 2) ** 2
    assert 0.95 * quarter <= drawn[0x00, 0x26, 0x3D] <= 1.05 * quarter


@pytest.mark.parametrize("n_maps", [1, 16, 144, 2000])
def test_a_picture_has_a_bound(n_maps: int) -> None:
    assert 8 <= picture_side(n_maps) <= 64
    assert n_maps * picture_side(n_maps) ** 2 <= max(40_000, 64 * n_maps)
