"""Runs on pairs and on spoilt text, as a user starts them: they learn, translate, and resume to the last bit."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from ctxlab.records.store import RunStore
from ctxlab.train.checkpoint import open_run
from tests.train.builders import command, computed, ended, last_files, started, the_run

WORDS = {"un": "one", "deux": "two", "trois": "three", "rouge": "red", "bleu": "blue", "chat": "cat", "chien": "dog"}
SMALL = (
    "train", "data=parallel", "data.path=pairs.tsv", "tokenizer=byte", "model=nano",
    "model.architecture=encoder_decoder", "model.d_model=48", "model.n_heads=3", "model.n_layers=2", "model.d_ff=96",
    "context=48", "trainer.precision=fp32", "logger.mode=disabled", "profile.contexts=none",
)  # fmt: skip


def write_pairs(folder: Path, n: int = 4000) -> None:
    """Sentences of four words, translated word by word in the other order: a toy language that needs every token.

    Of fewer words BLEU counts no four in a row and is 0.
    """
    draw = random.Random(0)
    lines = []
    for _ in range(n):
        words = draw.choices(sorted(WORDS), k=4)
        lines.append(" ".join(words) + "\t" + " ".join(WORDS[word] for word in reversed(words)))
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.slow
def test_it_learns_to_translate(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    done = command(tmp_path, *SMALL, "trainer.max_steps=500", "trainer.max_tokens=none", "name=toy",
                   "trainer.batch_tokens=2048", "optim.learning_rate=1e-2", "eval.translation.num_beams=2")  # fmt: skip
    assert done.code == 0, done.stderr
    run = the_run(tmp_path, "toy")
    found = {m.name: m for m in run.measurements()}
    assert found["bleu"].value is not None
    assert found["bleu"].value > 95
    assert "13a" in found["bleu"].protocol
    items = run.items()
    assert len(items) == found["bleu"].n_docs
    assert sum(item.answer == item.wanted[1] for item in items) > 0.9 * len(items)
    loaded = open_run(run)
    assert loaded.generate("un chat rouge deux", temperature=0) == "two red cat one"
    assert loaded.texts(["un chat rouge", "deux chien bleu"]) != ["", ""]
    rows = [row for row in run.metrics() if row["split"] == "train"]
    assert all(row["loss"] > row["nats_per_token"] for row in rows[len(rows) // 2 :]), "smoothed loss, plain nats"


@pytest.mark.parametrize(
    "kind",
    ["pairs", "apart", "spans", *(pytest.param(k, marks=pytest.mark.slow) for k in ("berts", "masked", "prefix"))],
)
def test_killed_and_resumed_it_is_the_same_to_the_last_bit(tmp_path: Path, kind: str) -> None:
    said = {
        "pairs": SMALL,
        "apart": (
            *SMALL[:3],
            *SMALL[4:],
            "tokenizer=bpe",
            "tokenizer.vocab_size=300",
            "tokenizer.separate=true",
            "model.share_embeddings=false",
        ),
        "berts": (*SMALL[:4], *SMALL[6:], "model=bert2bert", "model.attention_dropout=0.1"),
        "prefix": ("train", "objective=prefix"),
        "masked": ("train", "objective=masked", "model.architecture=encoder"),
        "spans": ("train", "objective=span_corruption", "model.architecture=encoder_decoder", "tokenizer.sentinels=40"),
    }[kind]
    if kind == "berts":
        pytest.importorskip("transformers")
    write_pairs(tmp_path, 400)
    of_pairs = kind in ("pairs", "apart", "berts")
    if not of_pairs:
        text = "\n\n".join(" ".join(random.Random(n).choices(sorted(WORDS), k=60)) for n in range(40))
        (tmp_path / "text.txt").write_text(text, encoding="utf-8")
        said += ("data=text", "data.path=text.txt", *SMALL[3:5], *SMALL[6:])
    said += ("trainer.max_steps=9", "trainer.max_tokens=none", "trainer.batch_tokens=192", "trainer.micro_batch=2",
             "trainer.checkpoint_every=4", "trainer.validate_every=3", "model.dropout=0.1", "data.workers=1",
             "eval.translation.max_pairs=4" if of_pairs else "eval.objective.rows=4")  # fmt: skip
    done = command(tmp_path, *said, "name=whole")
    assert done.code == 0, done.stderr
    assert command(tmp_path, *said, "name=killed", at_step=6).code == -signal.SIGKILL
    run = the_run(tmp_path, "killed")
    done = command(tmp_path, "train", f"resume={run.id}")
    assert done.code == 0, done.stderr
    run, whole = the_run(tmp_path, "killed"), the_run(tmp_path, "whole")
    assert (run.record.status, run.record.attempt) == ("done", 2)
    assert computed(run.metrics()) == computed(whole.metrics())
    assert [m.value for m in run.measurements()] == [m.value for m in whole.measurements()]
    for name in ("weights.safetensors", "training.pt"):
        assert (last_files(run) / name).read_bytes() == (last_files(whole) / name).read_bytes(), name


def test_pairs_that_are_all_too_long_to_validate_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """Of 600 pairs 15 fit 8 bytes, and the validation split, which sentences fall into by their hash, has none of them."""
    words = [0 if n % 40 == 0 else 6 for n in range(600)]
    lines = [f"s{n}{' word' * more}\tt{n}{' w' * more}" for n, more in enumerate(words)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    done = command(tmp_path, *SMALL[:-4], *SMALL[-3:], "context=8", "trainer.max_steps=2", "trainer.batch_tokens=64",
                   "name=long")  # fmt: skip
    assert done.code == 2
    assert done.stderr.splitlines()[-1] == (
        "error: context: no pair of the validation split is as short as 8 tokens; the nearest valid value is 35"
    )
    assert RunStore(tmp_path / "runs").runs() == [], "refused before there was a run"


@pytest.mark.slow
def test_two_ranks_train_and_validate_as_one(tmp_path: Path) -> None:
    write_pairs(tmp_path, 400)
    rows = {}
    for devices in (1, 2):
        words = (*SMALL, f"trainer.devices={devices}", "trainer.max_steps=4", "trainer.max_tokens=none",
                 "trainer.batch_tokens=300", f"name=by-{devices}", "eval.translation.max_pairs=4")  # fmt: skip
        with started(tmp_path, *words) as process:
            assert ended(process).code == 0
        rows[devices] = the_run(tmp_path, f"by-{devices}").metrics()
    assert len(rows[1]) == len(rows[2]) > 4
    for one, two in zip(rows[1], rows[2], strict=True):
        for key in ("split", "step", "tokens"):
            assert one.get(key) == two.get(key)
        for key in ("loss", "nats_per_token", "gradient_norm"):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=2e-5), (one["step"], key)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data=parallel", "model.architecture=encoder_decoder"), "data.path: it takes a file of sentence pairs"),
        (("data=parallel", "data.path=pairs.tsv"), "objective: seq2seq trains model.architecture=encoder_decoder or bert2bert,"),
        ((*SMALL[1:], "eval=perplexity"), "eval.perplexity: data=parallel is scored by translation; use eval=translation"),
        (("model=nano", "eval=translation"), "eval.translation: data=shakespeare has nothing for it; use data=parallel"),
        (("objective=masked", "model=nano"), "objective: masked trains model.architecture=encoder, not decoder; use objective="),
        (("objective=masked", "model=nano", "model.architecture=encoder", "eval=perplexity"), "eval.perplexity: objective="),
        (("objective=seq2seq", "model=nano", "model.architecture=encoder_decoder"), "objective: seq2seq does not go with data="),
        ((*SMALL[1:], "trainer.context_schedule=[{context:16,share:0.5}]"), "trainer.context_schedule: the examples of"),
        ((*SMALL[1:], "position=alibi"), "position.name: alibi tells no order without a causal mask"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    write_pairs(tmp_path, 200)
    done = command(tmp_path, "train", *words)
    assert done.code == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {said}")
    assert not (tmp_path / "runs").exists()
