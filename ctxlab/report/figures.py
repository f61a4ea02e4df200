"""What runs come to as figures: quality by context and by scheme, curves of training, costs, answers. Only those with data.

A figure is panels for the eye and a table of the same numbers; a page, the dashboard and a folder of pictures draw the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ctxlab.report.answer_figures import answers, depths
from ctxlab.report.cost_figures import BY_CONTEXT, cost
from ctxlab.report.drawing import ANSWERS, COSTS, QUALITY, TRAINING, Drawing, Figure
from ctxlab.report.groups import AS_IT_IS, Group, View, grouped
from ctxlab.report.quality_figures import by_scheme, extrapolation, positions, quality, ratio, training
from ctxlab.report.subjects import SPLITS, Subject
from ctxlab.report.vega import Colours
from ctxlab.report.ways import ways

SECTIONS = {
    QUALITY: "Quality by context", TRAINING: "Training", COSTS: "What a context costs", ANSWERS: "Answers",
}  # fmt: skip
_COMMANDS = {
    "train": "",
    "eval": ", evaluated again",
    "profile": ", profiled",
    "plan": ", predicted",
    "results": ", of saved results",
}


def figures(subjects: Sequence[Subject], view: View = AS_IT_IS) -> list[Figure]:
    """Every figure that these have data for, in the order in which a page has them."""
    found: list[Figure] = []
    by_command: dict[str, list[Group]] = {}
    for command in _COMMANDS:
        some = [one for one in subjects if one.command == command]
        if some:
            by_command[command] = grouped(some, view)
    known = dict.fromkeys(group.colour for groups in by_command.values() for group in groups)
    colours = Colours(tuple(known))
    for command, groups in by_command.items():
        drawing = Drawing(command, _COMMANDS[command], groups, view, colours)
        found += [figure for figure in _drawn(drawing) if figure is not None]
    order = list(SECTIONS)
    return sorted(found, key=lambda figure: order.index(figure.section))


def save_figures(found: Sequence[Figure], folder: Path) -> list[Path]:
    """Each figure as NAME.svg and NAME.png in a folder that is there."""
    import vl_convert

    paths = []
    for figure in found:
        spec = json.dumps(figure.alone())
        svg, png = folder / f"{figure.name}.svg", folder / f"{figure.name}.png"
        svg.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
        png.write_bytes(vl_convert.vegalite_to_png(spec, scale=2))
        paths += [svg, png]
    return paths


def _drawn(drawing: Drawing) -> Iterator[Figure | None]:
    measurements = [m for group in drawing.groups for one in group.members for m in one.measurements]
    for way in ways([m for m in measurements if m.context]) or [{}]:
        yield quality(drawing, way)
        if not way:
            yield by_scheme(drawing)
            yield extrapolation(drawing)
    yield ratio(drawing)
    yield positions(drawing)
    for split in SPLITS:
        yield training(drawing, split)
    for metric, name, heading, kind in BY_CONTEXT:
        yield cost(drawing, metric, name, heading, kind)
    for task in dict.fromkeys(str(m.axes["task"]) for m in measurements if "task" in m.axes):
        yield answers(drawing, task)
        yield depths(drawing, task)
