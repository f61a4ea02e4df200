"""Questions to be answered in words: the prompt, and the answer behind it or in a decoder of its own."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ctxlab.data.by_length import Examples
from ctxlab.data.labelled.questions import NONE, QuestionDataset
from ctxlab.data.windows import IGNORED, Row
from ctxlab.errors import DataError


class Prompts(Examples):
    """ "question: ... context: ..." and an answer that is scored, with eos behind it; no answer is eos alone.

    The format is that of Raffel et al. 2020, arXiv:1910.10683, appendix D.15. `apart`: an encoder reads the prompt and a
    decoder writes the answer; otherwise " answer:" stands between them in one text. A passage that is too long loses its end;
    questions whose answer stands there are not trained on, since they could only be guessed. So does a question that leaves
    such a passage less than a quarter of the room. `rooms` (n,): tokens that each passage has.
    """

    def __init__(self, dataset: QuestionDataset, split: str, context: int, *, apart: bool) -> None:
        self.questions, self.tokenizer, self.context, self.apart = (
            dataset.splits[split],
            dataset.tokenizer,
            context,
            apart,
        )
        encode = dataset.tokenizer.encode
        self._front = [*([] if apart else [self.tokenizer.bos_id]), *encode("question: ")]
        self._middle = encode(" context: ")
        self._end = [self.tokenizer.eos_id] if apart else encode(" answer:")
        answer = self.questions.answer.sizes
        passage = self.questions.passage.sizes[self.questions.about]
        room = self.room - (0 if apart else answer)
        asked = _cut_question(self.questions.question.sizes, passage, room)
        self.rooms = room - asked
        read = np.minimum(passage, np.maximum(self.rooms, 0))
        self.targets = answer + 1
        self.tokens = context - self.room + asked + read + (answer + 1 if apart else answer)

    @functools.cached_property
    def kept(self) -> np.ndarray:  # type: ignore[override]
        """Raises DataError where there is none: nothing can be learned of them, but they can be asked."""
        last = self.questions.spans[:, 1]
        fits = (self.rooms > 0) & ((last < self.rooms) | (last == NONE))
        if self.apart:
            fits &= self.targets <= self.context
        kept = np.flatnonzero(fits)
        if not len(kept):
            raise DataError(
                f"context: no answer of the {self.questions.name} split stands within {self.context} tokens of a prompt"
            )
        return kept

    @property
    def room(self) -> int:
        """Tokens that question, passage and, behind them, the answer have."""
        return self.context - len(self._front) - len(self._middle) - len(self._end)

    def prompt(self, index: int, answer: int) -> tuple[list[int], bool]:
        """What is read before an answer of so many tokens, and whether it is cut to fit."""
        asked = self.questions.question.sentence(index).tolist()
        passage = self.questions.tokens_of_passage(index).tolist()
        room = self.room - (0 if self.apart else answer)
        first = int(_cut_question(len(asked), len(passage), room))
        rest = max(0, room - first)
        cut = first < len(asked) or rest < len(passage)
        return [*self._front, *asked[:first], *self._middle, *passage[:rest], *self._end], cut

    def row(self, index: int) -> Row:
        answer = self.questions.answer.sentence(index).tolist()
        prompt, _ = self.prompt(index, len(answer))
        said = [*answer, self.tokenizer.eos_id]
        if self.apart:
            return Row(np.array([self.tokenizer.bos_id, *answer]), np.array(said), (), np.array(prompt, dtype=np.int64))
        targets = np.full(len(prompt) + len(answer), IGNORED)
        targets[len(prompt) - 1 :] = said
        return Row(np.array([*prompt, *answer]), targets, ())


def _cut_question(asked: Any, passage: Any, room: Any) -> Any:
    """Tokens of questions that are read beside passages in so much room."""
    return np.minimum(asked, np.maximum(0, np.maximum(room - room // 4, room - passage)))
