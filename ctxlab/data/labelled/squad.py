"""Questions about passages, in SQuAD's JSON: what a file says, record by record, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from ctxlab.data.files import FileSource
from ctxlab.data.labelled.json_stream import entries
from ctxlab.data.progress import Progress
from ctxlab.data.source import SOURCES, Source
from ctxlab.errors import DataError
from ctxlab.fields import OrNone


class Answer(NamedTuple):
    """An answer and where in its passage it begins, in characters."""

    text: str
    start: int


class Asked(NamedTuple):
    """A question; without answers where the passage has none."""

    id: str
    text: str
    answers: tuple[Answer, ...]


class Passage(NamedTuple):
    """A passage of an article and what is asked of it."""

    article: str
    text: str
    questions: tuple[Asked, ...]


@SOURCES.register("squad")
class Squad(FileSource):
    """Articles of passages with questions whose answers stand in them (Rajpurkar et al. 2016, arXiv:1606.05250), or do not
    (Rajpurkar, Jia and Liang 2018, arXiv:1806.03822)."""

    source = "your own questions in SQuAD's JSON (.gz): data.path=PATH"
    implies: ClassVar[Mapping[str, str]] = {"eval": "[qa]", "objective": "extractive"}
    scored_by = "qa"
    where_from = (
        "a file of questions in SQuAD's JSON, version 1.1 or 2.0 (.json, .json.gz), e.g. train-v1.1.json of SQuAD"
    )
    file_settings = ("path", "test_path")

    class Config(Source.Config):
        name: Literal["squad"] = "squad"
        path: OrNone | str = Field("none", description="a file in SQuAD's JSON, 1.1 or 2.0")
        test_path: OrNone | str = Field(
            "none", description="the questions to be tested on, in a file apart; else held out"
        )
        held_out_by: Literal["article", "passage"] = Field(
            "article", description="none of these is both trained on and held out"
        )

    config: Config

    def fetch(self, cache: Path, progress: Progress) -> None:
        self.require_files()
        for key in self.files:
            next(self.passages(key), None)  # says what is wrong with the first article

    def passages(self, key: str) -> Iterator[Passage]:
        """The passages of a file in its order. Raises DataError at the first record that is none."""
        file = self.files[key]
        for number, (line, article) in enumerate(entries(file, "data", f"data.{key}"), start=1):
            where = f"data.{key}: article {number} of {file} (line {line})"
            title = _field(article, "title", str, where, default=f"article {number}")
            for place, paragraph in enumerate(_field(article, "paragraphs", list, where), start=1):
                yield _passage(paragraph, title, f"{where}, paragraph {place}")

    def unit(self, passage: Passage) -> str:
        """What is trained on or held out as a whole."""
        return passage.article if self.config.held_out_by == "article" else passage.text


def _passage(paragraph: Any, title: str, where: str) -> Passage:
    text = _field(paragraph, "context", str, where)
    if not text.strip():
        raise DataError(f"{where}: its context is empty")
    asked = [
        _asked(question, text, f"{where}, question {place}")
        for place, question in enumerate(_field(paragraph, "qas", list, where), start=1)
    ]
    return Passage(title, text, tuple(asked))


def _asked(question: Any, passage: str, where: str) -> Asked:
    """A question of a passage; one that version 2.0 calls impossible has no answers, only plausible ones."""
    text = _field(question, "question", str, where)
    if not text.strip():
        raise DataError(f"{where} is empty")
    known = str(question.get("id", ""))
    if _field(question, "is_impossible", bool, where, default=False):
        return Asked(known, text, ())
    answers = []
    for answer in _field(question, "answers", list, where):
        said, start = _field(answer, "text", str, where), _field(answer, "answer_start", int, where)
        if start < 0 or passage[start : start + len(said)] != said:
            there = passage[max(start, 0) : max(start, 0) + len(said)]
            raise DataError(
                f"{where}: the answer {said!r} does not stand at answer_start {start} of the context ({there!r})"
            )
        if not said.strip():
            raise DataError(f"{where} has an empty answer")
        answers.append(Answer(said, start))
    if not answers:
        raise DataError(f"{where} has no answers; one that the passage does not answer has is_impossible: true")
    return Asked(known, text, tuple(answers))


def _field(record: Any, name: str, kind: type, where: str, default: Any = None) -> Any:
    """What a record holds under a name. Raises DataError where it is no object, lacks it, or holds something else there."""
    if not isinstance(record, dict):
        raise DataError(f"{where} is no object but {type(record).__name__}")
    value = record.get(name, default)
    if value is None:
        raise DataError(f"{where} has no '{name}'")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DataError(f"{where}: '{name}' is {type(value).__name__}, not {kind.__name__}")
    return value
