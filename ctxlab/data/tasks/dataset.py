"""A task as training data: rows made when they are read, each a function of its key, and the items of its evaluation."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctxlab.data.corpora.base import Corpus
from ctxlab.data.prepare import TextDataset, prepare
from ctxlab.data.progress import Progress, silent
from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import (
    DoesNotFit,
    Example,
    Part,
    Task,
    TextTask,
    TokenTask,
    Tools,
    generator,
    haystack_corpus,
)
from ctxlab.data.tasks.haystack import CorpusHaystack
from ctxlab.data.tasks.taken import TakenSomewhere, taken_values
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.ids import Ids
from ctxlab.data.windows import IGNORED, MadeRows, Row


@dataclass(frozen=True)
class TaskDataset:
    """A task with what it speaks: its own numbers, or a tokenizer and text to hide things in.

    `learned` are the corpora that a model was trained on which is asked, where they are not that of the text.
    """

    task: Task
    tokenizer: Tokenizer
    facts: dict[str, Any]
    text: TextDataset | None = None
    learned: tuple[Corpus.Config, ...] = ()

    def rows(self, context: int, *, seed: int, packed: bool = False) -> MadeRows:
        """Training rows of one context. Raises DoesNotFit where no example is that short."""

        def make(index: int, epoch: int) -> Row:
            return self.row("train", context, (seed, index, epoch), epoch)

        make(0, 0)
        return MadeRows(self.task.config.examples, make)

    def row(self, part: Part, length: int, key: tuple[int, ...], epoch: int | None) -> Row:
        """One example as inputs and targets; outside of training nothing but the answer is scored."""
        random = generator(self.task.config.name, part, *key)
        if isinstance(self.task, TokenTask):
            return Row(*self.task.row(random, length, epoch), ())
        assert isinstance(self.task, TextTask)
        prompt, answer = self.encoded(self.example(random, length, part))
        ids = np.array([*prompt, *answer, self.tokenizer.eos_id], dtype=np.int64)[: length + 1]
        targets = ids[1:].copy()
        if part != "train" or self.task.config.scored == "answers":
            targets[: len(prompt) - 1] = IGNORED
        return Row(ids[:-1], targets, ())

    def example(self, random: np.random.Generator, length: int, part: Part, *, depth: float | None = None) -> Example:
        """One example of a text task that has room in `length` tokens behind one bos. Raises DoesNotFit."""
        assert isinstance(self.task, TextTask)
        try:
            return self.task.example(random, length - 1, self.tools(part), depth=depth)
        except DoesNotFit as short:
            raise DoesNotFit(short.task, length, short.smallest + 1) from None

    def encoded(self, example: Example) -> tuple[list[int], list[int]]:
        """The ids of a prompt, behind one bos, and of its answers."""
        prompt = [self.tokenizer.bos_id, *self.tokenizer.encode(example.prompt)]
        assert isinstance(self.task, TextTask)
        return prompt, self.tokenizer.encode(self.task.completion(example))

    def tools(self, part: Part) -> Tools:
        """What a text task makes its examples of a part with."""
        assert self.text is not None
        return Tools(
            count=self.tokenizer.count,
            haystack=self._haystacks[part],
            part=part,
            taken=frozenset() if part == "train" else self._taken,
        )

    @functools.cached_property
    def _haystacks(self) -> dict[str, CorpusHaystack]:
        assert self.text is not None
        return {name: CorpusHaystack(split, self.tokenizer) for name, split in self.text.splits.items()}

    @functools.cached_property
    def _taken(self) -> Container[str]:
        """Values in the training text, which no evaluation asks for: found when the first one is made."""
        assert self.text is not None
        own = () if self.text.corpus is None else (self.text.corpus,)
        return TakenSomewhere([taken_values(corpus, cache=self.text.cache) for corpus in self.learned or own])


def prepare_task(
    config: Task.Config,
    tokenizer: Tokenizer.Config | Tokenizer,
    *,
    cache: Path | None = None,
    progress: Progress = silent,
) -> TaskDataset:
    """A task with its numbers as tokens, or with the text that it hides things in and a tokenizer trained on that."""
    task = SOURCES.get(config.name)(config)
    if isinstance(task, TokenTask):
        numbers = Ids(Ids.Config(), task.vocab_size)
        return TaskDataset(task, numbers, _facts(task, numbers, None))
    assert isinstance(task, TextTask)
    text = prepare(haystack_corpus(task.config.haystack).config, tokenizer, cache=cache, progress=progress)
    return TaskDataset(task, text.tokenizer, _facts(task, text.tokenizer, text), text)


def _facts(task: Task, tokenizer: Tokenizer, text: TextDataset | None) -> dict[str, Any]:
    """What a record says of a task: its settings pin its examples, the text's hash pins its haystack."""
    settings = task.config.model_dump(mode="json", exclude={"workers"})
    of_text = "" if text is None else text.facts["text_sha256"]
    digest = hashlib.sha256(json.dumps([settings, of_text], sort_keys=True).encode()).hexdigest()
    return {
        "task": task.config.name,
        "settings": settings,
        "haystack": None if text is None else text.facts,
        "text_sha256": digest,
        "tokenizer": {
            "name": tokenizer.config.name,
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
        },
    }
