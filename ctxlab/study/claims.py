"""A README's numbers held to its results: every number under *Findings* is in results/, to the digits that are printed.

A number says where it is by a Markdown link whose title holds words that pick one row of a file, and one row only:

    FoX takes [1.83](results/position_cost.txt "8192 fox time") times as long
    it rises by [0.069](results/tiny-rope-256-sssz.jsonl "nats_per_token 1024 - nats_per_token 256")

A row is a JSON object on a line of a .jsonl or .txt file, or of any of them where the link names the folder. It is picked
when it holds every word: as a field's name or value, in its file's name, or as `name=value`. Of a measurement the number
that picks is its context (an axis is named: `stride=64`). What is held is the field that the last such name says, else a
measurement's `value`, or a row's only number. `±` is half of the interval from FIELD_low to FIELD_high (of `value`: low and
high). Two picks with ` - ` or ` / ` between them are a difference or a ratio of unrounded numbers. MiB or ms are units of
what is recorded in bytes or seconds (by its unit, or by the field's name).

A table says it once, by a link in the paragraph above it. A cell's words are those of the title, of the row's first cell and
of its cell under `run`, and what the column's head says in digits or as `code`.

Not held are: whole numbers that the README states above *Findings*, with the same unit (the study's settings), names with
digits (T5, bf16), and `code` with letters in it (`context=256`).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

from ctxlab.study.readme import Study

_UNITS = {
    "bytes": {"B": Decimal(1), "KiB": Decimal(2**10), "MiB": Decimal(2**20), "GiB": Decimal(2**30)},
    "seconds": {
        "us": Decimal("1e-6"), "ms": Decimal("1e-3"), "s": Decimal(1), "min": Decimal(60), "h": Decimal(3600),
    },
    "": {"": Decimal(1), "%": Decimal("0.01"), "x": Decimal(1), "×": Decimal(1)},
}  # fmt: skip
_KINDS = {"B": "bytes", "s": "seconds", "s/token": "seconds"}  # of a measurement's unit
_NUMBER = re.compile(
    r"(?P<sign>[+\-−])?(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)(?:e(?P<power>[+-]?\d+))?"
    r"(?:\s?(?P<unit>KiB|MiB|GiB|B|us|ms|min|s|h|%|x|×)(?!\w))?(?P<rest>\w*)"
)
_LINK = re.compile(r'(?P<image>!?)\[(?P<text>[^\]]*)\]\(\s*(?P<target>[^)\s]+)(?:\s+"(?P<title>[^"]*)")?\s*\)')
_CODE = re.compile(r"`([^`]*)`")
_OPERATOR = re.compile(r"\s([-−/])\s")
_SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True)
class Number:
    """A number as it is printed."""

    text: str
    value: Decimal
    decimals: int
    unit: str = ""
    is_half: bool = False  # what follows ±

    def prints(self, value: Decimal, kind: str = "") -> bool:
        """Whether a value rounds to exactly these digits; with a unit only where it is of that kind: bytes or seconds."""
        scale = _UNITS[kind].get(self.unit) or _UNITS[""].get(self.unit)
        if scale is None:
            return False
        said, has = (format(each, f".{self.decimals}f") for each in (abs(self.value), abs(value / scale)))
        return said == has and ((value < 0) == (self.value < 0) or not self.value)


@dataclass(frozen=True)
class Claim:
    """A number of a README: on which line, and what it names as its source (none: it is no setting either)."""

    line: int
    number: Number
    target: str = ""
    words: str = ""


@dataclass(frozen=True)
class Row:
    """One JSON object of a file of results, its numbers exact."""

    file: Path
    data: dict[str, Any]

    @cached_property
    def leaves(self) -> list[tuple[str, Any]]:
        """(name, value) of every field, nested ones too."""
        return list(_leaves(self.data))

    @property
    def is_measurement(self) -> bool:
        return {"name", "value", "unit", "context"} <= self.data.keys()

    def has(self, word: str) -> bool:
        """Whether a word of a claim picks this row."""
        name, assigned, value = word.partition("=")
        if assigned:
            return (name, value) in self._assigned
        number = _whole_number(word)
        if number is not None:
            return number.value in self._picking
        return _has_word(self._text, word)

    @cached_property
    def _assigned(self) -> frozenset[tuple[str, str]]:
        return frozenset((name, _plain(value)) for name, value in self.leaves)

    @cached_property
    def _picking(self) -> frozenset[Decimal]:
        """The numbers that pick this row: of a measurement its context."""
        picking = [self.data["context"]] if self.is_measurement else [value for _, value in self.leaves]
        return frozenset(value for value in picking if isinstance(value, Decimal))

    @cached_property
    def _text(self) -> str:
        """Names, texts and the file's name, a line each."""
        texts = [value for _, value in self.leaves if isinstance(value, str)]
        return "\n".join([*texts, *(name for name, value in self.leaves if value is not None), self.file.stem])

    def value(self, words: Sequence[str], *, half: bool) -> tuple[Decimal, str] | None:
        """The number that a claim is about, and whether it is of bytes or of seconds; None where there is none.

        It is that of the field that the words name, else the row's own.
        """
        numeric = {name: value for name, value in self.leaves if isinstance(value, Decimal)}
        own = "value" if self.is_measurement else next(iter(numeric), "") if len(numeric) == 1 else ""
        field = next((word for word in reversed(words) if word in numeric), own)
        kind = next((kind for kind in _UNITS if kind and kind in field), "")
        if field == "value" and self.is_measurement:
            kind = _KINDS.get(self.data["unit"], "")
        if not half:
            return (numeric[field], kind) if field in numeric else None
        low, high = ("low", "high") if field == "value" else (f"{field}_low", f"{field}_high")
        return ((numeric[high] - numeric[low]) / 2, kind) if {low, high} <= numeric.keys() else None


def check(study: Study) -> tuple[int, list[str]]:
    """How many numbers a study's findings hold, and a line for each that its results do not: `README.md:31: ...`."""
    found = claims(study)
    wrong = [f"{study.readme}:{n}: there is no {target}" for n, target in _broken_links(study)]
    rows = {claim.target: list(_rows(study.folder / claim.target)) for claim in found if claim.target}
    for claim in found:
        problem = _problem(claim, rows.get(claim.target, []))
        if problem:
            wrong.append(f"{study.readme}:{claim.line}: {problem}")
    return len(found), wrong


def claims(study: Study) -> list[Claim]:
    """The numbers from a study's findings on, without those that are settings."""
    findings = study.section("Findings")
    if findings is None:
        return []
    above = "\n".join(line for each in study.blocks if each.first < findings.first for line in each.lines)
    settings = {(number.value, number.unit) for number in numbers(above) if not number.decimals}
    found: list[Claim] = []
    source: tuple[str, str] | None = None
    for block in (each for each in study.blocks if each.first >= findings.first):
        for first, lines in _paragraphs(block.first, block.lines):
            if lines[0].lstrip().startswith("|"):
                found += _table(first, lines, source)
                continue
            of_prose, source = _prose(first, " ".join(line.strip() for line in lines))
            found += of_prose
    return [
        each
        for each in found
        if each.target or each.number.decimals or (each.number.value, each.number.unit) not in settings
    ]


def numbers(text: str) -> list[Number]:
    """The numbers of a text, without digits that belong to a name (T5, bf16, GPT-2, tiny-256)."""
    found = []
    for match in _NUMBER.finditer(text):
        before = text[match.start() - 1] if match.start() else " "
        between = before.isdigit() and bool(match["sign"])  # 0.4-2.4: a dash, no sign
        if not between and (before.isalpha() or before in "_." or (before == "-" and not match["sign"])):
            continue
        sign = "" if between else (match["sign"] or "").replace("−", "-")
        digits = match["digits"].replace(",", "")
        value = Decimal(f"{sign}{digits}{'e' + match['power'] if match['power'] else ''}")
        decimals = max(0, len(digits.partition(".")[2]) - int(match["power"] or 0))
        is_half = text[: match.start()].rstrip().endswith("±")
        found.append(Number(match[0].strip(), value, decimals, match["unit"] or match["rest"], is_half))
    return found


def _problem(claim: Claim, rows: Sequence[Row]) -> str:
    """Why a number is not held; nothing where it is."""
    said = claim.number.text
    if not claim.target:
        return f"{said} names no row of results/, and is no whole number stated above Findings"
    parts = _OPERATOR.split(claim.words)
    if len(parts) not in (1, 3):
        return f"{said}: expected one row, or two with - or / between them, got '{claim.words}'"
    values: list[Decimal] = []
    kinds: list[str] = []
    for words in (part.split() for part in parts[::2]):
        picked = [row for row in rows if all(row.has(word) for word in words)]
        if len(picked) != 1:
            return f"{said}: {len(picked) or 'no'} rows of {claim.target} have '{' '.join(words)}'; one is needed"
        found = picked[0].value(words, half=claim.number.is_half)
        if found is None:
            return f"{said}: {claim.target} has no such number at '{' '.join(words)}'; name one of its fields"
        values.append(found[0])
        kinds.append(found[1])
    if len(parts) == 3 and claim.number.is_half:
        return f"{said}: half of an interval is of one row"
    if parts[1:2] == ["/"] and not values[1]:
        return f"{said}: '{claim.words}' divides by zero"
    comes_to = values[0] if len(parts) == 1 else values[0] / values[1] if parts[1] == "/" else values[0] - values[1]
    kind = kinds[0] if parts[1:2] != ["/"] else ""
    held = claim.number.prints(comes_to, kind)
    return (
        ""
        if held
        else f"{said}: {claim.target} has {float(comes_to):.6g}{f' {kind}' if kind else ''} at '{claim.words}'"
    )


def _prose(first: int, text: str) -> tuple[list[Claim], tuple[str, str] | None]:
    """The numbers of a paragraph, and the last row or file of results that it links to."""
    found: list[Claim] = []
    source = None
    rest, at = "", 0
    for link in _LINK.finditer(text):
        rest, at = rest + text[at : link.start()] + " ", link.end()
        if link["image"]:
            continue
        if link["target"].split("/")[0] == "results":
            source = link["target"], link["title"] or ""
            found += [Claim(first, number, *source) for number in numbers(_without_names(link["text"]))]
        else:
            rest += link["text"]
    rest += text[at:]
    return [Claim(first, number) for number in numbers(_without_names(rest))] + found, source


def _table(first: int, lines: Sequence[str], source: tuple[str, str] | None) -> Iterator[Claim]:
    """The numbers of a table's cells, each with the words that pick its row."""
    head, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    named = [n for n, title in enumerate(head) if n == 0 or title.lower() == "run"]
    for below, row in enumerate(rows):
        labels = " ".join(_bare(row[n]) for n in named if n < len(row))
        for n, cell in enumerate(row):
            if n in named:
                continue
            if _LINK.search(cell):
                yield from _prose(first + 2 + below, cell)[0]
                continue
            for number in numbers(_without_names(cell)):
                if source is None:
                    yield Claim(first + 2 + below, number)
                    continue
                sides = _OPERATOR.split(head[n] if n < len(head) else "")
                words = [f"{source[1]} {labels} {_column(side)}" for side in sides[::2]]
                both = f" {sides[1]} ".join(words) if len(sides) == 3 else words[0]
                yield Claim(first + 2 + below, number, source[0], " ".join(both.split()))


def _column(title: str) -> str:
    """The words of a column's head: its numbers, and what it writes as code."""
    code = [word for text in _CODE.findall(title) for word in text.split()]
    return " ".join([*code, *(str(number.value) for number in numbers(_CODE.sub(" ", title)))])


def _bare(cell: str) -> str:
    """A cell's text without its markup."""
    return _LINK.sub(lambda link: link["text"], cell).replace("`", "").replace("*", "")


def _without_names(text: str) -> str:
    """A text without its code, where that has letters: `context=256` is a setting, `3.5` a number."""
    return _CODE.sub(lambda code: " " if any(c.isalpha() for c in code[1]) else code[1], text)


def _paragraphs(first: int, lines: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, lines): paragraphs, list entries and tables."""
    part: list[str] = []
    for number, line in enumerate([*lines, ""], start=first):
        starts = re.match(r"\s*([-*+]|\d+\.)\s", line) or (
            part and line.lstrip().startswith("|") != part[0].lstrip().startswith("|")
        )
        if part and (starts or not line.strip()):
            yield number - len(part), part
            part = []
        if line.strip():
            part.append(re.sub(r"^\s*([-*+]|\d+\.)\s", "", line) if not part else line)


def _broken_links(study: Study) -> Iterator[tuple[int, str]]:
    """(line, target) of each link to a file that is not there."""
    for block in study.blocks:
        for first, lines in _paragraphs(block.first, block.lines):
            for link in _LINK.finditer(" ".join(lines)):
                target = link["target"].partition("#")[0]
                if target and "://" not in target and not (study.folder / target).exists():
                    yield first, link["target"]


def _rows(path: Path) -> Iterator[Row]:
    for file in sorted(path.glob("*")) if path.is_dir() else [path]:
        if file.suffix not in _SUFFIXES or not file.is_file():
            continue
        for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a script prints tables too
                data = json.loads(text, parse_float=Decimal, parse_int=Decimal)
                if isinstance(data, dict):
                    yield Row(file, data)


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    children: Iterable[tuple[str, Any]]
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list):
        children = ((name, each) for each in node)
    else:
        yield name, node
        return
    for key, value in children:
        yield from _leaves(value, key)


def _whole_number(word: str) -> Number | None:
    """The number that a word is, from its first character to its last."""
    found = numbers(word)
    return found[0] if len(found) == 1 and found[0].text == word and not found[0].unit else None


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
