"""The entries of a long list inside a JSON file, one at a time: no more of the file is held than the longest entry takes."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctxlab.data.corpora.text import opened
from ctxlab.errors import DataError

_BLOCK = 1 << 20  # characters read at once
_BLANK = " \t\r\n"
_ENDS = tuple(",:]}" + _BLANK)
_LONGEST = 8  # characters of a number's exponent


def entries(file: Path, field: str, key: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of each entry of the list that the file's object holds under `field`; what else it holds is passed over.

    Raises DataError, one line that begins with the setting `key` and says the file and the line, where the file is no such
    JSON.
    """
    try:
        with opened(file) as raw:
            yield from _Reader(io.TextIOWrapper(raw, encoding="utf-8-sig"), file, key).entries(field)
    except UnicodeDecodeError as error:
        raise DataError(f"{key}: {file} is not UTF-8 text ({error.reason})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{key}: {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error


class _Reader:
    """A text that is parsed from its front while more of it comes behind."""

    def __init__(self, stream: io.TextIOWrapper, file: Path, key: str) -> None:
        self.stream, self.file, self.key = stream, file, key
        self.text, self.at = "", 0
        self.counted, self.line = 0, 1  # up to where lines are counted, and the line there
        self.ended = False
        self.decoder = json.JSONDecoder()

    def entries(self, field: str) -> Iterator[tuple[int, Any]]:
        self._demand("{")
        found = False
        while self._next() != "}":
            name = self._value()
            self._demand(":")
            if name == field and self._next() == "[":
                found = True
                self.at += 1
                while self._next() != "]":
                    line = self._line()
                    yield line, self._value()
                    if self._next() == ",":
                        self.at += 1
                    elif self._next() != "]":
                        raise self._wrong("expected ',' or ']'")
                self.at += 1
            else:
                self._value()
            if self._next() == ",":
                self.at += 1
            elif self._next() != "}":
                raise self._wrong("expected ',' or '}'")
        if not found:
            raise DataError(f"{self.key}: {self.file} has no list '{field}'")

    def _more(self) -> bool:
        """Reads on, as much again as is held, so that a long entry is not begun anew at every block; lets go of what is done."""
        self._line()
        rest = self.text[self.at :]
        block = self.stream.read(max(_BLOCK, len(rest)))
        self.text, self.at, self.counted = rest + block, 0, 0
        self.ended = not block
        return not self.ended

    def _line(self) -> int:
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.line

    def _next(self) -> str:
        """The next character that is not blank; it is not passed."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _BLANK:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                raise self._wrong("it ends too early")

    def _demand(self, character: str) -> None:
        if self._next() != character:
            raise self._wrong(f"expected '{character}'")
        self.at += 1

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
                behind = self.text[end : end + _LONGEST]  # a number at the end of what is held may go on: 12|34, 3e|5
                if self.ended or behind[:1] in _ENDS or len(behind) == _LONGEST:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                if self.ended:
                    self.at = min(error.pos, len(self.text))
                    raise self._wrong(error.msg) from error
            except RecursionError as error:
                raise self._wrong("its lists are too deep") from error
            self._more()

    def _wrong(self, what: str) -> DataError:
        return DataError(f"{self.key}: {self.file} is no JSON at line {self._line()}: {what}")
