"""A corpus in memory, and the tools that text tasks make their examples with."""

from __future__ import annotations

import functools
import json
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctxlab.data.prepare import TextDataset
from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import Part, TextTask, Tools
from ctxlab.data.tasks.dataset import TaskDataset
from ctxlab.data.tasks.haystack import CorpusHaystack
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokens import Split
from tests.data.builders import WORDS, prose, trained

TEXTS = tuple(prose(seed, 30 + 20 * seed) for seed in range(12))


def split_of(texts: Sequence[str], tokenizer: Tokenizer) -> Split:
    """A split as `write_tokens` writes it: bos, the tokens, eos of each text."""
    documents = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    starts = np.cumsum([0, *map(len, documents)])
    return Split("test", np.concatenate([np.array(ids, dtype=np.uint16) for ids in documents]), starts, ())


@functools.cache
def haystack(kind: str) -> CorpusHaystack:
    return CorpusHaystack(split_of(TEXTS, trained(kind)), trained(kind))


def tools(kind: str, part: Part = "test", taken: Container[str] = frozenset()) -> Tools:
    return Tools(trained(kind).count, haystack(kind), part, taken)


def text_tasks() -> list[str]:
    return [name for name in SOURCES.names() if issubclass(SOURCES.get(name), TextTask)]


def write_squad(file: Path, *, version: int = 2) -> list[dict[str, Any]]:
    """A file as SQuAD's, of six articles of four paragraphs; each question's answer is in one. Returns the questions."""
    data: list[dict[str, Any]] = []
    for article in range(6):
        paragraphs = []
        for number in range(4):
            name = WORDS[(7 * article + number) % len(WORDS)]
            fact = f"The keeper of {name} {article} is Master {name.title()}son."
            asked = {"question": f"Who keeps {name} {article}?", "answers": [{"text": f"Master {name.title()}son"}] * 2}
            unknown = {"question": f"Who sold {name} {article}?", "answers": [], "is_impossible": True}
            text = f"{prose(100 * article + number, 4, blank_every=9)}{fact}"
            paragraphs.append({"context": text, "qas": [asked, unknown] if version == 2 else [asked]})
        data.append({"title": f"Article {article}", "paragraphs": paragraphs})
    file.write_text(json.dumps({"version": f"v{version}.0", "data": data}))
    return [asked["qas"][0] | {"context": asked["context"]} for article in data for asked in article["paragraphs"]]


def write_hotpot(file: Path) -> list[dict[str, Any]]:
    """A file as HotpotQA's, of 24 questions with ten paragraphs each. Returns the questions."""
    data = []
    for number in range(24):
        context = [[f"Title {number} {i}", [prose(1000 * number + i, 1).strip(), " And more."]] for i in range(10)]
        answer = "yes" if number % 3 == 0 else f"answer {number}"
        data.append({"question": f"What is it of {number}?", "answer": answer, "context": context})
    file.write_text(json.dumps(data))
    return data


def needles(**settings: Any) -> TaskDataset:
    """`task/needle` in bytes, over the same texts in every part."""
    kind = SOURCES.get("task/needle")
    tokenizer = trained("byte")
    splits = {part: split_of(TEXTS, tokenizer) for part in ("train", "validation", "test")}
    task = kind(kind.Config(name="task/needle", **settings))
    assert isinstance(task, TextTask)
    return TaskDataset(task, tokenizer, {}, TextDataset(splits, tokenizer, {}))
