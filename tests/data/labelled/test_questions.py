"""Questions: which tokens an answer is, what is held out with what, and bad records in one line."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxlab.data.labelled.questions import NONE, QuestionDataset, prepare_questions, token_span
from ctxlab.data.labelled.squad import Squad
from ctxlab.data.tokenizers.base import TOKENIZERS
from ctxlab.errors import DataError
from tests.data.labelled.builders import articles, question, questions, write_squad


def golds(dataset: QuestionDataset, split: str) -> list[Any]:
    return [dataset.splits[split].gold(index) for index in range(dataset.splits[split].n)]


def test_the_tokens_of_an_answer_are_its_text(tmp_path: Path) -> None:
    dataset = questions(tmp_path)
    seen = 0
    for name, split in dataset.splits.items():
        assert split.n == len(golds(dataset, name)) == dataset.facts["splits"][name]["questions"]
        for index, gold in enumerate(golds(dataset, name)):
            first, last = split.spans[index].tolist()
            passage = split.tokens_of_passage(index).tolist()
            assert dataset.tokenizer.decode(passage[first : last + 1]) == gold.answers[0]
            assert dataset.tokenizer.decode(split.question.sentence(index).tolist()) == gold.question
            assert dataset.tokenizer.decode(split.answer.sentence(index).tolist()) == f" {gold.answers[0]}"
            seen += 1
    assert seen == 20 * 2 * 3
    assert any("é" in gold.answers[0] for gold in golds(dataset, "train")), "bytes and characters are not the same"


def test_a_span_is_of_the_tokens_that_hold_a_part_of_it() -> None:
    ends = np.cumsum([3, 1, 4, 2])  # bytes 0-2, 3, 4-7, 8-9
    assert token_span(ends, 0, 3) == (0, 0)
    assert token_span(ends, 3, 4) == (1, 1)
    assert token_span(ends, 2, 5) == (0, 2)
    assert token_span(ends, 5, 6) == (2, 2)
    assert token_span(ends, 4, 10) == (2, 3)


def test_an_article_is_on_one_side_and_its_questions_know_it(tmp_path: Path) -> None:
    dataset = questions(tmp_path)
    counts = {name: facts["held_out_by"] for name, facts in dataset.facts["splits"].items()}
    assert counts == {"train": 16, "validation": 2, "test": 2}
    for split in dataset.splits.values():
        assert np.bincount(split.units).tolist() == [6] * len(np.unique(split.units))
    by_passage = questions(tmp_path, held_out_by="passage")
    assert by_passage.facts["splits"]["test"] == {**by_passage.facts["splits"]["test"], "held_out_by": 2, "passages": 2}


def test_a_test_file_is_the_test(tmp_path: Path) -> None:
    test = articles(3)
    for article in test:
        article["title"] = f"another {article['title']}"
    write_squad(tmp_path / "test.json", test)
    dataset = questions(tmp_path, test_path=str(tmp_path / "test.json"))
    counts = {name: facts["held_out_by"] for name, facts in dataset.facts["splits"].items()}
    assert counts == {"train": 18, "validation": 2, "test": 3}


def test_the_order_of_the_file_moves_nothing_to_another_side(tmp_path: Path) -> None:
    said = {gold.question + gold.answers[0] for gold in golds(questions(tmp_path), "test")}
    turned = questions(tmp_path, articles()[::-1])
    assert {gold.question + gold.answers[0] for gold in golds(turned, "test")} == said


def test_a_question_without_an_answer_has_no_place(tmp_path: Path) -> None:
    dataset = questions(tmp_path, articles(impossible=True))
    split = dataset.splits["train"]
    none = [not gold.answers for gold in golds(dataset, "train")]
    assert sum(none) == dataset.facts["splits"]["train"]["unanswerable"] == split.n // 4
    assert dataset.may_have_none
    assert ((split.spans == NONE).all(1) == none).all()
    assert (split.answer.sizes[np.array(none)] == 0).all()
    assert dataset.facts["majority_answer"] == ""  # a quarter; no name is that frequent
    assert not questions(tmp_path).may_have_none


def test_the_majority_is_counted_in_training(tmp_path: Path) -> None:
    dataset = questions(tmp_path)
    said = [gold.answers[0] for gold in golds(dataset, "train")]
    most = max(said.count(name) for name in said)
    assert dataset.facts["majority_answer"] == min(name for name in said if said.count(name) == most)


def test_a_packed_file_is_read_too_and_the_cache_is_read_again(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.json.gz", "wt", encoding="utf-8") as file:
        json.dump({"data": articles()}, file)
    made = [
        prepare_questions(
            Squad.Config(path=str(tmp_path / "a.json.gz")),
            TOKENIZERS.config({"name": "byte"}),
            cache=tmp_path / "cache",
        )
        for _ in range(2)
    ]
    assert made[0].facts == made[1].facts
    assert (made[0].splits["train"].spans == made[1].splits["train"].spans).all()


TEXT = "ann likes red."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a[0].pop("paragraphs"), "article 1 of {} (line 1) has no 'paragraphs'"),
        (lambda a: a[0].update(paragraphs={}), "(line 1): 'paragraphs' is dict, not list"),
        (lambda a: a[0].update(title=3), "(line 1): 'title' is int, not str"),
        (lambda a: a.insert(0, "text"), "article 1 of {} (line 1) is no object but str"),
        (lambda a: a[1]["paragraphs"][0].pop("context"), "article 2 of {} (line 1), paragraph 1 has no 'context'"),
        (lambda a: a[1]["paragraphs"][0]["qas"][0].pop("question"), "paragraph 1, question 1 has no 'question'"),
        (lambda a: a[1]["paragraphs"][0]["qas"][0].pop("answers"), "paragraph 1, question 1 has no 'answers'"),
        (
            lambda a: a[1]["paragraphs"][0]["qas"][0].update(answers=[]),
            "has no answers; one that the passage does not answer",
        ),
        (
            lambda a: a[1]["paragraphs"][0]["qas"][0]["answers"][0].update(answer_start=1),
            "question 1: the answer 'ann' does not stand at answer_start 1 of the context ('nn ')",
        ),
        (
            lambda a: a[1]["paragraphs"][0]["qas"][0]["answers"][0].update(answer_start="0"),
            "'answer_start' is str, not int",
        ),
        (lambda a: a[1]["paragraphs"][0]["qas"][0]["answers"][0].update(answer_start=-3), "does not stand at"),
    ],
)
def test_a_record_that_is_none_is_said_with_its_place(tmp_path: Path, change: Any, said: str) -> None:
    whole = {"paragraphs": [{"context": TEXT, "qas": [question("Who likes red?", TEXT, "ann")]}]}
    data: list[Any] = [{"title": f"t{n}", **copy.deepcopy(whole)} for n in range(20)]
    change(data)
    with pytest.raises(DataError) as error:
        questions(tmp_path, data)
    assert str(error.value).startswith("data.path: ")
    assert said.format(tmp_path / "squad.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_too_few_articles_and_files_that_ask_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="15 different articles are too few to hold some out; 16 are enough; or give"):
        questions(tmp_path, articles(15))
    write_squad(tmp_path / "none.json", [])
    with pytest.raises(DataError, match=r"data\.test_path: .*none\.json asks nothing"):
        questions(tmp_path, test_path=str(tmp_path / "none.json"))
    with pytest.raises(DataError, match=r"data\.path: it takes a file of questions in SQuAD's JSON"):
        prepare_questions(Squad.Config(), TOKENIZERS.config({"name": "byte"}), cache=tmp_path)
    with pytest.raises(DataError, match=r"data\.path: there is no file nowhere\.json"):
        prepare_questions(Squad.Config(path="nowhere.json"), TOKENIZERS.config({"name": "byte"}), cache=tmp_path)
