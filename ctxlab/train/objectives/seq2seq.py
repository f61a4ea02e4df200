"""Sequence to sequence: a target is predicted token by token from its source and the tokens before."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ctxlab.data.by_length import Examples
from ctxlab.data.labelled.prompts import Prompts
from ctxlab.data.labelled.questions import QuestionDataset
from ctxlab.data.labelled.squad import Squad
from ctxlab.data.labelled.texts import LabelDataset
from ctxlab.data.pairs.parallel import Parallel
from ctxlab.data.source import Source
from ctxlab.train.objectives.base import OBJECTIVES, Objective


@OBJECTIVES.register("seq2seq")
class SequenceToSequence(Objective):
    """-sum_t ln p(y_t | y_<t, x) over pairs of sentences, or of questions and answers, with label smoothing as in the
    original."""

    class Config(Objective.Config):
        name: Literal["seq2seq"] = "seq2seq"
        label_smoothing: float = Field(
            0.1, ge=0, lt=1, description="share of each target that is spread over all tokens; perplexity never has it"
        )

    paper = "Vaswani et al. 2017, arXiv:1706.03762, sections 3.1 and 5.4"
    architectures = ("encoder_decoder", "bert2bert")

    @classmethod
    def why_not(cls, data: type[Source]) -> str:
        if issubclass(data, Parallel | Squad):
            return ""
        return "it reads pairs; use data=parallel data.path=FILE or data=squad data.path=FILE"

    def examples(self, dataset: QuestionDataset | LabelDataset, split: str, context: int) -> Examples:
        assert isinstance(dataset, QuestionDataset)
        return Prompts(dataset, split, context, apart=True)
