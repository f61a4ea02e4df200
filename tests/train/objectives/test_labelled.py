"""Rows of questions and of labelled texts: what a model reads of them, and what it is to say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ctxlab.data.by_length import Examples, ExampleStream
from ctxlab.data.labelled.prompts import Prompts
from ctxlab.data.labelled.questions import NONE
from ctxlab.data.stream import Batch
from ctxlab.data.windows import IGNORED
from ctxlab.errors import DataError
from ctxlab.train.objectives.causal import Causal
from ctxlab.train.objectives.classification import Classification
from ctxlab.train.objectives.extractive import Extractive
from ctxlab.train.objectives.seq2seq import SequenceToSequence
from tests.data.labelled.builders import articles, questions, texts


@pytest.mark.parametrize(("context", "stride"), [(128, "auto"), (32, "auto"), (32, 3), (32, 99), (28, 1)])
def test_segments_hold_the_question_and_together_the_passage(tmp_path: Path, context: int, stride: int | str) -> None:
    dataset = questions(tmp_path, articles(impossible=True))
    tokenizer, split = dataset.tokenizer, dataset.splits["train"]
    segments = Extractive(Extractive.Config(stride=stride)).examples(dataset, "train", context)
    assert (segments.tokens <= context).all()
    for index in range(0, split.n, 5):
        gold, passage = split.gold(index), split.tokens_of_passage(index)
        read = np.zeros(len(passage), dtype=int)
        for row in np.flatnonzero(segments.question == index).tolist():
            tokens, targets, _, _ = segments.row(row)
            assert len(tokens) == segments.tokens[row]
            asked = tokenizer.encode(gold.question)
            front = len(asked) + 2
            assert tokens[:front].tolist() == [tokenizer.bos_id, *asked, tokenizer.eos_id]
            assert tokens[-1] == tokenizer.eos_id
            first = int(segments.first[row])
            assert (tokens[front:-1] == passage[first : first + len(tokens) - front - 1]).all()
            read[first : first + len(tokens) - front - 1] += 1
            start, end = targets.tolist()
            if start:
                assert tokenizer.decode(tokens[start : end + 1].tolist()) == gold.answers[0]
            else:
                assert end == 0
                place = split.spans[index]
                inside = place[0] >= first and place[1] < first + len(tokens) - front - 1
                assert place[0] == NONE or not inside
        assert (read > 0).all(), "every token is in a segment"
        if stride == 99:  # more than the room: segments follow one another
            assert (read == 1).all()


def test_a_question_is_cut_and_a_context_without_room_refused(tmp_path: Path) -> None:
    dataset = questions(tmp_path)
    short = Extractive(Extractive.Config(max_question=4)).examples(dataset, "train", 64)
    assert dataset.tokenizer.decode(short.row(0).tokens[:6].tolist()) == "Who "
    longest = int(dataset.splits["train"].question.sizes.max())
    with pytest.raises(DataError, match=f"the nearest valid value is {longest + 4}"):
        Extractive(Extractive.Config()).examples(dataset, "train", longest + 3)
    assert Extractive(Extractive.Config()).examples(dataset, "train", longest + 4).kept.size


def test_a_decoder_answers_behind_the_prompt_and_the_answer_alone_is_scored(tmp_path: Path) -> None:
    dataset = questions(tmp_path, articles(impossible=True))
    tokenizer, split = dataset.tokenizer, dataset.splits["train"]
    rows = Causal(Causal.Config()).examples(dataset, "train", 256)
    assert rows.kept.tolist() == list(range(split.n))
    for index in range(8):
        gold = split.gold(index)
        tokens, targets, _, source = rows.row(index)
        said = f" {gold.answers[0]}" if gold.answers else ""
        passage = tokenizer.decode(split.tokens_of_passage(index).tolist())
        assert source is None
        assert tokens[0] == tokenizer.bos_id
        assert tokenizer.decode(tokens.tolist()) == f"question: {gold.question} context: {passage} answer:{said}"
        scored = targets[targets != IGNORED].tolist()
        assert scored == [*tokenizer.encode(said), tokenizer.eos_id]
        assert len(scored) == rows.targets[index]
        assert len(tokens) == rows.tokens[index]
        assert (
            targets[:-1][targets[:-1] != IGNORED].tolist() == tokens[1:][-len(scored) + 1 :].tolist()[: len(scored) - 1]
        )


def test_an_encoder_decoder_reads_the_prompt_and_writes_the_answer(tmp_path: Path) -> None:
    dataset = questions(tmp_path)
    tokenizer, split = dataset.tokenizer, dataset.splits["test"]
    rows = SequenceToSequence(SequenceToSequence.Config()).examples(dataset, "test", 128)
    for index in range(split.n):
        gold = split.gold(index)
        tokens, targets, _, source = rows.row(index)
        passage = tokenizer.decode(split.tokens_of_passage(index).tolist())
        answer = tokenizer.encode(f" {gold.answers[0]}")
        assert source is not None
        assert tokenizer.decode(source.tolist()) == f"question: {gold.question} context: {passage}"
        assert source[-1] == tokenizer.eos_id
        assert tokens.tolist() == [tokenizer.bos_id, *answer]
        assert targets.tolist() == [*answer, tokenizer.eos_id]
        assert len(tokens) + len(source) == rows.tokens[index]


@pytest.mark.parametrize("apart", [False, True])
def test_a_passage_loses_its_end_and_answers_there_are_not_learned(tmp_path: Path, apart: bool) -> None:
    dataset = questions(tmp_path)
    split = dataset.splits["train"]
    rows = Prompts(dataset, "train", 64, apart=apart)
    assert 0 < len(rows.kept) < split.n
    for index in range(split.n):
        tokens, _, _, source = rows.row(index) if rows.rooms[index] > 0 else (None, None, (), None)
        if index in rows.kept:
            read = source if apart else tokens
            assert read is not None
            assert len(read) <= 64
            behind = dataset.tokenizer.decode(read.tolist()).partition(" context: ")[2]
            assert split.gold(index).answers[0] in behind
        elif rows.rooms[index] > 0:
            assert split.spans[index, 1] >= rows.rooms[index]
    with pytest.raises(DataError, match="no answer of the train split stands within 24 tokens"):
        _ = Prompts(dataset, "train", 24, apart=apart).kept


@pytest.mark.parametrize("apart", [False, True])
def test_a_question_longer_than_the_context_loses_its_end(tmp_path: Path, apart: bool) -> None:
    """It is read as far as it leaves the passage a quarter of what the fixed words and the answer leave."""
    found = articles()
    for paragraph in (paragraph for article in found for paragraph in article["paragraphs"]):
        paragraph["qas"][-1]["question"] = "who " * 40
    dataset = questions(tmp_path, found)
    split, tokenizer = dataset.splits["train"], dataset.tokenizer
    rows = Prompts(dataset, "train", 80, apart=apart)
    fixed = len("question:  context: ") + (1 if apart else len(" answer:") + 1)  # eos, or bos in front
    for index in range(split.n):
        tokens, _, _, source = rows.row(index)
        answer = int(split.answer.sizes[index])
        read = source if apart else tokens[: len(tokens) - answer]
        assert read is not None
        room = 80 - fixed - (0 if apart else answer)
        asked, _, passage = tokenizer.decode(read.tolist()).removeprefix("question: ").partition(" context: ")
        assert len(read) == 80 - (0 if apart else answer), "no room is left empty"
        assert len(tokens) + (len(source) if source is not None else 0) == rows.tokens[index]
        if split.question.sizes[index] > 80:
            assert asked == ("who " * 40)[: room - room // 4]
            assert len(passage.removesuffix(" answer:").encode()) == room // 4
        else:
            assert asked == split.gold(index).question
        assert rows.prompt(index, answer)[1]


def test_texts_lose_their_end_and_keep_their_label(tmp_path: Path) -> None:
    dataset = texts(tmp_path)
    tokenizer, split = dataset.tokenizer, dataset.splits["train"]
    rows = Classification(Classification.Config()).examples(dataset, "train", 25)
    assert 0 < rows.cut.sum() < split.n
    for index in range(split.n):
        tokens, targets, _, _ = rows.row(index)
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        text = tokenizer.decode(split.text.sentence(index).tolist())
        assert tokenizer.decode(tokens.tolist()) == text[:23]
        assert bool(rows.cut[index]) == (len(text) > 23)
        assert dataset.labels[targets[0]] == ("good" if "fine" in text else "bad")
        assert len(tokens) == rows.tokens[index]


def read(batch: Batch) -> list[list[int]]:
    """The rows of a batch without their padding."""
    return [tokens[:length].tolist() for tokens, length in zip(batch.tokens, batch.lengths)]


def batches(examples: Examples, **shares: int) -> ExampleStream:
    return ExampleStream(examples, batch_tokens=400, seed=3, **{"n_steps": 40, **shares})


def test_an_epoch_reads_every_example_once_in_batches_of_like_lengths(tmp_path: Path) -> None:
    examples = Extractive(Extractive.Config()).examples(questions(tmp_path), "train", 40)
    stream = batches(examples)
    for epoch in range(2):
        numbers = range(epoch * stream.order.n_batches, (epoch + 1) * stream.order.n_batches)
        seen = [stream.order.batch(number) for number in numbers]
        assert sorted(np.concatenate(seen).tolist()) == list(range(len(examples.tokens)))
        for number, some in zip(numbers, seen, strict=True):
            batch = stream[number]
            assert batch.n_targets_in_step == 2 * len(some)
            assert batch.targets.shape == (len(some), 2)
            assert batch.tokens.shape == (len(some), int(examples.tokens[some].max()))


def test_ranks_and_micro_batches_share_a_step_and_know_all_its_targets(tmp_path: Path) -> None:
    examples = Classification(Classification.Config()).examples(texts(tmp_path), "train", 40)
    whole = batches(examples)
    shared = [batches(examples, rank=rank, world=3, n_micro=2) for rank in range(3)]
    for step in range(5):
        parts = [stream[2 * step + micro] for stream in shared for micro in range(2)]
        assert all(part.n_targets_in_step == whole[step].n_targets_in_step for part in parts)
        rows = [text for part in parts for text, target in zip(read(part), part.targets) if target != IGNORED]
        assert sorted(rows) == sorted(read(whole[step]))
