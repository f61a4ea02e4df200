"""The contract of an objective: which models it trains, and what of a text they read and answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from ctxlab.data.by_length import Examples
from ctxlab.data.labelled.questions import QuestionDataset
from ctxlab.data.labelled.texts import LabelDataset
from ctxlab.data.prepare import TextDataset
from ctxlab.data.source import Source
from ctxlab.data.tasks.dataset import TaskDataset
from ctxlab.data.windows import Rows
from ctxlab.model.config import SizesConfig
from ctxlab.model.heads import TaskHead
from ctxlab.registry import ComponentConfig, Registry


class Objective(ABC):
    """Makes training rows of what there is to train on. The loss is the same for all: of the targets that a row has, as the
    model's head or the objective's own says them."""

    paper: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    """The models that it trains."""
    prefix: ClassVar[bool] = False
    """Whether the model reads what stands before a row's first target both ways."""
    implies: ClassVar[Mapping[str, str]] = {}
    """group -> the option that a line means by choosing this objective, unless it says otherwise."""

    class Config(ComponentConfig):
        name: str
        label_smoothing: float = Field(
            0.0, ge=0, lt=1, description="share of each target that is spread over all tokens; perplexity never has it"
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def why_not(cls, data: type[Source]) -> str:
        """What speaks against this kind of data; nothing where it can be trained on."""

    def rows(self, dataset: TextDataset | TaskDataset, context: int, *, seed: int, packed: bool) -> Rows:
        """Training rows of one context. Of objectives that read windows or examples."""
        raise NotImplementedError

    def examples(self, dataset: QuestionDataset | LabelDataset, split: str, context: int) -> Examples:
        """The examples of a split, none longer than `context`. Of objectives that read what people have labelled."""
        raise NotImplementedError

    def head(self, model: SizesConfig, facts: Mapping[str, Any]) -> TaskHead | None:
        """What is trained in place of the model's own head, fresh; nothing where that is what says it. `facts`: the dataset's."""
        return None


OBJECTIVES: Registry[Objective] = Registry("objective", "ctxlab.train.objectives")


def objectives_of(architecture: str, data: type[Source]) -> list[str]:
    """The names of the objectives that train an architecture on a kind of data."""
    return [
        name
        for name in OBJECTIVES.names()
        if architecture in OBJECTIVES.get(name).architectures and not OBJECTIVES.get(name).why_not(data)
    ]
