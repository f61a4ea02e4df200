"""Curves by context, from records alone: in the terminal, and as PNG or SVG without a browser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctxlab.records.run import Run
from ctxlab.records.schema import Measurement
from ctxlab.report.results import labels, way_of
from ctxlab.report.terminal import MOST, Chart
from ctxlab.units import format_bytes, format_count, format_length, format_seconds

Curves = Mapping[str, Sequence[tuple[int, float]]]
Band = tuple[int, float, float]  # context, low, high

# Okabe and Ito's colours, told apart by colour-blind readers; yellow, too light for a line on white, is left out.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")  # one fewer: pairs differ longer
_WIDTH, _HEIGHT = 560, 340  # pixels of the plot itself, before the scale of a PNG
_LABEL_PIXELS = 15  # room that a curve's name needs


def curve(measurements: Sequence[Measurement], metric: str) -> list[tuple[int, float]]:
    """(context, value) of a metric where it has one, contexts in order."""
    points = {
        m.context: m.value for m in measurements if m.name == metric and m.context is not None and not way_of(m.axes)
    }
    return sorted((context, value) for context, value in points.items() if value is not None)


def loss_curves(runs: Sequence[Run]) -> dict[str, list[tuple[int, float]]]:
    """What tells a run from the others -> its curve of nats per token by context, for runs with at least two points."""
    curves = {name: curve(run.measurements(), "nats_per_token") for name, run in zip(labels(runs), runs, strict=True)}
    return {name: points for name, points in curves.items() if len(points) > 1}


def loss_chart(curves: Curves, *, trained: int | None, height: int = 12) -> Chart | None:
    """nats per token by context in the terminal; None where there is no curve."""
    return _by_context("nats/token by context", curves, trained, height=height)


def position_chart(curves: Curves, *, trained: int | None, height: int = 12) -> Chart | None:
    """nats per token by index in the terminal, each bin at its last index; None where there is no curve."""
    drawn = {name: points for name, points in curves.items() if len(points) > 1}
    if not drawn:
        return None
    last = max(index for points in drawn.values() for index, _ in points)
    return Chart(
        "nats/token by tokens seen in the window",
        drawn,
        x_ticks=[2**k for k in range(last.bit_length())],
        x_name=lambda x: format_length(int(x)),
        y_name=lambda y: f"{y:g}",
        at=trained if trained is not None and trained <= last else None,
        height=height,
    )


def memory_chart(measurements: Sequence[Measurement], *, trained: int | None, height: int = 12) -> Chart | None:
    """Peak memory of a training step by context in the terminal, on a log axis; None where there is no curve."""
    points = curve(measurements, "peak_memory_bytes")
    curves = {"memory": points} if len(points) > 1 else {}
    return _by_context("memory of a training step by context", curves, trained, height=height, is_bytes=True)


def time_chart(measurements: Sequence[Measurement], *, height: int = 12) -> Chart | None:
    """Seconds of a training step by context in the terminal, on a log axis; None where there is no curve."""
    points = curve(measurements, "step_seconds")
    curves = {"time": points} if len(points) > 1 else {}
    return _by_context(
        "time of a training step by context", curves, None, height=height, y_name=format_seconds, log_y=True
    )


def training_chart(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Loss by tokens seen in the terminal, as it was logged; None before the second row."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for split in ("train", "validation"):
        points = [(row["tokens"], row["loss"]) for row in rows if row.get("split") == split and _has_point(row)]
        if len(points) > 1:
            curves[split] = points
    if not curves:
        return None
    last = max(x for points in curves.values() for x, _ in points)
    return Chart(
        "loss by tokens seen (nats/token)",
        curves,
        x_ticks=[last * part / 4 for part in range(5)],
        x_name=format_count,
        y_name=lambda y: f"{y:g}",
        log_x=False,
    )


def _has_point(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("tokens"), int) and isinstance(row.get("loss"), float)


def _by_context(
    heading: str,
    curves: Curves,
    trained: int | None,
    *,
    height: int,
    is_bytes: bool = False,
    log_y: bool = False,
    y_name: Callable[[float], str] = lambda y: f"{y:g}",
) -> Chart | None:
    contexts = sorted({context for points in curves.values() for context, _ in points})
    if not contexts:
        return None
    return Chart(
        heading,
        curves,
        x_ticks=contexts,
        x_name=lambda x: format_length(int(x)),
        y_name=format_bytes if is_bytes else y_name,
        log_y=is_bytes or log_y,
        binary_y=is_bytes,
        at=trained if trained in contexts else None,
        height=height,
    )


def distance_chart(heading: str, curves: Curves) -> Chart:
    """Scores by distance in the terminal, one curve a head."""
    far = max(distance for points in curves.values() for distance, _ in points)
    some = dict(list(curves.items())[:: -(-len(curves) // MOST)])  # as many as can be told apart, evenly chosen
    return Chart(
        heading,
        some,
        x_ticks=[round(far * part / 4) for part in range(5)],
        x_name=lambda x: format_length(int(x)),
        y_name=lambda y: f"{y:g}",
        log_x=False,
        at=None,
    )


def distance_figure(curves: Curves, *, heading: str) -> Any:
    """Scores by distance as a picture: a line a head, from light to dark."""
    import altair

    rows = [{"head": n, "distance": d, "score": v} for n, points in curves.items() for d, v in points]
    names = list(curves)
    colour = altair.Color(
        "head:N", sort=names, legend=altair.Legend(title=None) if len(names) > 1 else None,
        scale=altair.Scale(domain=names, scheme="viridis" if len(names) > len(PALETTE) else "tableau10"),
    )  # fmt: skip
    chart = altair.Chart(altair.Data(values=rows)).mark_line(strokeWidth=2).encode(
        x=altair.X("distance:Q", axis=altair.Axis(title="distance from query to key (tokens)", grid=False)),
        y=altair.Y("score:Q", axis=altair.Axis(title="score, against distance 0", gridOpacity=0.5)),
        color=colour,
    )  # fmt: skip
    return styled(chart.properties(width=_WIDTH, height=_HEIGHT, title=_title(heading)))


def save_loss_by_length(runs: Sequence[Run], path: Path) -> Path | None:
    """The curves of loss by length of some runs as PNG or SVG, by the ending of `path`; None when no run has one."""
    curves = loss_curves(runs)
    if not curves:
        return None
    first = runs[0].record
    name = first.name if len(runs) == 1 else first.experiment or (first.sweep.id if first.sweep else first.command)
    save(loss_figure(curves, trained_contexts(runs), heading=f"{name}: test loss by context"), path)
    return path


def trained_contexts(runs: Sequence[Run]) -> list[int]:
    """The contexts that runs were trained at, in order."""
    found = {run.record.config.get("context") for run in runs}
    return sorted(context for context in found if isinstance(context, int))


def loss_figure(
    curves: Curves, trained: Sequence[int], *, heading: str, bands: Mapping[str, Sequence[Band]] | None = None
) -> Any:
    """nats per token over context on a log axis: each curve named at its end, the trained lengths marked.

    `bands` are intervals about the curves of the same names.
    """
    import altair

    rows = [{"curve": n, "context": c, "nats": v} for n, points in curves.items() for c, v in points]
    contexts = sorted({context for points in curves.values() for context, _ in points})
    around = [(name, *band) for name, spans in (bands or {}).items() for band in spans]
    values = [value for points in curves.values() for _, value in points]
    values += [end for _, _, *ends in around for end in ends]
    lowest, highest = min(values), max(values)
    room = max(0.02, 0.08 * (highest - lowest))
    low, high = lowest - room, highest + room
    many = len(curves) > 1

    x = altair.X(
        "context:Q",
        scale=altair.Scale(type="log", base=2, domain=[contexts[0] * 0.93, contexts[-1] * 1.07], nice=False),
        axis=altair.Axis(values=contexts, title="context (tokens, log scale)", format="d", grid=False),
    )
    y_scale = altair.Scale(domain=[low, high], nice=False, zero=False)
    y = altair.Y("nats:Q", scale=y_scale, axis=altair.Axis(title="test loss (nats/token)", gridOpacity=0.5))
    names = list(curves)
    colour = altair.Color("curve:N", scale=altair.Scale(domain=names, range=_cycled(PALETTE, len(names))), legend=None)
    shape = altair.Shape("curve:N", scale=altair.Scale(domain=names, range=_cycled(_SHAPES, len(names))), legend=None)
    lines = altair.Chart(altair.Data(values=rows)).encode(x=x, y=y, color=colour)

    marks = [{"context": c, "text": "trained"} for c in trained if contexts[0] <= c <= contexts[-1]]
    rule = altair.Chart(altair.Data(values=marks)).encode(x="context:Q")
    layers = [
        rule.mark_rule(strokeDash=[4, 4], color="#777777"),
        rule.mark_text(align="center", baseline="bottom", dy=-4, color="#555555").encode(
            text="text:N", y=altair.value(0)
        ),
        lines.mark_line(strokeWidth=2),
        lines.mark_point(filled=True, size=55, opacity=1).encode(shape=shape),
    ]
    if around:
        named = [{"curve": n, "context": c, "low": bottom, "high": top} for n, c, bottom, top in around]
        spans = altair.Chart(altair.Data(values=named)).encode(
            x=x, y=altair.Y("low:Q", scale=y_scale), y2="high:Q", color=colour
        )
        layers.insert(0, spans.mark_area(opacity=0.18))
    if many:
        ends = _ends(curves, low, high, contexts[-1])
        at_end = altair.Chart(altair.Data(values=ends)).encode(
            x=altair.value(_WIDTH), y=altair.Y("label:Q", scale=y_scale), color=colour
        )
        layers.append(at_end.mark_text(align="left", dx=8, fontSize=13).encode(text="text:N"))
    return styled(altair.layer(*layers).properties(width=_WIDTH, height=_HEIGHT, title=_title(heading)))


def scaling_figure(panels: Sequence[tuple[str, Curves]], *, heading: str) -> Any:
    """Panels side by side, (title of the vertical axis, curves by context), all axes logarithmic, one legend."""
    import altair

    names = list(dict.fromkeys(name for _, curves in panels for name in curves))
    colours = altair.Scale(domain=names, range=_cycled(PALETTE, len(names)))
    shapes = altair.Scale(domain=names, range=_cycled(_SHAPES, len(names)))
    legend = altair.Legend(title=None, orient="bottom") if len(names) > 1 else None
    drawn = []
    for axis, curves in panels:
        contexts = sorted({context for points in curves.values() for context, _ in points})
        values = [value for points in curves.values() for _, value in points]
        rows = [{"curve": n, "context": c, "value": v} for n, points in curves.items() for c, v in points]
        x = altair.X(
            "context:Q",
            scale=altair.Scale(type="log", base=2, domain=[contexts[0] * 0.9, contexts[-1] * 1.1], nice=False),
            axis=altair.Axis(values=contexts, title="context (tokens)", format="d", grid=False),
        )
        y = altair.Y(
            "value:Q",
            scale=altair.Scale(type="log", domain=[min(values) / 1.2, max(values) * 1.2], nice=False),
            axis=altair.Axis(title=axis, gridOpacity=0.5, format="~g", tickCount=5),
        )
        lines = altair.Chart(altair.Data(values=rows)).encode(
            x=x, y=y, color=altair.Color("curve:N", scale=colours, legend=legend)
        )
        points = lines.mark_point(filled=True, size=55, opacity=1).encode(
            shape=altair.Shape("curve:N", scale=shapes, legend=legend)
        )
        drawn.append(altair.layer(lines.mark_line(strokeWidth=2), points).properties(width=380, height=280))
    return styled(altair.hconcat(*drawn).properties(title=_title(heading)))


def _title(heading: str) -> Any:
    import altair

    return altair.Title(heading, anchor="start", offset=14, fontSize=15)


def styled(chart: Any) -> Any:
    """One look for every figure."""
    return (
        chart.configure_view(stroke=None)
        .configure_axis(labelFontSize=12, titleFontSize=13, titleFontWeight="normal", titlePadding=10)
        .configure(padding={"left": 10, "top": 10, "right": 20, "bottom": 10}, background="white")
    )


def save(chart: Any, path: Path) -> None:
    """Writes a chart as PNG or SVG, by the ending of `path`."""
    import vl_convert

    spec = chart.to_json()
    if path.suffix == ".svg":
        path.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
    else:
        path.write_bytes(vl_convert.vegalite_to_png(spec, scale=2))


def _cycled(values: Sequence[str], count: int) -> list[str]:
    return [values[n % len(values)] for n in range(count)]


def _ends(curves: Curves, low: float, high: float, last: int) -> list[dict[str, Any]]:
    """Where the curves' names stand: at their ends, pushed apart; a curve that ends early says where."""
    gap = (high - low) * _LABEL_PIXELS / _HEIGHT
    placed: list[dict[str, Any]] = []
    for name, points in sorted(curves.items(), key=lambda item: item[1][-1][1]):
        context, value = points[-1]
        label = max(value, placed[-1]["label"] + gap) if placed else max(value, low + gap / 2)
        text = name if context == last else f"{name} (to {format_length(context)})"
        placed.append({"curve": name, "text": text, "label": label})
    top = high - gap / 2
    for end in reversed(placed):  # what ran over the top moves the others down
        end["label"] = min(end["label"], top)
        top = end["label"] - gap
    return placed
