"""Questions about who speaks in the plays, in SQuAD's JSON, with the answer in a passage of the play itself.

    python experiments/question_answering/questions.py FOLDER

Writes FOLDER/train.json and FOLDER/test.json and prints a JSON object for each. The test has the plays of the corpus's own test
split, which nothing is pretrained on either. A passage is three speeches of a scene by three people that follow one another, of
each its first line; asked is who speaks first, second and last. The question alone says nothing: it is the same in every passage.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ctxlab.data.corpora.shakespeare import Shakespeare
from ctxlab.data.prepare import default_cache
from ctxlab.data.progress import silent
from ctxlab.data.splits import SPLITS, split

ASKED = ("first", "second", "last")  # of the speeches of a passage
STEPS = {"train": 1, "test": 3}  # speeches from one passage to the next: in training they overlap
WORDS = range(3, 9)  # of a line
_SPEECH = re.compile(r"\*\*(?P<name>[^*\n]+)\*\*[ ]*\n(?P<line>[^\n*_#]+)")


class Speech(NamedTuple):
    name: str
    line: str


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
    """Speeches by different people that follow one another."""
    for first in range(0, len(speeches) - len(ASKED) + 1, STEPS[part]):
        some = speeches[first : first + len(ASKED)]
        if len({speech.name for speech in some}) == len(ASKED):
            yield some


def article(play: str, found: list[list[Speech]]) -> dict[str, Any]:
    """A play in SQuAD's form."""
    paragraphs = []
    for number, speeches in enumerate(found):
        context, questions = "", []
        for place, speech in zip(ASKED, speeches, strict=True):
            answer = {"text": speech.name, "answer_start": len(context) + len("**")}
            questions.append(
                {"id": f"{play}-{number}-{place}", "question": f"Who speaks {place}?", "answers": [answer]}
            )
            context += f"**{speech.name}**\n{speech.line}\n\n"
        paragraphs.append({"context": context, "qas": questions})
    return {"title": play, "paragraphs": paragraphs}


def main(folder: Path) -> None:
    plays: dict[str, dict[str, list[list[Speech]]]] = {"train": {}, "test": {}}
    for part, play, speeches in scenes():
        plays[part].setdefault(play, []).extend(passages(part, speeches))
    folder.mkdir(parents=True, exist_ok=True)
    for part, found in plays.items():
        data = [article(play, found[play]) for play in sorted(found)]
        (folder / f"{part}.json").write_text(json.dumps({"version": "1.1", "data": data}), encoding="utf-8")
        names = {speech.name for some in found.values() for speeches in some for speech in speeches}
        questions = sum(len(paragraph["qas"]) for play in data for paragraph in play["paragraphs"])
        print(json.dumps({"split": part, "plays": len(data), "questions": questions, "speakers": len(names)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
