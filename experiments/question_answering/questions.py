"""Questions about who speaks in the plays, in SQuAD's JSON, with the answer in a passage of the play itself.

    python experiments/question_answering/questions.py FOLDER

Writes FOLDER/train.json and FOLDER/test.json and prints a JSON object for each. The test has the plays of the corpus's own test
split, which nothing is pretrained on either. A passage is a few speeches of a scene that follow one another, of each its first
line; a question quotes how one of them begins. No beginning is asked for that anybody else says in the same words, so a name
that was right in training says nothing about the test: who it is has to be found in the passage.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ctxlab.data.corpora.shakespeare import Shakespeare
from ctxlab.data.prepare import default_cache
from ctxlab.data.progress import silent
from ctxlab.data.splits import SPLITS, split

SPEECHES = 4  # of a passage
SPEAKERS = 3  # different ones among them, at least
STEPS = {"train": 2, "test": 4}  # speeches from one passage to the next: in training they overlap
WORDS = range(4, 12)  # of a line
QUOTED = 4  # words of it that a question has
_SPEECH = re.compile(r"\*\*(?P<name>[^*\n]+)\*\*[ ]*\n(?P<line>[^\n*_#]+)")


class Speech(NamedTuple):
    name: str
    line: str

    @property
    def quote(self) -> str:
        return " ".join(self.line.split()[:QUOTED]).strip(".,;:!?-")


def scenes() -> Iterator[tuple[str, str, list[Speech]]]:
    """(split, play, the speeches of a scene whose first line is neither short nor long)."""
    plays = Shakespeare(Shakespeare.Config())
    plays.fetch(default_cache(), silent)
    labels = split(plays, lambda _: None).labels
    for play, label in zip(plays.documents(), labels, strict=True):
        part = "test" if SPLITS[label] == "test" else "train"
        for scene in re.split(r"^#+ .*$", "".join(play.lines), flags=re.MULTILINE):
            speeches = [Speech(found["name"].strip(), found["line"].strip()) for found in _SPEECH.finditer(scene)]
            yield part, play.name, [speech for speech in speeches if len(speech.line.split()) in WORDS]


def passages(part: str, speeches: list[Speech]) -> Iterator[list[Speech]]:
    """Speeches that follow one another and are not all of one or two."""
    for first in range(0, len(speeches) - SPEECHES + 1, STEPS[part]):
        some = speeches[first : first + SPEECHES]
        if len({speech.name for speech in some}) >= SPEAKERS:
            yield some


def article(play: str, found: list[list[Speech]], asked: Counter[str]) -> dict[str, Any]:
    """A play in SQuAD's form: of each passage every beginning that is asked for nowhere else."""
    paragraphs = []
    for number, speeches in enumerate(found):
        context, places = "", []
        for speech in speeches:
            places.append(len(context) + len("**"))
            context += f"**{speech.name}**\n{speech.line}\n\n"
        questions = [
            {
                "id": f"{play}-{number}-{place}",
                "question": f"Who says '{speech.quote}'?",
                "answers": [{"text": speech.name, "answer_start": start}],
            }
            for place, (speech, start) in enumerate(zip(speeches, places, strict=True))
            if asked[speech.quote] == 1
        ]
        paragraphs.append({"context": context, "qas": questions})
    return {"title": play, "paragraphs": paragraphs}


def main(folder: Path) -> None:
    plays: dict[str, dict[str, list[list[Speech]]]] = {"train": {}, "test": {}}
    asked = Counter[str]()
    for part, play, speeches in scenes():
        asked.update(speech.quote for speech in speeches)
        plays[part].setdefault(play, []).extend(passages(part, speeches))
    folder.mkdir(parents=True, exist_ok=True)
    for part, found in plays.items():
        data = [article(play, found[play], asked) for play in sorted(found)]
        (folder / f"{part}.json").write_text(json.dumps({"version": "1.1", "data": data}), encoding="utf-8")
        speakers = [len({speech.name for speech in some}) for some_of in found.values() for some in some_of]
        questions = sum(len(paragraph["qas"]) for play in data for paragraph in play["paragraphs"])
        chance = sum(1 / n for n in speakers) / len(speakers)
        print(json.dumps({"split": part, "plays": len(data), "questions": questions, "any_speaker": chance}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
