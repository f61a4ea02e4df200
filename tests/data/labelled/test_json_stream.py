"""A list inside a JSON file, entry by entry: what json.loads finds, wherever the file is cut; and what is wrong, in one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from ctxlab.data.labelled import json_stream
from ctxlab.data.labelled.json_stream import entries
from ctxlab.errors import DataError

ENTRIES = [
    {"a": [1, 2.5, -3e2], "é": 'quote " and \\ and \n'},
    1234567,
    "text",
    None,
    [],
    {"deep": {"er": [{}]}},
    True,
    0.5,
]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_it_finds_what_the_whole_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    file = tmp_path / "a.json"
    text = json.dumps(
        {"version": 12, "x": {"data": [9]}, "data": ENTRIES, "z": [1, 2]}, indent=indent, ensure_ascii=False
    )
    file.write_text(text, encoding="utf-8")
    with gzip.open(tmp_path / "a.json.gz", "wt", encoding="utf-8") as packed:
        packed.write(text)
    for path in (file, tmp_path / "a.json.gz"):
        found = list(entries(path, "data", "data.path"))
        assert [value for _, value in found] == ENTRIES
    at = next(n for n, line in enumerate(text.split("\n"), start=1) if '"a": [' in line)
    assert found[0][0] == (1 if indent is None else at - 1)  # an entry begins with its bracket
    assert found[0][0] <= found[-1][0] <= text.count("\n") + 1


def test_an_empty_list_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"data": []}')
    assert list(entries(tmp_path / "a.json", "data", "data.path")) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "no JSON at line 1: expected '{'"),
        ('{"version": 1}', "has no list 'data'"),
        ('{"data": {"a": 1}}', "has no list 'data'"),
        ('{"data": [1,\n2', "no JSON at line 2: it ends too early"),
        ('{"data": [1,\n\n{"a": }]}', "no JSON at line 3: Expecting value"),
        ('{"data": [1 2]}', "no JSON at line 1: expected ',' or ']'"),
        ("", "it ends too early"),
        ("questions\tanswers", "expected '{'"),
    ],
)
def test_what_is_no_such_json_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError) as error:
        list(entries(tmp_path / "a.json", "data", "data.path"))
    assert str(error.value).startswith("data.path: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"data": ["\xff\xfe"]}')
    with pytest.raises(DataError, match="is not UTF-8 text"):
        list(entries(tmp_path / "a.json", "data", "data.path"))
