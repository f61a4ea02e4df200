"""A run that starts from another: what it takes over, what it may change, what does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctxlab.config.overrides import split
from ctxlab.config.prepare import prepare
from tests.train.builders import TINY, command, last_files, line, the_run, write_corpus

SMALL = (
    "context=32", "data=text", "tokenizer=byte", "optim.warmup_steps=2", "trainer=smoke", "trainer.max_steps=3",
    "trainer.batch_tokens=256", "trainer.precision=fp32", "eval=none", "profile.contexts=none", "logger.mode=disabled",
)  # fmt: skip
INHERITING = tuple(word for word in SMALL if word != "tokenizer=byte")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run named parent: alibi, tokens of a trained vocabulary of its own."""
    folder = tmp_path_factory.mktemp("init")
    write_corpus(folder / "other", seed=9, documents=60)
    words = ("position=alibi", "tokenizer=bpe", "tokenizer.vocab_size=300", "trainer.max_steps=3", "seed=5")
    assert command(folder, *line(folder, *words, name="parent")).code == 0
    return folder


def test_it_takes_over_model_position_tokenizer_and_weights(folder: Path) -> None:
    parent = the_run(folder, "parent")
    # A rate of next to nothing leaves the weights that it starts from.
    words = (f"data.path={folder / 'other'}", "optim=adamw", "optim.learning_rate=1e-12", "name=child")
    assert command(folder, "train", f"init={parent.id}", *INHERITING, *words).code == 0
    child = the_run(folder, "child")
    for part in ("model", "position", "attention", "tokenizer"):
        assert child.record.config[part] == parent.record.config[part], part
    assert child.record.config["position"]["name"] == "alibi"
    assert child.record.parent == parent.id
    for file in (parent.path / "tokenizer").iterdir():
        assert (child.path / "tokenizer" / file.name).read_bytes() == file.read_bytes()
    before = load_file(last_files(parent) / "weights.safetensors")
    after = load_file(last_files(child) / "weights.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-9, rtol=0, msg=name)
    assert child.record.provenance.data["tokenizer"]["sha256"] == parent.record.provenance.data["tokenizer"]["sha256"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            [f"model.{key}={value}" for key, value in (TINY | {"d_ff": 48}).items()],
            "blocks.0.feed_forward.down.weight is 16 x 32 there, 16 x 48 here, and 5 more differ",
        ),
        (["attention.sink=true"], "blocks.0.attention.mechanism.sink is absent there, 2 here, and 1 more differ"),
    ],
    ids=["wider", "a sink"],
)
def test_what_does_not_fit_is_refused_in_one_line(folder: Path, words: list[str], reason: str) -> None:
    parent = the_run(folder, "parent")
    ended = command(
        folder, "train", f"init={parent.id}", *INHERITING, *words, f"data.path={folder / 'text'}", "name=unfit"
    )
    assert ended.code == 2
    assert ended.stderr.splitlines()[-1] == f"error: init: the weights do not fit this model: {reason}"
    assert "Traceback" not in ended.stderr


def test_another_scheme_and_other_tokens_are_said_and_recorded(folder: Path) -> None:
    parent = the_run(folder, "parent")
    text = f"data.path={folder / 'other'}"
    words = (
        text,
        "position=learned",
        "tokenizer.sentinels=7",
        "optim=adamw",
        "optim.learning_rate=1e-12",
        "name=changed",
    )
    ended = command(folder, "train", f"init={parent.id}", *INHERITING, *words)
    assert ended.code == 0, ended.stderr
    assert "init: new, and drawn as in a fresh model, position.weight (32 x 16)" in ended.stderr
    assert "init: of embedding.weight 300 rows kept by their tokens, 7 new, each the mean of the run's" in ended.stderr
    child = the_run(folder, "changed")
    assert child.record.provenance.resolved["init"] == {
        "new": {"position.weight": [32, 16]},
        "vocabulary": {"kept": 300, "new": 7, "dropped": 0},
    }
    assert (child.path / "tokenizer" / "sentencepiece.model").read_bytes() == (
        parent.path / "tokenizer" / "sentencepiece.model"
    ).read_bytes()
    before = load_file(last_files(parent) / "weights.safetensors")["embedding.weight"]
    after = load_file(last_files(child) / "weights.safetensors")["embedding.weight"]
    torch.testing.assert_close(after[:300], before, atol=1e-9, rtol=0)
    torch.testing.assert_close(after[300:], before.mean(0).expand(7, -1), atol=1e-7, rtol=0)


def test_it_goes_on_when_the_run_it_came_from_is_gone(folder: Path) -> None:
    parent = the_run(folder, "parent")
    words = (f"data.path={folder / 'text'}", "trainer.checkpoint_every=1", "name=orphan")
    command(folder, "train", f"init={parent.id}", *INHERITING, *words, at_step=2)
    orphan = the_run(folder, "orphan")
    shutil.move(parent.path, folder / "elsewhere")
    try:
        assert command(folder, "train", f"resume={orphan.id}").code == 0
    finally:
        shutil.move(folder / "elsewhere", parent.path)
    assert the_run(folder, "orphan").record.status == "done"


def test_a_decoder_becomes_a_translator_and_goes_on_alone(folder: Path) -> None:
    """At a rate of next to nothing: what was taken over is there afterwards, and lines and record say what was not."""
    small = [word for word in SMALL if not word.startswith("data=")] + ["optim=adamw", "optim.learning_rate=1e-12"]
    text = f"data.path={folder / 'text'}"
    sizes = ("model=nano", *(f"model.{key}={value}" for key, value in TINY.items()))
    done = command(folder, "train", *small, *sizes, "data=text", text, "name=writer")
    assert done.code == 0, done.stderr
    (folder / "pairs.tsv").write_text("".join(f"un chat {n}\tone cat {n}\n" for n in range(300)), encoding="utf-8")
    words = ("data=parallel", "data.path=pairs.tsv", "model.architecture=encoder_decoder", "name=translator")
    inherited = [word for word in small if word != "tokenizer=byte"]
    done = command(folder, "train", f"init={the_run(folder, 'writer').id}", *inherited, *words)
    assert done.code == 0, done.stderr
    assert "init: the encoder begins as the run's decoder\ninit: the decoder begins as the run's decoder" in done.stderr
    words = ("data=text", text, "model.architecture=decoder", "name=alone")
    done = command(folder, "train", f"init={the_run(folder, 'translator').id}", *inherited, *words)
    assert done.code == 0, done.stderr
    writer, translator, alone = (
        load_file(last_files(the_run(folder, name)) / "weights.safetensors")
        for name in ("writer", "translator", "alone")
    )
    found = {name: the_run(folder, name).record.provenance.resolved["init"] for name in ("translator", "alone")}
    assert found["translator"]["stacks"] == {"encoder": "decoder", "decoder": "decoder"}
    assert found["alone"] == {
        "stacks": {"decoder": "decoder"},
        "dropped": {name: list(weight.shape) for name, weight in translator.items() if name not in writer},
    }
    assert set(found["translator"]["new"]) == {name for name in translator if "cross_attention" in name}
    for name, weight in writer.items():
        torch.testing.assert_close(alone[name], weight, atol=1e-8, rtol=0)
        if name != "embedding.weight":
            torch.testing.assert_close(translator[f"encoder.{name}"], weight, atol=1e-8, rtol=0)


def test_it_starts_from_the_mean_of_the_last_where_that_is_asked_for(folder: Path) -> None:
    words = ("trainer.max_steps=4", "trainer.checkpoint_every=1", "trainer.average=3", "optim.learning_rate=0.05")
    assert command(folder, *line(folder, *words, name="averaged")).code == 0
    run = the_run(folder, "averaged")
    files = [load_file(run.checkpoints / f"step-00000{step}" / "weights.safetensors") for step in (2, 3, 4)]
    asked = (
        f"data.path={folder / 'text'}",
        "optim=adamw",
        "optim.learning_rate=1e-12",
        "checkpoint=average",
        "name=mean",
    )
    done = command(folder, "train", f"init={run.id}", *INHERITING, *asked)
    assert done.code == 0, done.stderr
    after = load_file(last_files(the_run(folder, "mean")) / "weights.safetensors")
    assert after.keys() == files[0].keys()
    for name, weight in after.items():
        mean = torch.stack([file[name].double() for file in files]).mean(0)
        torch.testing.assert_close(weight.double(), mean, atol=1e-7, rtol=0)
        assert name.endswith("norm.weight") or not torch.allclose(weight, files[-1][name], atol=1e-4)
    again = (f"init={the_run(folder, 'parent').id}", *INHERITING, f"data.path={folder / 'text'}")
    refused = command(folder, "train", *again, "checkpoint=average")
    assert refused.code == 2
    assert "checkpoint=average: " in refused.stderr
    assert "has no 'average' checkpoint; a run keeps what is averaged with trainer.average=5" in refused.stderr


def test_a_checkpoint_is_one_of_another_run() -> None:
    (cell,) = prepare(split("train", ["checkpoint=best"])).cells
    assert cell.skipped == "checkpoint: says which weights of another run to start from; add init=RUN"
