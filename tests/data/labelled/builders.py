"""Small files of questions and of labelled texts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from ctxlab.data.labelled.classification import Classification
from ctxlab.data.labelled.questions import QuestionDataset, prepare_questions
from ctxlab.data.labelled.squad import Squad
from ctxlab.data.labelled.texts import LabelDataset, prepare_texts
from ctxlab.data.tokenizers.base import TOKENIZERS

NAMES = ("ann", "bob", "carl", "dora", "émil", "fay", "gus", "hal")
THINGS = ("red", "blue", "green", "black", "white")


def articles(n: int = 20, *, impossible: bool = False) -> list[dict[str, Any]]:
    """Who likes what: two passages of three likings an article, each asked for; with `impossible` also one that is not there."""
    draw = random.Random(0)
    found = []
    for number in range(n):
        paragraphs = []
        for _ in range(2):
            names, things = draw.sample(NAMES, 3), draw.sample(THINGS, 4)
            text = " ".join(f"{name} likes {thing}." for name, thing in zip(names, things[:3], strict=True))
            qas = [
                question(f"Who likes {thing}?", text, name, version_2=impossible)
                for name, thing in zip(names, things[:3], strict=True)
            ]
            if impossible:
                plausible = {"plausible_answers": [{"text": names[0], "answer_start": 0}]}
                qas.append(
                    {
                        "id": "x",
                        "question": f"Who likes {things[3]}?",
                        "answers": [],
                        "is_impossible": True,
                        **plausible,
                    }
                )
            paragraphs.append({"context": text, "qas": qas})
        found.append({"title": f"article {number}", "paragraphs": paragraphs})
    return found


def question(text: str, passage: str, answer: str, *, version_2: bool = False) -> dict[str, Any]:
    found = {"id": text, "question": text, "answers": [{"text": answer, "answer_start": passage.index(answer)}]}
    return {**found, "is_impossible": False} if version_2 else found


def write_squad(file: Path, data: list[dict[str, Any]]) -> Path:
    file.write_text(json.dumps({"version": "1.1", "data": data}, ensure_ascii=False), encoding="utf-8")
    return file


def questions(folder: Path, data: list[dict[str, Any]] | None = None, **settings: Any) -> QuestionDataset:
    """Questions in bytes."""
    file = write_squad(folder / "squad.json", articles() if data is None else data)
    config = Squad.Config(path=str(file), **settings)
    return prepare_questions(config, TOKENIZERS.config({"name": "byte"}), cache=folder / "cache")


def lines(n: int = 200) -> list[str]:
    """Texts whose label is that of one word in them."""
    draw = random.Random(1)
    found = []
    for number in range(n):
        label = draw.choice(("good", "bad"))
        words = [*draw.choices(("the", "film", "was", "so"), k=4), {"good": "fine", "bad": "poor"}[label], str(number)]
        found.append(f"{' '.join(words)}\t{label}")
    return found


def texts(folder: Path, found: list[str] | None = None, **settings: Any) -> LabelDataset:
    """Labelled texts in bytes."""
    file = folder / "texts.tsv"
    file.write_text("\n".join(lines() if found is None else found) + "\n", encoding="utf-8")
    config = Classification.Config(path=str(file), **settings)
    return prepare_texts(config, TOKENIZERS.config({"name": "byte"}), cache=folder / "cache")
