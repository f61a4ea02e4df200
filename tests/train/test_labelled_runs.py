"""Runs on questions and labelled texts, as a user starts them: from a pretrained run, with frozen parts, killed and resumed."""

from __future__ import annotations

import random
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctxlab.train.checkpoint import open_run
from tests.data.labelled.builders import articles, lines, question, write_squad
from tests.train.builders import TINY, command, computed, last_files, line, the_run

SIZES = ("model=nano", *(f"model.{key}={value}" for key, value in TINY.items()), "tokenizer=byte")
HOW = (
    "trainer.max_tokens=none", "trainer.batch_tokens=512", "trainer.precision=fp32", "logger.mode=disabled",
    "profile.contexts=none",
)  # fmt: skip
WORDS = ("we", "say", "what", "they", "do", "not", "know", "of", "you", "and", "me")
PLACES = ("first", "second", "last")
SQUAD = ("data=squad", "data.path=squad.json")
LABELS = ("data=classification", "data.path=texts.tsv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions, labelled texts, and a run named pre: an encoder that was trained on hidden words."""
    folder = tmp_path_factory.mktemp("labelled")
    write_squad(folder / "squad.json", articles())
    (folder / "texts.tsv").write_text("\n".join(lines()) + "\n", encoding="utf-8")
    words = ("objective=masked", "model.architecture=encoder", "trainer.max_steps=2", "trainer.max_tokens=none")
    done = command(folder, *line(folder, *words, name="pre"))
    assert done.code == 0, done.stderr
    return folder


def test_a_pretrained_encoder_gets_a_head_and_keeps_what_is_frozen(folder: Path) -> None:
    parent = the_run(folder, "pre")
    words = ("context=80", "trainer.max_steps=3", "trainer.freeze=[embedding,blocks.0]", "name=fine")
    done = command(folder, "train", f"init={parent.id}", *SQUAD, *HOW, *words)
    assert done.code == 0, done.stderr
    assert (
        "init: new, and drawn as in a fresh model, task_head.ends.weight (2 x 16), task_head.ends.bias (2)"
        in done.stderr
    )
    run = the_run(folder, "fine")
    assert run.record.parent == parent.id
    assert run.record.config["objective"]["name"] == "extractive"
    assert run.record.provenance.resolved["init"]["new"] == {
        "task_head.ends.weight": [2, 16],
        "task_head.ends.bias": [2],
    }
    before, after = (load_file(last_files(one) / "weights.safetensors") for one in (parent, run))
    new = {name for name in after if name.startswith("task_head.")}
    assert after.keys() - new == before.keys()
    assert after["task_head.ends.weight"].shape == (2, TINY["d_model"])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if name.startswith(("embedding.", "blocks.0."))]
    found = {(m.name, m.axes.get("baseline", "")) for m in run.measurements()}
    assert found == {(name, of) for name in ("exact_match", "f1") for of in ("", "majority", "untuned")}
    items = run.items()
    assert len(items) == 12
    assert all(item.task == "qa" and len(item.wanted) == 2 and item.answer is not None for item in items)
    assert re.search(r"exact match +f1\n", done.stdout)
    assert "training's most frequent" in done.stdout
    loaded = open_run(run)
    assert torch.equal(loaded.model.task_head.ends.weight, after["task_head.ends.weight"])  # type: ignore[union-attr]


def test_a_head_goes_on_where_the_task_does(folder: Path) -> None:
    """Of the same task and labels a run's head is taken over; the untuned model beside it is then the one before this run."""
    first = ("context=40", "trainer.max_steps=3", "name=labels", "model.architecture=encoder")
    assert command(folder, "train", *LABELS, *SIZES, *HOW, *first).code == 0
    run = the_run(folder, "labels")
    still = ("optim=adamw", "optim.learning_rate=1e-12", "trainer.max_steps=1", "context=40")
    done = command(folder, "train", f"init={run.id}", *LABELS, *HOW, *still, "name=on")
    assert done.code == 0, done.stderr
    assert "init:" not in done.stderr
    weights = [load_file(last_files(the_run(folder, name)) / "weights.safetensors") for name in ("labels", "on")]
    torch.testing.assert_close(
        weights[0]["task_head.choose.weight"], weights[1]["task_head.choose.weight"], atol=1e-9, rtol=0
    )
    # Other labels, as many: the head is another.
    (folder / "other.tsv").write_text("\n".join(lines()).replace("\tgood", "\tzood") + "\n", encoding="utf-8")
    done = command(
        folder, "train", f"init={run.id}", "data=classification", "data.path=other.tsv", *HOW, *still, "name=other"
    )
    assert done.code == 0, done.stderr
    assert "new, and drawn as in a fresh model, task_head.choose.weight (2 x 16)" in done.stderr


@pytest.mark.parametrize(
    "kind",
    [
        "extractive",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("causal", "seq2seq", "encoder", "decoder")),
    ],
)
def test_killed_and_resumed_it_is_the_same_to_the_last_bit(folder: Path, kind: str) -> None:
    said = {
        "extractive": (
            *SQUAD,
            "model.architecture=encoder",
            "context=64",
            "model.head_layer=true",
            "model.activation=gelu",
        ),
        "causal": (*SQUAD, "objective=causal", "context=160", "eval.qa.max_questions=4"),
        "seq2seq": (
            *SQUAD,
            "objective=seq2seq",
            "model.architecture=encoder_decoder",
            "context=96",
            "eval.qa.max_questions=4",
        ),
        "encoder": (*LABELS, "model.architecture=encoder", "context=24", "objective.label_smoothing=0.1"),
        "decoder": (*LABELS, "context=24"),
    }[kind]
    words = ("train", *said, *SIZES, *HOW, "trainer.max_steps=7", "trainer.checkpoint_every=3", "trainer.validate_every=3",
             "trainer.micro_batch=2", "model.dropout=0.1", "data.workers=1")  # fmt: skip
    done = command(folder, *words, f"name=whole-{kind}")
    assert done.code == 0, done.stderr
    assert command(folder, *words, f"name=killed-{kind}", at_step=5).code == -signal.SIGKILL
    run = the_run(folder, f"killed-{kind}")
    done = command(folder, "train", f"resume={run.id}")
    assert done.code == 0, done.stderr
    run, whole = the_run(folder, f"killed-{kind}"), the_run(folder, f"whole-{kind}")
    assert computed(run.metrics()) == computed(whole.metrics())
    assert [m.value for m in run.measurements()] == [m.value for m in whole.measurements()]
    for name in ("weights.safetensors", "training.pt"):
        assert (last_files(run) / name).read_bytes() == (last_files(whole) / name).read_bytes(), name


@pytest.mark.parametrize(
    ("kind", "task"),
    [("labels", (*LABELS, "context=24")), pytest.param("spans", (*SQUAD, "context=64"), marks=pytest.mark.slow)],
)
def test_beside_adapters_the_head_of_a_task_is_learned_and_resumes_to_the_last_bit(
    folder: Path, kind: str, task: tuple[str, ...]
) -> None:
    pytest.importorskip("peft")
    parent = the_run(folder, "pre")
    words = ("train", f"init={parent.id}", *task, *HOW, "trainer.max_steps=7", "trainer.checkpoint_every=3", "optim=adamw",
             "trainer.micro_batch=2", "trainer.lora.r=2", "trainer.lora.dropout=0.1", "optim.learning_rate=0.01")  # fmt: skip
    done = command(folder, *words, f"name=lora-{kind}")
    assert done.code == 0, done.stderr
    assert "init: new, and drawn as in a fresh model, task_head." in done.stderr
    assert command(folder, *words, f"name=killed-lora-{kind}", at_step=5).code == -signal.SIGKILL
    whole, run = the_run(folder, f"lora-{kind}"), the_run(folder, f"killed-lora-{kind}")
    done = command(folder, "train", f"resume={run.id}")
    assert done.code == 0, done.stderr
    whole, run = the_run(folder, f"lora-{kind}"), the_run(folder, f"killed-lora-{kind}")
    assert computed(run.metrics()) == computed(whole.metrics())
    assert [m.value for m in run.measurements()] == [m.value for m in whole.measurements()]
    for name in ("weights.safetensors", "adapters.safetensors", "training.pt"):
        assert (last_files(run) / name).read_bytes() == (last_files(whole) / name).read_bytes(), name
    before, after, learned = (
        load_file(last_files(one) / f"{name}.safetensors")
        for one, name in ((parent, "weights"), (whole, "weights"), (whole, "adapters"))
    )
    heads = {name: weight for name, weight in after.items() if name.startswith("task_head.")}
    assert len(heads) == 2
    assert all(torch.equal(weight, learned[name]) for name, weight in heads.items())
    (bias,) = (weight for name, weight in heads.items() if name.endswith("bias"))
    assert (bias != 0).all()  # where it begins
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved == {name for name in before if name.endswith((".query.weight", ".value.weight"))}


def write_dialogues(folder: Path) -> None:
    """Three speeches by three people of made-up names, no play's names in another: who speaks first, second, last?"""
    draw = random.Random(3)
    syllables = [a + b for a in "BDFGKLMNPRST" for b in "AEIOU"]
    data, text = [], []
    for number in range(60):
        cast = ["".join(draw.choices(syllables, k=draw.choice((2, 3)))) for _ in range(8)]
        paragraphs = []
        for _ in range(30):
            names = draw.sample(cast, 3)
            speeches = [f"**{name}**\n{' '.join(draw.choices(WORDS, k=3))}.\n\n" for name in names]
            passage = "".join(speeches)
            qas = [question(f"Who speaks {place}?", passage, name) for place, name in zip(PLACES, names, strict=True)]
            paragraphs.append({"context": passage, "qas": qas})
            text.append(passage)
        data.append({"title": f"play {number}", "paragraphs": paragraphs})
    write_squad(folder / "dialogues.json", data)
    (folder / "dialogues.txt").write_text("".join(text), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_fine_tuned_it_answers_what_neither_a_guess_nor_the_untuned_model_does(tmp_path: Path, seed: int) -> None:
    write_dialogues(tmp_path)
    sizes = ("model=nano", "model.d_model=64", "model.n_layers=2", "model.architecture=encoder", "tokenizer=bpe",
             "tokenizer.vocab_size=400")  # fmt: skip
    how = (*HOW[:1], "trainer.batch_tokens=2048", *HOW[2:], f"seed={seed}", "context=64")
    pre = ("objective=masked", "data=text", "data.path=dialogues.txt", "trainer.max_steps=100", "name=reader")
    done = command(tmp_path, "train", *pre, *sizes, *how)
    assert done.code == 0, done.stderr
    fine = ("data=squad", "data.path=dialogues.json", "trainer.max_steps=300", "name=answers")
    done = command(tmp_path, "train", f"init={the_run(tmp_path, 'reader').id}", *fine, *how)
    assert done.code == 0, done.stderr
    found = {
        m.axes.get("baseline", ""): m.value
        for m in the_run(tmp_path, "answers").measurements()
        if m.name == "exact_match"
    }
    assert found[""] > 0.6  # type: ignore[operator]
    assert max(found["majority"], found["untuned"]) < 0.1  # type: ignore[type-var, operator]
