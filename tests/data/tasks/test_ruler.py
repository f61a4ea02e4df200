"""RULER's tasks as its paper and its code have them: prompts written out, counts by hand, files read as they are."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import Example, Part, TextTask, generator, held_out
from ctxlab.data.tasks.ruler_qa import HotpotQA, QuestionAnswering, Squad
from ctxlab.errors import DataError
from tests.data.tasks.tools import TEXTS, text_tasks, tools, write_hotpot, write_squad

RULER = "task/ruler/"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def make(name: str) -> TextTask:
    kind = SOURCES.get(RULER + name)
    assert issubclass(kind, TextTask)
    return kind(kind.Config(name=RULER + name))


def examples(name: str, length: int, n: int = 5, part: Part = "test") -> list[Example]:
    return [make(name).example(generator(seed), length, tools("byte", part)) for seed in range(n)]


def test_there_are_thirteen_with_the_tokens_that_they_generate() -> None:
    niah = ["single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery"]
    wanted = {f"niah_{name}": 128 for name in niah} | {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    found = [name.removeprefix(RULER) for name in text_tasks() if name.startswith(RULER)]
    assert {name: make(name).new_tokens for name in found} == wanted
    assert [name for name in found if make(name).match == "part"] == ["qa_1", "qa_2"]


def test_one_needle_is_asked_for_in_the_singular() -> None:
    example = examples("niah_single_1", 1000)[0]
    key = re.search(r"numbers for ([a-z]+-[a-z]+) is: (\d{7})\.", example.prompt)
    assert key
    assert example.answers == (key[2],)
    lines = example.prompt.split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
        "number afterwards."
    )
    assert lines[-1] == (
        f"What is the special magic number for {key[1]} mentioned in the provided text? The special magic number for "
        f"{key[1]} mentioned in the provided text is"
    )
    assert Counter(lines[1:-1]) == {
        NOISE: len(lines) - 3,
        f"One of the special magic numbers for {key[1]} is: {key[2]}.": 1,
    }


def test_several_are_asked_for_in_the_plural() -> None:
    for example in examples("niah_multiquery", 3000):
        found = dict(re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", example.prompt))
        by_value = {value: key for key, value in found.items()}
        a, b, c, d = (by_value[answer] for answer in example.answers)
        assert example.prompt.startswith(
            "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
            "about the numbers afterwards.\n"
        )
        assert example.prompt.endswith(
            f"\nWhat are all the special magic numbers for {a}, {b}, {c}, and {d} mentioned in the provided text? The "
            f"special magic numbers for {a}, {b}, {c}, and {d} mentioned in the provided text are"
        )


@pytest.mark.parametrize(
    ("name", "keys", "values", "answers", "kind"),
    [
        ("single_2", 1, 1, 1, r"\d{7}"), ("single_3", 1, 1, 1, "uuid"), ("multikey_1", 4, 1, 1, r"\d{7}"),
        ("multivalue", 1, 4, 4, r"\d{7}"), ("multiquery", 4, 1, 4, r"\d{7}"),
    ],
)  # fmt: skip
def test_needles_in_a_text(name: str, keys: int, values: int, answers: int, kind: str) -> None:
    kind = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}" if kind == "uuid" else kind
    for example in examples(f"niah_{name}", 4000):
        found = re.findall(rf"One of the special magic (?:numbers|uuids) for (\S+) is: ({kind})\.", example.prompt)
        assert len({key for key, _ in found}) == keys
        assert len(found) == len({value for _, value in found}) == keys * values
        assert len(example.answers) == answers
        context = "\n".join(example.prompt.split("\n")[1:-1])
        rest = re.sub(r"One of the special magic \w+ for \S+ is: \S+\.\s", "", f"{context}\n")
        joined = " ".join(" ".join([*TEXTS, *TEXTS]).split())
        assert " ".join(rest.split()) in joined


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_needles_between_needles(name: str) -> None:
    for example in examples(name, 4000):
        lines = example.prompt.split("\n")[1:-1]
        found = [
            re.fullmatch(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.", line) for line in lines
        ]
        assert all(found)
        assert len({one[2] for one in found if one}) == len({one[3] for one in found if one}) == len(lines) > 15


def test_a_chain_of_five_variables_behind_a_solved_one() -> None:
    given = tools("byte")
    for example in examples("vt", 8000):
        solved, question = re.split(r"\n\n(?=Memorize)", example.prompt)
        for text, letters in ((solved, 3), (question, 5)):
            links = [line for line in text.split("\n") if line.startswith("VAR")]
            names = re.findall(rf"VAR ([A-Z]{{{letters}}}) = ", "\n".join(links))
            value = re.fullmatch(rf"VAR {names[0]} = (\d{{5}})", links[0])
            assert value
            assert links[1:] == [f"VAR {name} = VAR {before} " for before, name in zip(names, names[1:])]
            assert len(set(names)) == 5
            head, _, tail = text.partition("\n\n")
            assert head == "Memorize and track the chain(s) of variable assignment hidden in the following text."
            end = (
                f"Question: Find all variables that are assigned the value {value[1]} in the text above. Answer: According "
                f"to the chain(s) of variable assignment in the text above, 5 variables are assigned the value {value[1]}, "
                "they are: "
            )
            assert tail.split("\n")[-1] == end + (f" {' '.join(names)}" if letters == 3 else "")
            assert {line for line in tail.split("\n")[:-1] if not line.startswith("VAR")} == {NOISE}
        assert example.answers == tuple(names)
        assert solved.count(NOISE) == 5  # its 500 tokens hold no more with bytes
    assert make("vt").completion(example) == " ".join(names)
    prompt = make("vt").example(generator(1), 4000, tools("unigram")).prompt
    solved = prompt.split("\n\nMemorize")[0].rpartition(":  ")[0]
    size = tools("unigram").count(f"{NOISE}\n")
    assert solved.count(NOISE) == 5 or 500 - size - 2 < tools("unigram").count(f"{solved}: ") <= 500
    assert given.part == "test"


def listed(text: str) -> list[str]:
    """The words of a numbered list; the numbers are held to be 1, 2, 3, ..."""
    items = re.findall(r"(\d+)\. (\S+)", text)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    return [word for _, word in items]


@pytest.mark.parametrize(
    ("kind", "length", "solved", "times"),
    [
        ("byte", 4000, (20, 3, 1), (6, 1)), ("byte", 20_000, (40, 10, 3), (30, 3)), ("unigram", 4095, (20, 3, 1), (6, 1)),
    ],
)  # fmt: skip
def test_ten_words_come_up_more_often(
    kind: str, length: int, solved: tuple[int, int, int], times: tuple[int, int]
) -> None:
    for seed in range(4):
        example = make("cwe").example(generator(seed), length, tools(kind))
        first, second = example.prompt.split("\nBelow ")
        context, answer = first.split("\nQuestion: What are the 10 most common words in the above list? Answer: ")
        counts = Counter(listed(context.split("\n")[1]))
        assert sorted(counts.values(), reverse=True) == [solved[1]] * 10 + [solved[2]] * (solved[0] - 10)
        shown = answer.removeprefix("The top 10 words that appear most often in the list are: ")
        assert set(listed(shown)) == {word for word, _ in counts.most_common(10)}
        context, question = second.split("\nQuestion: ")
        counts = Counter(listed(context.split("\n")[1]))
        assert {word: n for word, n in counts.items() if word in example.answers} == dict.fromkeys(
            example.answers, times[0]
        )
        assert {n for word, n in counts.items() if word not in example.answers} == {times[1]}
        assert question == (
            "What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the "
            "list are:"
        )
    assert listed(make("cwe").completion(example)) == list(example.answers)


def test_a_list_longer_than_the_words_of_a_part_goes_on_with_others() -> None:
    (example,) = examples("cwe", 131_072, 1)
    counts = Counter(listed(example.prompt.split("\nBelow ")[1].split("\nQuestion")[0]))
    assert len(counts) > 2500
    assert {held_out(word) for word in counts} == {True, False}
    assert all(held_out(word) for word in example.answers)


def test_made_up_words_come_up_as_zipf_has_it() -> None:
    for length in (700, 3000, 20_000):
        for example in examples("fwe", length):
            assert example.prompt.startswith(
                "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
                "appeared coded words. "
            )
            assert example.prompt.endswith(
                "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
                "frequently appeared words in the above coded text? Answer: According to the coded text above, the three "
                "most frequently appeared words are:"
            )
            text = example.prompt.split("coded words. ")[1].split("\nQuestion")[0]
            ranked = Counter(text.split()).most_common()
            assert ranked[0][0] == "..."
            assert {word for word, _ in ranked[1:4]} == set(example.answers)
            assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
            # some n explains all counts: floor(6 n / (pi^2 k^2)) for k = 1, 2, ... up to the size of the vocabulary
            ranks, counts = np.arange(1, (length - 50) // 50 + 1), np.array([count for _, count in ranked])
            n = int(counts[0] * np.pi**2 / 6)
            explained = [np.floor(6 * m / (np.pi**2 * ranks**2)) for m in range(n, n + 4)]
            assert any(np.array_equal(one[one > 0], counts) for one in explained)


@pytest.fixture
def squad(tmp_path: Path) -> tuple[Squad, list[dict[str, Any]]]:
    asked = write_squad(tmp_path / "dev.json")
    return Squad(Squad.Config(path=str(tmp_path / "dev.json"))), asked


@pytest.fixture
def hotpot(tmp_path: Path) -> tuple[HotpotQA, list[dict[str, Any]]]:
    asked = write_hotpot(tmp_path / "dev.json")
    return HotpotQA(HotpotQA.Config(path=str(tmp_path / "dev.json"))), asked


ORDER = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


def given_documents(prompt: str) -> tuple[list[str], str]:
    """The documents of a prompt, in their order, and its question."""
    head = f"{ORDER}\n\nThe following are given documents.\n\nDocument 1:\n"
    assert prompt.startswith(head)
    assert prompt.endswith(" Answer:")
    context, question = prompt.removeprefix(head).split(f"\n\n{ORDER}\n\nQuestion: ")
    parts = re.split(r"\n\nDocument (\d+):\n", context)
    assert parts[1::2] == [str(number) for number in range(2, len(parts) // 2 + 2)]
    return parts[::2], question.removesuffix(" Answer:")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_question_of_squad_between_paragraphs_of_its_article_first(squad: Any, part: Part) -> None:
    task, questions = squad
    by_question = {asked["question"]: asked for asked in questions}
    few = task.smallest(tools("byte")) + 700
    places = set()
    for seed in range(40):
        example = task.example(generator(seed), few, tools("byte", part))
        documents, question = given_documents(example.prompt)
        asked = by_question[question]
        assert held_out(question) == (part == "test")
        assert example.answers == (asked["answers"][0]["text"],)
        places.add(documents.index(asked["context"]))
        article = {one["context"] for one in questions if one["question"][-2] == question[-2]}
        assert len(documents) >= 3
        assert set(documents) <= article or set(documents) >= article
        assert len(set(documents)) == len(documents)
    assert len(places) > 1  # they are shuffled
    documents, _ = given_documents(task.example(generator(0), 30_000, tools("byte", part)).prompt)
    assert set(documents) == {one["context"] for one in questions}
    assert len(documents) > len(set(documents))  # a small file comes round


def test_both_versions_of_squad_ask_the_same(tmp_path: Path) -> None:
    for version in (1, 2):
        write_squad(tmp_path / f"{version}.json", version=version)
    first, second = (Squad(Squad.Config(path=str(tmp_path / f"{version}.json"))).file for version in (1, 2))
    assert first == second
    assert len(first.questions) == 24


def test_a_question_of_hotpotqa_with_all_of_its_ten_paragraphs(hotpot: Any) -> None:
    task, questions = hotpot
    by_question = {asked["question"]: asked for asked in questions}
    for seed in range(20):
        example = task.example(generator(seed), task.smallest(tools("byte")) + 900, tools("byte"))
        documents, question = given_documents(example.prompt)
        own = {f"{title}\n{''.join(sentences)}" for title, sentences in by_question[question]["context"]}
        assert own < set(documents)
        assert example.answers == (by_question[question]["answer"],)
    shares = [asked["answer"] == "yes" for asked in questions if held_out(asked["question"])]
    assert task.guess(9000, tools("byte")) == pytest.approx(float(Fraction(sum(shares), len(shares))))


def test_any_of_the_answers_will_do() -> None:
    task = Squad(Squad.Config(path="none"))
    assert task.score(" It was master Stone, I think", ("Master Stone", "the stone")) == 1.0
    assert task.score("nobody", ("Master Stone",)) == 0.0
    assert make("vt").score("abcde\x00xyzzy", ("ABCDE", "QQQQQ")) == 0.5


@pytest.mark.parametrize("kind", [Squad, HotpotQA])
def test_a_file_that_is_absent_or_another_ones_is_refused_in_a_line(
    kind: type[QuestionAnswering], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextTask, "fetch", lambda *_: None)

    def fetch(path: str) -> None:
        kind(kind.Config.model_validate({"name": kind.Config.model_fields["name"].default, "path": path})).fetch(
            tmp_path, lambda *_: lambda _: None
        )

    what = "SQuAD" if kind is Squad else "HotpotQA"
    with pytest.raises(
        DataError, match=rf"^data.path: ruler/qa_. asks about {what} .*no file is given: data.path=FILE.json$"
    ):
        fetch("")
    with pytest.raises(DataError, match=rf"^data.path: .*dev.json: No such file or directory; .*{what}"):
        fetch(str(tmp_path / "dev.json"))
    wrong = tmp_path / "wrong.json"
    contents: Sequence[str] = (
        "[",
        '{"a": 1}',
        "[1]",
        '{"data": [{"paragraphs": [{"qas": 3}]}]}',
        '"text"',
        '[{"question": 1}]',
    )
    for content in contents:
        wrong.write_text(content)
        with pytest.raises(DataError, match=f"wrong.json is not {what}"):
            fetch(str(wrong))
    wrong.write_text(json.dumps({"data": []} if kind is Squad else []))
    with pytest.raises(DataError, match="has 0 questions, too few for training and test"):
        fetch(str(wrong))
