"""Questions to be answered in words: the prompt, and the answer behind it or in a decoder of its own."""

from __future__ import annotations

import numpy as np

from ctxlab.data.by_length import Examples
from ctxlab.data.labelled.questions import NONE, QuestionDataset
from ctxlab.data.windows import IGNORED, Row
from ctxlab.errors import DataError


class Prompts(Examples):
    """ "question: ... context: ..." and an answer that is scored, with eos behind it; no answer is eos alone.

    The format is that of Raffel et al. 2020, arXiv:1910.10683, appendix D.15. `apart`: an encoder reads the prompt and a
    decoder writes the answer; otherwise " answer:" stands between them in one text. A passage that is too long loses its end;
    questions whose answer stands there are not trained on, since they could only be guessed.
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
        asked, answer = self.questions.question.sizes, self.questions.answer.sizes
        passage = self.questions.passage.sizes[self.questions.about]
        self.rooms = context - self._fixed - asked - (0 if apart else answer)
        read = np.minimum(passage, np.maximum(self.rooms, 0))
        self.targets = answer + 1
        self.tokens = self._fixed + asked + read + (answer + 1 if apart else answer)
        last = self.questions.spans[:, 1]
        fits = (self.rooms > 0) & ((last < self.rooms) | (last == NONE))
        if apart:
            fits &= self.targets <= context
        self.kept = np.flatnonzero(fits)
        if not len(self.kept):
            raise DataError(f"context: no answer of the {split} split stands within {context} tokens of a prompt")

    @property
    def _fixed(self) -> int:
        return len(self._front) + len(self._middle) + len(self._end)

    def prompt(self, index: int, answer: int) -> tuple[list[int], bool]:
        """What is read before an answer of so many tokens, and whether the passage is cut to fit."""
        asked = self.questions.question.sentence(index).tolist()
        passage = self.questions.tokens_of_passage(index)
        room = max(0, self.context - self._fixed - len(asked) - (0 if self.apart else answer))
        return [*self._front, *asked, *self._middle, *passage[:room].tolist(), *self._end], len(passage) > room

    def row(self, index: int) -> Row:
        answer = self.questions.answer.sentence(index).tolist()
        prompt, _ = self.prompt(index, len(answer))
        said = [*answer, self.tokenizer.eos_id]
        if self.apart:
            return Row(np.array([self.tokenizer.bos_id, *answer]), np.array(said), (), np.array(prompt, dtype=np.int64))
        targets = np.full(len(prompt) + len(answer), IGNORED)
        targets[len(prompt) - 1 :] = said
        return Row(np.array([*prompt, *answer]), targets, ())
