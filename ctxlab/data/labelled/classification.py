"""Texts with a label each, out of a file of columns with tabs between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from ctxlab.data.files import FileSource
from ctxlab.data.pairs.parallel import file_lines
from ctxlab.data.progress import Progress
from ctxlab.data.source import SOURCES, Source
from ctxlab.errors import DataError
from ctxlab.fields import OrNone


class Labelled(NamedTuple):
    """A text and the name of its label."""

    text: str
    label: str


@SOURCES.register("classification")
class Classification(FileSource):
    """Labelled texts: what a text is said to be, by the words of a label."""

    source = "your own labelled texts, .tsv (.gz): data.path=PATH"
    implies: ClassVar[Mapping[str, str]] = {"eval": "[classification]", "objective": "classification"}
    scored_by = "classification"
    where_from = "a file of texts with labels, one a line with a tab between (.tsv, .txt, .gz)"
    file_settings = ("path", "test_path")

    class Config(Source.Config):
        name: Literal["classification"] = "classification"
        path: OrNone | str = Field("none", description="a file of texts and labels, one a line with a tab between")
        test_path: OrNone | str = Field("none", description="the texts to be tested on, in a file apart; else held out")
        text_column: int = Field(1, ge=1, description="which column is the text")
        label_column: int = Field(2, ge=1, description="which column is the label")
        header: bool = Field(False, description="the first line names the columns and is no example")

    config: Config

    def fetch(self, cache: Path, progress: Progress) -> None:
        self.require_files()
        if self.config.text_column == self.config.label_column:
            raise DataError(f"data.label_column: column {self.config.label_column} is the text's own")
        for key in self.files:
            next(self.examples(key), None)  # says what is wrong with the first line

    def examples(self, key: str) -> Iterator[Labelled]:
        """The examples of a file in its order. Raises DataError at a line that is none."""
        file, config = self.files[key], self.config
        text, label = config.text_column - 1, config.label_column - 1
        for number, line in enumerate(file_lines(key, file), start=1):
            if not line.strip() or (number == 1 and config.header):
                continue
            columns = line.split("\t")
            where = f"data.{key}: line {number} of {file}"
            if len(columns) <= max(text, label):
                raise DataError(
                    f"{where} has {len(columns)} column{'s' * (len(columns) > 1)} between tabs, and column "
                    f"{max(text, label) + 1} is asked for"
                )
            found = Labelled(columns[text].strip(), columns[label].strip())
            if not found.text or not found.label:
                raise DataError(f"{where} has no {'text' if found.label else 'label'}")
            yield found
