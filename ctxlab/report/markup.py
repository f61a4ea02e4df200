"""HTML that cannot be broken by what stands in it: text is escaped wherever it is not itself made here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_EMPTY = ("br", "img", "input", "meta")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, *children: str | None, **attributes: str | bool | None) -> Html:
    """An element. A trailing `_` of an attribute's name is dropped, other `_` become `-`; False and None leave one out."""
    said = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = key.rstrip("_").replace("_", "-")
        said.append(word if value is True else f'{word}="{html.escape(str(value), quote=True)}"')
    head = " ".join([name, *said])
    if name in _EMPTY:
        return Html(f"<{head}>")
    return Html(f"<{head}>{join(children)}</{name}>")


def join(parts: Iterable[str | None], between: str = "") -> Html:
    """Parts one after another, those that are None left out."""
    return Html(between.join(_safe(part) for part in parts if part is not None))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, name: str, keys: int = 1) -> Html:
    """A table of text that scrolls by itself where it is wider than the page. The first `keys` columns are words."""

    def line(cells: Sequence[str], kind: str) -> Html:
        return tag(
            "tr",
            *(tag("th" if kind == "th" or n == 0 else "td", cell, class_="word" if n < keys else None,
                  scope="col" if kind == "th" else "row" if n == 0 else None)
              for n, cell in enumerate(cells)),
        )  # fmt: skip

    body = tag("table", tag("thead", line(head, "th")), tag("tbody", *(line(row, "td") for row in rows)))
    return tag("div", body, class_="wide", tabindex="0", role="region", aria_label=name)


def cell(text: str, value: float | None = None) -> Html:
    """A cell of a long table, and the number that it is sorted by."""
    return Html(
        f"<td>{html.escape(text)}</td>" if value is None else f'<td data-v="{value!r}">{html.escape(text)}</td>'
    )


def _safe(text: str) -> str:
    return text if isinstance(text, Html) else html.escape(text, quote=False)
