"""Language modelling: every token is predicted from those before it."""

from __future__ import annotations

from typing import Literal

from ctxlab.data.by_length import Examples
from ctxlab.data.labelled.classification import Classification
from ctxlab.data.labelled.prompts import Prompts
from ctxlab.data.labelled.questions import QuestionDataset
from ctxlab.data.labelled.texts import LabelDataset
from ctxlab.data.pairs.parallel import Parallel
from ctxlab.data.prepare import TextDataset
from ctxlab.data.source import Source
from ctxlab.data.tasks.dataset import TaskDataset
from ctxlab.data.windows import Rows
from ctxlab.train.objectives.base import OBJECTIVES, Objective


@OBJECTIVES.register("causal")
class Causal(Objective):
    """-sum_t ln p(x_t | x_<t) over windows of a text, or the examples of a task. Of questions, over the answers alone."""

    class Config(Objective.Config):
        name: Literal["causal"] = "causal"

    paper = "Bengio et al. 2003, JMLR 3:1137"
    architectures = ("decoder", "lstm")

    @classmethod
    def why_not(cls, data: type[Source]) -> str:
        if issubclass(data, Classification):
            return "labels are chosen; use objective=classification"
        return "pairs are translated; use objective=seq2seq" if issubclass(data, Parallel) else ""

    def rows(self, dataset: TextDataset | TaskDataset, context: int, *, seed: int, packed: bool) -> Rows:
        return dataset.rows(context, seed=seed, packed=packed)

    def examples(self, dataset: QuestionDataset | LabelDataset, split: str, context: int) -> Examples:
        assert isinstance(dataset, QuestionDataset)
        return Prompts(dataset, split, context, apart=False)
