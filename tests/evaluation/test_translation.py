"""Scores of translations: sacrebleu's own on the whole set, intervals that hold it, sentences chosen as asked."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from ctxlab.data.pairs.dataset import PairDataset, prepare_pairs
from ctxlab.data.pairs.parallel import Pair, Parallel
from ctxlab.data.tokenizers.base import TOKENIZERS
from ctxlab.evaluation.translation import Translated, TranslationConfig, chosen_pairs, corpus_scores

WORDS = ["the", "a", "dog", "cat", "sees", "hears", "red", "blue", "house", "tree"]


def sentences(n: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) + "." for _ in range(n)]


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_scores_are_those_of_sacrebleu(wrong: float) -> None:
    """Also where no four words are right, and resampled scores are 0."""
    draw = random.Random(1)
    references = sentences(60, 0)
    said = [" ".join("x" if draw.random() < wrong else word for word in reference.split()) for reference in references]
    made = [Translated(Pair("", reference), text) for reference, text in zip(references, said, strict=True)]
    bleu, chrf = corpus_scores(made, TranslationConfig(), "test", {})
    assert bleu.value == pytest.approx(BLEU().corpus_score(said, [references]).score)
    assert chrf.value == pytest.approx(CHRF().corpus_score(said, [references]).score)
    for found in (bleu, chrf):
        assert found.low is not None
        assert found.high is not None
        assert found.low - 1e-9 <= found.value <= found.high + 1e-9
        assert (found.high - found.low > 0.5) == (0 < wrong < 1)
    assert bleu.protocol.startswith("nrefs:1|")
    assert "tok:13a|smooth:exp" in bleu.protocol


def data(tmp_path: Path) -> PairDataset:
    file = tmp_path / "pairs.tsv"
    lines = [f"source {n}" + " word" * (n % 6) + f"\ttarget {n}" for n in range(3000)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return prepare_pairs(Parallel.Config(path=str(file)), TOKENIZERS.config({"name": "byte"}), cache=tmp_path / "cache")


def test_pairs_are_chosen_by_words_and_thinned_out_evenly(tmp_path: Path) -> None:
    pairs = data(tmp_path)
    n = pairs.splits["test"].n
    everything = chosen_pairs(pairs, TranslationConfig(max_pairs="none"), "test")
    assert everything.tolist() == list(range(n))
    short = chosen_pairs(pairs, TranslationConfig(max_words=4), "test").tolist()
    assert short == [i for i in range(n) if len(pairs.text("test", i).source.split()) <= 4]
    assert 0 < len(short) < n
    thin = chosen_pairs(pairs, TranslationConfig(max_pairs=7), "test").tolist()
    assert thin == [i * n // 7 for i in range(7)]
