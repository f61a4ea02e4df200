"""Answers: the best span is that of an exhaustive search, no answer is said when it is likelier, scores are counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctxlab.data.labelled.questions import NONE, QuestionDataset
from ctxlab.evaluation.intervals import ratio_interval
from ctxlab.evaluation.qa import QAConfig, answers, best_spans, evaluate_qa, summary
from ctxlab.evaluation.squad_scores import Scores
from ctxlab.model.heads import SpanHead
from ctxlab.train.objectives.causal import Causal
from ctxlab.train.objectives.extractive import Extractive
from ctxlab.train.objectives.seq2seq import SequenceToSequence
from tests.data.labelled.builders import articles, questions
from tests.model.builders import build

HERE: dict[str, Any] = {"device": torch.device("cpu"), "precision": "fp32"}


@pytest.mark.parametrize("longest", [1, 2, 3, 99])
def test_the_best_span_is_found_as_by_trying_all(longest: int) -> None:
    random = torch.Generator().manual_seed(longest)
    scores = torch.randn(40, 2, 9, generator=random)
    begins = torch.randint(0, 5, (40,), generator=random)
    ends = begins + torch.randint(1, 5, (40,), generator=random)
    found = best_spans(scores, begins, ends, longest)
    for row in range(40):
        spans = [
            (float(scores[row, 0, i] + scores[row, 1, j]), i, j)
            for i in range(begins[row], ends[row])
            for j in range(i, min(int(ends[row]), i + longest))
        ]
        value, first, last = max(spans)
        assert float(found.score[row]) == pytest.approx(value, abs=1e-6)
        assert (int(found.first[row]), int(found.last[row])) == (first, last)


class Pointer(torch.nn.Module):
    """A model that knows the answers of a split: its head's logits are 1 at the ends of the first answer, and `none` at bos."""

    reads_source = False

    def __init__(self, dataset: QuestionDataset, split: str, none: float) -> None:
        super().__init__()
        self.dataset, self.none = dataset, none
        self.known = {
            dataset.splits[split].question.sentence(i).tobytes()
            + dataset.splits[split].tokens_of_passage(i).tobytes(): i
            for i in range(dataset.splits[split].n)
        }
        self.split = dataset.splits[split]
        self.task_head = Known(self)

    def hidden(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return tokens[..., None].float()


class Known(SpanHead):
    def __init__(self, model: Pointer) -> None:
        super().__init__(1)
        self.model = [model]

    def scores(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        model = self.model[0]
        found = torch.zeros(len(hidden), 2, hidden.shape[1])
        found[:, :, 0] = model.none
        eos = model.dataset.tokenizer.eos_id
        for row, (tokens, length) in enumerate(zip(hidden[..., 0].long(), lengths.tolist(), strict=True)):
            front = tokens.tolist().index(eos) + 1
            read = [
                np.array(part.tolist(), dtype=np.uint16).tobytes()
                for part in (tokens[1 : front - 1], tokens[front : length - 1])
            ]
            spans = model.split.spans[model.known[b"".join(read)]]
            if spans[0] != NONE:
                found[row, 0, front + spans[0]] += 1
                found[row, 1, front + spans[1]] += 1
        return found


def test_a_model_that_knows_is_right_everywhere(tmp_path: Path) -> None:
    dataset = questions(tmp_path, articles(impossible=True))
    model: Any = Pointer(dataset, "test", none=0.5)
    rows, items = evaluate_qa(
        model, dataset, Extractive(Extractive.Config()), QAConfig(), context=128, learned=dataset.facts, **HERE
    )
    found = {(m.name, m.axes.get("baseline"), m.axes.get("questions")): m for m in rows}
    n = dataset.splits["test"].n
    for name in ("exact_match", "f1"):
        assert found[name, None, None].value == 1
        assert found[name, None, None].n_targets == n == 16
        assert found[name, None, None].n_docs == 2
        assert found[name, None, "answerable"].value == 1
        assert found[name, None, "unanswerable"].n_targets == 4
        assert found[name, "majority", None].value == 0.25  # training's most frequent answer is none
        assert found[name, "majority", None].protocol == "training's majority"
        assert found[name, None, None].protocol == "extractive, at most 30 tokens"
        assert (found[name, "majority", None].facts, found[name, None, None].facts["cut"]) == ({}, 0)
    assert [item.answer == "" for item in items] == [len(item.wanted) == 1 for item in items]
    assert all(item.score == 1 for item in items)


@pytest.mark.parametrize(
    ("none", "settings", "expected"),
    [
        (0.9, {}, "right"),  # 1.8 at bos, 2 where the answer is, 0 elsewhere
        (1.1, {}, ""),
        (1.1, {"threshold": 0.3}, "right"),
        (0.9, {"threshold": -0.3}, ""),
        (9.0, {"no_answer": False}, "right"),
    ],
)
def test_no_answer_is_said_where_it_is_likelier(
    tmp_path: Path, none: float, settings: dict[str, Any], expected: str
) -> None:
    dataset = questions(tmp_path, articles(impossible=True))
    model: Any = Pointer(dataset, "test", none)
    chosen = np.flatnonzero(dataset.splits["test"].spans[:, 0] != NONE)
    found = answers(
        model, dataset, Extractive(Extractive.Config()), QAConfig(**settings), chosen, split="test", context=128, **HERE
    )
    for index, text in zip(chosen.tolist(), found.texts, strict=True):
        assert text == (dataset.splits["test"].gold(index).answers[0] if expected else "")


def test_questions_that_all_have_answers_get_one(tmp_path: Path) -> None:
    dataset = questions(tmp_path)
    model: Any = Pointer(dataset, "test", none=9.0)
    found = answers(
        model, dataset, Extractive(Extractive.Config()), QAConfig(), np.arange(12), split="test", context=128, **HERE
    )
    assert all(found.texts)


@pytest.mark.parametrize("impossible", [False, True])
def test_whether_there_may_be_no_answer_was_learned_in_training(tmp_path: Path, impossible: bool) -> None:
    """Evaluated on other data than it was trained on, where the other kind of questions is asked."""
    (tmp_path / "trained").mkdir()
    (tmp_path / "asked").mkdir()
    trained = questions(tmp_path / "trained", articles(impossible=impossible))
    asked = questions(tmp_path / "asked", articles(impossible=not impossible))
    model: Any = Pointer(asked, "test", none=9.0)  # surer of bos than of any span
    _, items = evaluate_qa(
        model, asked, Extractive(Extractive.Config()), QAConfig(), context=128, learned=trained.facts, **HERE
    )
    assert [item.answer == "" for item in items] == [impossible] * asked.splits["test"].n


def test_an_answer_is_found_in_whichever_segment_it_stands(tmp_path: Path) -> None:
    """A real encoder over segments: the answer is the best span of all of them, as scored one by one."""
    dataset = questions(tmp_path)
    torch.manual_seed(0)
    model: Any = build("rope", architecture="encoder", vocab_size=dataset.tokenizer.vocab_size)
    model.task_head = SpanHead(model.config.d_model)
    torch.nn.init.normal_(model.task_head.ends.weight)
    objective = Extractive(Extractive.Config(stride=5))
    chosen = np.array([0, 5, 7])
    found = answers(
        model, dataset, objective, QAConfig(batch_tokens=70, max_answer=4), chosen, split="test", context=32, **HERE
    )
    segments = objective.examples(dataset, "test", 32)
    assert len(segments.question) > dataset.splits["test"].n
    for index, text in zip(chosen.tolist(), found.texts, strict=True):
        best = (-np.inf, "")
        for row in np.flatnonzero(segments.question == index).tolist():
            tokens = torch.from_numpy(segments.row(row).tokens)[None]
            with torch.inference_mode():
                scores = model.task_head.scores(model.hidden(tokens), torch.tensor([tokens.shape[1]]))[0]
            front = int(segments.front[row])
            for i in range(front, tokens.shape[1] - 1):
                for j in range(i, min(i + 4, tokens.shape[1] - 1)):
                    said = dataset.tokenizer.decode(tokens[0, i : j + 1].tolist()).strip()
                    best = max(best, (float(scores[0, i] + scores[1, j]), said))
        assert text == best[1]


def test_a_decoder_says_what_it_would_say_alone(tmp_path: Path) -> None:
    from ctxlab.data.labelled.prompts import Prompts
    from ctxlab.model.generation import DecodingConfig, generate

    dataset = questions(tmp_path)
    torch.manual_seed(0)
    model: Any = build("rope", vocab_size=dataset.tokenizer.vocab_size)
    config = QAConfig(max_answer=6, batch_tokens=300)
    found = answers(model, dataset, Causal(Causal.Config()), config, np.arange(5), split="test", context=80, **HERE)
    assert found.cut > 0
    prompts = Prompts(dataset, "test", 80, apart=False)
    for index, text in enumerate(found.texts):
        prompt, _ = prompts.prompt(index, 6)
        assert len(prompt) <= 74
        alone = generate(
            model, prompt, DecodingConfig(temperature=0.0, max_new_tokens=6), stop_ids=(dataset.tokenizer.eos_id,)
        )
        assert text == dataset.tokenizer.decode(alone).strip()


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("context", [34, 80])
def test_a_question_longer_than_the_context_is_answered(tmp_path: Path, architecture: str, context: int) -> None:
    """Under positions that end where the context does, and where no answer stands in what is read."""
    found = articles()
    for paragraph in (paragraph for article in found for paragraph in article["paragraphs"]):
        paragraph["qas"][-1]["question"] = "who " * 40 + "?"
    dataset = questions(tmp_path, found)
    torch.manual_seed(0)
    model: Any = build("learned", context=context, architecture=architecture, vocab_size=dataset.tokenizer.vocab_size)
    objective: Any = {"decoder": Causal, "encoder_decoder": SequenceToSequence}[architecture]
    chosen = np.arange(dataset.splits["test"].n)
    found_answers = answers(
        model, dataset, objective(objective.Config()), QAConfig(), chosen, split="test", context=context, **HERE
    )
    assert len(found_answers.texts) == len(chosen)
    assert found_answers.cut == len(chosen)


def test_scores_are_means_over_questions_and_spread_over_texts() -> None:
    scores = [Scores(1, 1), Scores(0, 0.5), Scores(1, 1), Scores(0, 0)]
    exact, f1 = summary(scores, [4, 4, 9, 7], axes={}, split="test")
    assert (exact.value, f1.value) == (0.5, 0.625)
    assert (exact.low, exact.high) == ratio_interval([1, 0, 1], [2, 1, 1])
    assert (f1.n_targets, f1.n_docs) == (4, 3)
    assert summary(scores, [1, 1, 1, 1], axes={})[0].low is None
