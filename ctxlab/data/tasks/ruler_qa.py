"""RULER's two question answering tasks, over documents of a file that the user brings: SQuAD and HotpotQA.

Template, counts and metric are those of NVIDIA/RULER (Hsieh et al. 2024, arXiv:2404.06654), scripts/data/synthetic/qa.py,
qa_1 and qa_2 of scripts/synthetic.yaml.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from ctxlab.data.progress import Progress
from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import DoesNotFit, Example, Part, TextTask, Tools, generator
from ctxlab.data.tasks.fill import fill
from ctxlab.data.tasks.ruler_niah import PAPER
from ctxlab.data.tasks.values import may_be_asked
from ctxlab.errors import DataError

ASKED = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
TEMPLATE = f"{ASKED}\n\nThe following are given documents.\n\n{{context}}\n\n{ASKED}\n\nQuestion: {{query}} Answer:"
_TRIES = 100
_LARGEST = 32  # of the documents with the most characters, one has the most tokens


class Question(NamedTuple):
    """A question, its answers, and the numbers of documents: those that answer it, and others of the same article."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...]


class Questions(NamedTuple):
    """What a file holds."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]


class QuestionAnswering(TextTask):
    """The documents that answer a question between as many others as there is room for, in any order; those of the same
    article come first. One question in four is for evaluations (`base.held_out`), the others are trained on.
    """

    source = "RULER, Hsieh et al. 2024, and a file of yours"
    paper = PAPER
    match = "part"
    new_tokens = 32

    class Config(TextTask.Config):
        path: str = Field("", description="the file of questions")

    config: Config
    reads: ClassVar[str]
    """What the file is, for who has none."""

    @staticmethod
    @abstractmethod
    def parse(content: Any) -> Questions:
        """The questions of a file's JSON. Raises KeyError, TypeError or ValueError where it is another one's."""

    def fetch(self, cache: Path, progress: Progress) -> None:
        super().fetch(cache, progress)
        assert self.file.questions

    @cached_property
    def file(self) -> Questions:
        """What is read from the user's file. Raises DataError, one line, where it is absent or another one's."""
        name = self.config.name.removeprefix("task/")
        if not self.config.path:
            raise DataError(f"data.path: {name} asks about {self.reads}, and no file is given: data.path=FILE.json")
        try:
            found = self.parse(json.loads(Path(self.config.path).expanduser().read_text(encoding="utf-8")))
        except OSError as error:
            raise DataError(
                f"data.path: {self.config.path}: {error.strerror}; {name} asks about {self.reads}"
            ) from error
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"data.path: {self.config.path} is not {self.reads}") from error
        if not all(
            any(may_be_asked(question.text, part) for question in found.questions) for part in ("train", "test")
        ):
            raise DataError(
                f"data.path: {self.config.path} has {len(found.questions)} questions, too few for training and test"
            )
        return found

    def smallest(self, tools: Tools) -> int:
        if tools.count not in self._largest:
            size = [len(document) for document in self.file.documents]
            order = sorted(self.file.questions, key=lambda question: -sum(size[index] for index in question.gold))
            prompts = [self._prompt(question, question.gold) for question in order[:_LARGEST]]
            self._largest[tools.count] = max(map(tools.count, prompts))
        return self._largest[tools.count] + self.new_tokens

    def example(self, random: np.random.Generator, length: int, tools: Tools, *, depth: float | None = None) -> Example:
        room = self.room(length, tools)
        questions = self._asked[tools.part]
        for _ in range(_TRIES):  # one that is short in characters may still have the most tokens of all
            question = questions[random.integers(len(questions))]
            prompt = self._filled(random, question, room, tools)
            if prompt is not None:
                return Example(prompt, question.answers)
        raise DoesNotFit(self.config.name, length, length + 1)

    def guess(self, length: int, tools: Tools) -> float:
        """The share of the questions that the answer which is right most often is right for."""
        questions = self._asked[tools.part]
        answers = Counter(answer for question in questions for answer in {text.lower() for text in question.answers})
        return answers.most_common(1)[0][1] / len(questions)

    def solve(self, prompt: str) -> str:
        """The oracle has read the file: it knows the answer of a question whose documents are all there."""
        query = prompt.rpartition("\n\nQuestion: ")[2].removesuffix(" Answer:")
        for question in self.file.questions:
            if question.text == query and all(self.file.documents[index] in prompt for index in question.gold):
                return question.answers[0]
        return ""

    @cached_property
    def _asked(self) -> dict[Part, list[Question]]:
        parts: tuple[Part, ...] = ("train", "validation", "test")
        return {part: [one for one in self.file.questions if may_be_asked(one.text, part)] for part in parts}

    @cached_property
    def _largest(self) -> dict[Callable[[str], int], int]:
        return {}

    def _filled(self, random: np.random.Generator, question: Question, room: int, tools: Tools) -> str | None:
        seed = int(random.integers(1 << 62))
        chosen = list(question.gold)
        left = room - tools.count(self._prompt(question, chosen))
        sizes = [0]
        for index in self._others(random, question):
            chosen.append(index)
            sizes.append(tools.count(f"Document {len(chosen)}:\n{self.file.documents[index]}\n\n"))
            left -= sizes[-1]
            if left < 0:
                break
        sums, least = list(accumulate(sizes)), len(question.gold)
        return fill(
            lambda n: self._prompt(question, generator(seed, n).permutation(chosen[:n]).tolist()),
            lambda n: sums[n - least], tools.count, room, least=least, most=len(chosen),
        )  # fmt: skip

    def _others(self, random: np.random.Generator, question: Question) -> Iterator[int]:
        """Documents that do not answer it, those of the same article first; all of them again where they are too few."""
        yield from random.permutation(question.related).tolist()
        seen = {*question.gold, *question.related}
        while len(seen) < len(self.file.documents):
            yield from (index for index in random.permutation(len(self.file.documents)).tolist() if index not in seen)
            seen = set(question.gold)

    def _prompt(self, question: Question, documents: Any) -> str:
        texts = (f"Document {number}:\n{self.file.documents[index]}" for number, index in enumerate(documents, 1))
        return TEMPLATE.format(context="\n\n".join(texts), query=question.text)


@SOURCES.register("task/ruler/qa_1")
class Squad(QuestionAnswering):
    """SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822): one paragraph answers the question."""

    class Config(QuestionAnswering.Config):
        name: Literal["task/ruler/qa_1"] = "task/ruler/qa_1"

    reads = "SQuAD (dev-v1.1.json or dev-v2.0.json of rajpurkar.github.io/SQuAD-explorer)"

    @staticmethod
    def parse(content: Any) -> Questions:
        articles = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in content["data"]]
        documents, number = _numbered(text for texts in articles for text in texts)
        questions = []
        for article, texts in zip(content["data"], articles, strict=True):
            for paragraph in article["paragraphs"]:
                gold = number[paragraph["context"]]
                related = tuple(sorted({number[text] for text in texts} - {gold}))
                for asked in paragraph["qas"]:
                    if not asked.get("is_impossible", False):
                        answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                        questions.append(Question(asked["question"].strip(), answers, (gold,), related))
        return Questions(documents, tuple(questions))


@SOURCES.register("task/ruler/qa_2")
class HotpotQA(QuestionAnswering):
    """HotpotQA (Yang et al. 2018, arXiv:1809.09600): two of ten paragraphs answer it together, and all ten are there."""

    class Config(QuestionAnswering.Config):
        name: Literal["task/ruler/qa_2"] = "task/ruler/qa_2"

    reads = "HotpotQA (hotpot_dev_distractor_v1.json of hotpotqa.github.io)"

    @staticmethod
    def parse(content: Any) -> Questions:
        articles = [[f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]] for asked in content]
        documents, number = _numbered(text for texts in articles for text in texts)
        questions = [
            Question(asked["question"].strip(), (asked["answer"],), tuple({number[text]: None for text in texts}), ())
            for asked, texts in zip(content, articles, strict=True)
        ]
        return Questions(documents, tuple(questions))


def _numbered(texts: Iterator[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Every document once, in alphabetical order, and the number of each."""
    documents = tuple(sorted(set(texts)))
    return documents, {text: index for index, text in enumerate(documents)}
