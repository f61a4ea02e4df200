"""Questions, passages and answers as tokens: which of a passage's tokens an answer is, and the text of any of them."""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ctxlab.cache import default_cache
from ctxlab.data.kept import damaged, kept
from ctxlab.data.labelled.split import held_out, learned
from ctxlab.data.labelled.squad import Asked, Passage, Squad
from ctxlab.data.pairs.parallel import HeldOut, sentence_hash
from ctxlab.data.progress import Progress, silent
from ctxlab.data.sides import Side, SideWriter, read_side
from ctxlab.data.splits import SPLITS
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.sides import Tokenizers, load_tokenizers
from ctxlab.errors import DataError

NONE = -1  # the place of an answer that there is not
_FEWEST = 2  # articles or passages that a part holds
_SAMPLE = 400_000  # texts that a tokenizer learns from, at most
_SIDES = ("question", "passage", "answer")


class Gold(NamedTuple):
    """What a question is to be answered with: any of `answers`, or nothing where there are none."""

    id: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """The questions of one split, and the passages that they are about."""

    name: str
    question: Side
    passage: Side
    answer: Side  # the first answer of each as a word in running text, behind a space; empty where there is none
    about: np.ndarray  # (n,) the passage of each
    spans: np.ndarray  # (n, 2) first and last token of the first answer in it, NONE where there is none
    units: np.ndarray  # (n,) the article or passage that it was held out with
    golds: Path
    gold_starts: np.ndarray  # (n + 1,)

    @property
    def n(self) -> int:
        return len(self.about)

    def gold(self, index: int) -> Gold:
        with open(self.golds, "rb") as file:
            file.seek(int(self.gold_starts[index]))
            found = json.loads(file.read(int(self.gold_starts[index + 1] - self.gold_starts[index])))
        return Gold(found["id"], found["question"], tuple(found["answers"]))

    def tokens_of_passage(self, index: int) -> np.ndarray:
        """The tokens of what question `index` is about."""
        return self.passage.sentence(int(self.about[index]))


@dataclass(frozen=True)
class QuestionDataset:
    """Questions as tokens, and their tokenizer. `facts` has the answer that is most frequent in training: `majority_answer`."""

    splits: dict[str, Questions]
    tokenizer: Tokenizer
    facts: dict[str, Any]

    @property
    def may_have_none(self) -> bool:
        """Whether some questions that it is trained on have no answer."""
        return bool(self.facts["splits"]["train"]["unanswerable"])


def prepare_questions(
    data: Squad.Config,
    tokenizer: Tokenizer.Config | Tokenizers,
    *,
    cache: Path | None = None,
    progress: Progress = silent,
) -> QuestionDataset:
    """The tokens of questions and passages under a tokenizer (one given, or one learned from the train split).

    Raises DataError, one line, for files that cannot be used.
    """
    squad = Squad(data)
    squad.fetch(default_cache() if cache is None else cache, progress)
    folder, facts = kept(
        "squad", 1, squad.facts(), tokenizer, cache, lambda draft: _make(draft, squad, tokenizer, progress)
    )
    try:
        speaks = load_tokenizers(folder, apart=False).target
        return QuestionDataset({name: _read(folder, name, speaks) for name in SPLITS}, speaks, facts)
    except (OSError, EOFError, ValueError) as error:
        raise damaged(folder, error) from error


def token_span(ends: np.ndarray, first: int, last: int) -> tuple[int, int]:
    """The first and the last token of those that hold the bytes from `first` to before `last`; token i ends before `ends[i]`."""
    return int(np.searchsorted(ends, first, side="right")), int(np.searchsorted(ends, last, side="left"))


def _make(folder: Path, squad: Squad, tokenizer: Tokenizer.Config | Tokenizers, progress: Progress) -> dict[str, Any]:
    by, tested_apart = squad.config.held_out_by, "test_path" in squad.files
    advance = progress("reading the questions", 0)
    instead = "; or give data.test_path" + ("" if by == "passage" else ", or data.held_out_by=passage")
    bounds = held_out(
        (squad.unit(passage) for passage in squad.passages("path")), what=f"{by}s", fewest=_FEWEST,
        tested_apart=tested_apart, instead=instead,
    )  # fmt: skip
    advance(1)
    advance = progress("training the tokenizer", 0)
    train = (passage for name, passage in _placed(squad, bounds) if name == "train")
    texts = itertools.chain.from_iterable((p.text, *(asked.text for asked in p.questions)) for p in train)
    speaks = learned(tokenizer, itertools.islice(texts, _SAMPLE), folder)
    advance(1)
    digest = hashlib.sha256()
    answers: Counter[str] = Counter()
    advance = progress("turning questions into tokens", 0)
    with ExitStack() as stack:
        writers = {name: stack.enter_context(closing(_Writer(folder, name, speaks))) for name in SPLITS}
        for name, passage in _placed(squad, bounds):
            writers[name].add(passage, squad.unit(passage))
            digest.update(json.dumps(passage, ensure_ascii=False).encode())
            if name == "train":
                answers.update(asked.answers[0].text if asked.answers else "" for asked in passage.questions)
            advance(len(passage.questions))
        counts = {name: writer.counts() for name, writer in writers.items()}
    for name in ("train", "test"):
        if not counts[name]["questions"]:
            key = "test_path" if name == "test" and tested_apart else "path"
            raise DataError(
                f"data.{key}: {squad.files[key]} asks nothing{'' if tested_apart else f' of the {name} split'}"
            )
    return {
        "text_sha256": digest.hexdigest(),
        "splits": counts,
        "majority_answer": min(answers, key=lambda text: (-answers[text], text), default=""),
        **Tokenizers.joint(speaks).facts(),
    }


def _placed(squad: Squad, bounds: HeldOut) -> Iterator[tuple[str, Passage]]:
    """Every passage that something is asked of, with its split."""
    for key in squad.files:
        for passage in squad.passages(key):
            if passage.questions:
                yield "test" if key == "test_path" else bounds.part(squad.unit(passage)), passage


class _Writer:
    """One split on its way to disk."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer) -> None:
        self.folder, self.name, self.tokenizer = folder, name, tokenizer
        self.sides = {side: SideWriter(folder, f"{name}.{side}", tokenizer) for side in _SIDES}
        self.golds = open(folder / f"{name}.golds.jsonl", "wb")  # noqa: SIM115
        self.about, self.spans, self.units, self.starts = array("q"), array("q"), array("q"), array("q", [0])
        self.seen: dict[int, int] = {}
        self.n_passages = self.unanswerable = 0

    def add(self, passage: Passage, unit: str) -> None:
        ids = self.tokenizer.encode(passage.text)
        ends = np.cumsum(self.tokenizer.token_bytes[ids])
        self.sides["passage"].add(ids)
        for asked in passage.questions:
            self.about.append(self.n_passages)
            self.units.append(self.seen.setdefault(sentence_hash(unit), len(self.seen)))
            self._question(asked, passage.text, ends)
        self.n_passages += 1

    def _question(self, asked: Asked, passage: str, ends: np.ndarray) -> None:
        self.sides["question"].add(self.tokenizer.encode(asked.text))
        if asked.answers:
            text, start = asked.answers[0]
            first = len(passage[:start].encode())
            self.spans.extend(token_span(ends, first, first + len(text.encode())))
            self.sides["answer"].add(self.tokenizer.encode(f" {text}"))
        else:
            self.unanswerable += 1
            self.spans.extend((NONE, NONE))
            self.sides["answer"].add([])
        gold = Gold(asked.id, asked.text, tuple(answer.text for answer in asked.answers))
        line = json.dumps(gold._asdict(), ensure_ascii=False).encode() + b"\n"
        self.golds.write(line)
        self.starts.append(self.starts[-1] + len(line))

    def counts(self) -> dict[str, int]:
        return {
            "questions": len(self.about),
            "unanswerable": self.unanswerable,
            "passages": self.n_passages,
            "held_out_by": len(self.seen),
            **{f"{side}_tokens": writer.starts[-1] for side, writer in self.sides.items()},
        }

    def close(self) -> None:
        for side in self.sides.values():
            side.close()
        self.golds.close()
        for name in ("about", "spans", "units", "starts"):
            np.save(self.folder / f"{self.name}.{name}.npy", np.array(getattr(self, name), dtype=np.int64))


def _read(folder: Path, name: str, tokenizer: Tokenizer) -> Questions:
    sides = {side: read_side(folder, f"{name}.{side}", tokenizer) for side in _SIDES}
    about, spans, units, starts = (
        np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("about", "spans", "units", "starts")
    )
    if len(starts) != len(about) + 1 or len(sides["question"].starts) != len(about) + 1:
        raise ValueError(f"{name} has {len(about)} questions and {len(starts) - 1} answers")
    return Questions(
        name, **sides, about=about, spans=spans.reshape(-1, 2), units=units, golds=folder / f"{name}.golds.jsonl",
        gold_starts=starts,
    )  # fmt: skip
