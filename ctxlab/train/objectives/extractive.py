"""Extractive question answering: an encoder points at the first and the last token of the answer in a passage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ctxlab.data.by_length import Examples
from ctxlab.data.labelled.questions import NONE, QuestionDataset
from ctxlab.data.labelled.squad import Squad
from ctxlab.data.labelled.texts import LabelDataset
from ctxlab.data.source import Source
from ctxlab.data.windows import Row
from ctxlab.errors import DataError
from ctxlab.fields import Length, OrAuto
from ctxlab.model.config import SizesConfig
from ctxlab.model.heads import SpanHead
from ctxlab.train.objectives.base import OBJECTIVES, Objective


@OBJECTIVES.register("extractive")
class Extractive(Objective):
    """-(ln p(start) + ln p(end)) / 2 over the places of a row: bos, the question, eos, a segment of the passage, eos.

    Devlin et al. 2019, arXiv:1810.04805, sections 4.2 and 4.3, with bos for [CLS] and eos for [SEP]. A passage that is longer
    than the room is cut in segments that overlap; where one does not hold the answer, or there is none, both ends are at bos.
    """

    class Config(Objective.Config):
        name: Literal["extractive"] = "extractive"
        max_question: int = Field(64, ge=1, description="tokens of a question, at most: what is more is not read")
        stride: OrAuto | Length = Field(
            "auto", description="tokens from one segment of a long passage to the next; auto: half of the room"
        )

    paper = "Devlin et al. 2019, arXiv:1810.04805, section 4.2"
    architectures = ("encoder",)
    config: Config

    @classmethod
    def why_not(cls, data: type[Source]) -> str:
        return "" if issubclass(data, Squad) else "it reads questions; use data=squad data.path=FILE"

    def examples(self, dataset: QuestionDataset | LabelDataset, split: str, context: int) -> Segments:
        assert isinstance(dataset, QuestionDataset)
        return Segments(self.config, dataset, split, context)

    def head(self, model: SizesConfig, facts: Mapping[str, Any]) -> SpanHead:
        return SpanHead(model.d_model)


class Segments(Examples):
    """The rows of all questions. Row i is of question `question[i]`, whose passage it reads from token `first[i]` on.

    Raises DataError where a context has no room for a passage.
    """

    def __init__(self, config: Extractive.Config, dataset: QuestionDataset, split: str, context: int) -> None:
        self.questions, self.tokenizer = dataset.splits[split], dataset.tokenizer
        asked = np.minimum(self.questions.question.sizes, config.max_question)
        rooms = context - asked - 3
        if len(rooms) and rooms.min() < 1:
            raise DataError(
                f"context: {context} tokens leave no room beside a question of {int(asked.max())}; the nearest valid value is "
                f"{int(asked.max()) + 4}, or a smaller objective.max_question"
            )
        strides = np.maximum(rooms // 2, 1) if config.stride == "auto" else np.minimum(rooms, config.stride)
        sizes = self.questions.passage.sizes[self.questions.about]
        counts = 1 + -(-np.maximum(sizes - rooms, 0) // strides)
        self.question = np.repeat(np.arange(self.questions.n), counts)
        number = np.arange(len(self.question)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.first = number * strides[self.question]
        self.width = np.minimum(rooms[self.question], sizes[self.question] - self.first)
        self.front = asked[self.question] + 2  # where the segment begins in its row
        self.tokens = self.front + self.width + 1
        self.targets = np.full(len(self.question), 2)
        self.kept = np.arange(len(self.question))

    def row(self, index: int) -> Row:
        question, first, width = int(self.question[index]), int(self.first[index]), int(self.width[index])
        front = int(self.front[index])
        asked = self.questions.question.sentence(question)[: front - 2]
        passage = self.questions.tokens_of_passage(question)[first : first + width]
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        tokens = np.concatenate([[bos], asked, [eos], passage, [eos]]).astype(np.int64)
        start, end = (int(place) for place in self.questions.spans[question])
        holds = start != NONE and first <= start and end < first + width
        targets = np.array([start, end]) - first + front if holds else np.zeros(2, dtype=np.int64)
        return Row(tokens, targets, ())
