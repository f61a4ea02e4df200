"""Classification: which label a text has, by a head on what a model makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ctxlab.data.by_length import Examples
from ctxlab.data.labelled.classification import Classification as LabelledTexts
from ctxlab.data.labelled.questions import QuestionDataset
from ctxlab.data.labelled.texts import LabelDataset
from ctxlab.data.source import Source
from ctxlab.data.windows import Row
from ctxlab.errors import DataError
from ctxlab.fields import OrAuto
from ctxlab.model.config import SizesConfig
from ctxlab.model.heads import LabelHead
from ctxlab.train.objectives.base import OBJECTIVES, Objective


@OBJECTIVES.register("classification")
class Classification(Objective):
    """-ln p(label | text). A row is bos, the text, eos; a text that is too long loses its end.

    An encoder's head reads the first place (Devlin et al. 2019, arXiv:1810.04805, section 4.1), a decoder's the last, which
    has seen all (Radford et al. 2018, section 3.2); either may read the mean over all.
    """

    class Config(Objective.Config):
        name: Literal["classification"] = "classification"
        pooling: OrAuto | Literal["first", "mean", "last"] = Field(
            "auto", description="places that the head reads; auto: an encoder's first, a decoder's last"
        )

    paper = "Devlin et al. 2019, arXiv:1810.04805, section 4.1"
    architectures = ("encoder", "decoder")
    config: Config

    @classmethod
    def why_not(cls, data: type[Source]) -> str:
        return (
            "" if issubclass(data, LabelledTexts) else "it reads labelled texts; use data=classification data.path=FILE"
        )

    def examples(self, dataset: QuestionDataset | LabelDataset, split: str, context: int) -> TextRows:
        assert isinstance(dataset, LabelDataset)
        return TextRows(dataset, split, context)

    def head(self, model: SizesConfig, facts: Mapping[str, Any]) -> LabelHead:
        pooling = self.config.pooling
        if pooling == "auto":
            pooling = "first" if model.architecture == "encoder" else "last"
        return LabelHead(model.d_model, tuple(facts["labels"]), pooling, model.dropout)


class TextRows(Examples):
    """A row a text; `cut` (n,) says which have lost their end."""

    def __init__(self, dataset: LabelDataset, split: str, context: int) -> None:
        self.texts, self.tokenizer = dataset.splits[split], dataset.tokenizer
        if context < 3:
            raise DataError(f"context: {context} tokens leave no room for a text; the nearest valid value is 3")
        self.tokens = np.minimum(self.texts.text.sizes + 2, context)
        self.cut = self.texts.text.sizes + 2 > context
        self.targets = np.ones(self.texts.n, dtype=np.int64)
        self.kept = np.arange(self.texts.n)

    def row(self, index: int) -> Row:
        text = self.texts.text.sentence(index)[: int(self.tokens[index]) - 2]
        tokens = np.concatenate([[self.tokenizer.bos_id], text, [self.tokenizer.eos_id]]).astype(np.int64)
        return Row(tokens, np.array([int(self.texts.label[index])]), ())
