"""Runs on pairs through every command: two BERTs, and sources with tokens of their own."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import ctxlab as package
from ctxlab.cli.commands import attention, generate
from ctxlab.data.tokenizers.base import load_tokenizer
from ctxlab.records.run import Run
from ctxlab.records.store import RunStore
from ctxlab.train import precision
from ctxlab.train.checkpoint import load_run
from tests.cli.lines import alone, ctxlab

# Two alphabets that share nothing but the space, so that a tokenizer of one has only bytes for the other.
WORDS = {"один": "one", "два": "two", "три": "three", "красный": "red", "синий": "blue", "кот": "cat", "пёс": "dog"}
PAIRS = (
    "data=parallel", "data.path=pairs.tsv", "context=40", "trainer.max_steps=3", "trainer.max_tokens=none",
    "trainer.batch_tokens=256", "trainer.precision=fp32", "profile.contexts=none", "logger.mode=disabled",
    "eval.translation.max_pairs=4", "optim=adamw",
)  # fmt: skip
SIZES = ("model.d_model=32", "model.n_heads=4", "model.n_layers=1", "model.d_ff=48")
NATIVE = ("model=chapter_example", *SIZES, "model.n_encoder_layers=1", "model.head_dim=8")
BERTS = ("model=bert2bert", *SIZES, "model.n_encoder_layers=1")
APART = ("tokenizer=unigram", "tokenizer.vocab_size=300", "tokenizer.separate=true")


def the_run(stem: str) -> Run:
    (run,) = (run for run in RunStore(Path("runs")).runs() if run.id.startswith(f"{stem}-"))
    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of pairs, where lines are typed."""
    alone(monkeypatch, tmp_path)
    draw = random.Random(0)
    lines = []
    for _ in range(400):
        words = draw.choices(sorted(WORDS), k=3)
        lines.append(" ".join(words) + "\t" + " ".join(WORDS[word] for word in reversed(words)))
    Path("pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_a_run_trained_in_fp32_writes_and_is_drawn_in_fp32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine too where bf16 is fast, and `auto` would be bf16."""
    (folder / "cpuinfo").write_text("flags : avx512_bf16\n", encoding="utf-8")
    monkeypatch.setattr(precision, "_CPUINFO", folder / "cpuinfo")
    assert ctxlab("train", *PAIRS, *NATIVE, "tokenizer=byte", "name=exact").code == 0
    asked: list[str] = []
    for command in (generate, attention):
        monkeypatch.setattr(command, "autocast", lambda asks, _: asked.append(asks) or nullcontext())
    words = "decoding.max_new_tokens=1", "trainer.precision=auto"
    assert ctxlab("generate", "exact", "красный", *words).code == 0
    assert ctxlab("attention", "exact", "красный", "target=red", words[1]).code == 0
    assert asked
    assert set(asked) == {"fp32"}


def test_sources_have_tokens_of_their_own_in_every_command(folder: Path) -> None:
    done = ctxlab("train", *PAIRS, *NATIVE, *APART, "model.share_embeddings=false", "name=apart")
    assert done.code == 0, done.err
    run = the_run("apart")
    source, target = load_tokenizer(run.path / "source_tokenizer"), load_tokenizer(run.path / "tokenizer")
    facts = run.record.provenance.data
    assert (facts["source_tokenizer"]["sha256"], facts["tokenizer"]["sha256"]) == (source.sha256, target.sha256)
    assert run.record.artifacts["source_tokenizer"] == "source_tokenizer"
    assert len(source.encode("красный кот")) < 11 < len(target.encode("красный кот"))
    assert len(target.encode("red cat")) < 7 <= len(source.encode("red cat"))

    loaded = package.load("last")
    assert loaded.model.vocab_size == target.vocab_size
    assert loaded.model.encoder.embedding.weight.shape[0] == source.vocab_size
    scored = {m.name: m for m in run.measurements()}
    assert scored["bleu"].n_docs == 4
    for item in run.items():
        assert set(item.wanted[0].split()) <= set(WORDS)
        assert set(item.wanted[1].split()) <= set(WORDS.values())

    # What a line says is what the model says of the source's own tokens.
    encoded = loaded.model.encode(torch.tensor([[*source.encode("красный кот"), source.eos_id]]))
    x = torch.tensor([[target.bos_id]])
    with torch.no_grad():
        first = int(loaded.model.logits(loaded.model.hidden(x, encoded=encoded))[0, -1].argmax())
    said = ctxlab("generate", run.id, "красный кот", "decoding.temperature=0", "decoding.max_new_tokens=1")
    assert (said.code, said.out) == (0, target.decode([first]) + "\n"), said.err
    beam = ctxlab("generate", run.id, "красный кот", "decoding.num_beams=2", "decoding.max_new_tokens=4")
    assert beam.code == 0, beam.err

    seen = ctxlab("attention", run.id, "красный кот", "target=cat red", "file=some.html")
    assert seen.code == 0, seen.err
    assert "source: красный кот" in seen.out
    assert "target: cat red" in seen.out

    again = ctxlab("eval", run.id, "eval.translation.max_pairs=4", "profile.contexts=none", "logger.mode=disabled")
    assert again.code == 0, again.err
    (evaluated,) = (one for one in RunStore(Path("runs")).runs() if one.record.command == "eval")
    assert [(m.name, m.value) for m in evaluated.measurements()] == [(m.name, m.value) for m in run.measurements()]

    child = ctxlab("train", f"init={run.id}", *PAIRS, "name=child")
    assert child.code == 0, child.err
    for name in ("tokenizer", "source_tokenizer"):
        kept = load_tokenizer(the_run("child").path / name)
        assert kept.sha256 == load_tokenizer(run.path / name).sha256
    gone_on = ctxlab("train", f"resume={the_run('child').id}", "trainer.max_steps=5")
    assert gone_on.code == 0, gone_on.err
    assert the_run("child").record.provenance.data["source_tokenizer"] == facts["source_tokenizer"]


def test_two_berts_in_every_command(folder: Path) -> None:
    pytest.importorskip("transformers")
    done = ctxlab("train", *PAIRS, *BERTS, *APART, "name=berts")
    assert done.code == 0, done.err
    run = the_run("berts")
    assert (run.record.config["position"], run.record.config["attention"]) == ("none", "none")
    loaded = load_run(run.id, runs="runs")
    assert run.record.parameters["all"] == loaded.model.n_parameters()
    assert {m.name for m in run.measurements()} >= {"bleu", "chrf", "nats_per_token"}

    for how in (("decoding.temperature=0",), ("decoding.num_beams=3",), ("decoding.top_k=5", "seed=2")):
        said = [ctxlab("generate", run.id, "красный кот", "decoding.max_new_tokens=8", *how) for _ in range(2)]
        assert said[0].code == 0, said[0].err
        assert said[0].out == said[1].out
    stopped = ctxlab("generate", run.id, "красный кот", "decoding.max_new_tokens=90", "decoding.temperature=1.5")
    assert stopped.code == 0, stopped.err

    seen = ctxlab("attention", run.id, "красный кот", "target=cat red", "file=some.html")
    assert seen.code == 0, seen.err
    for kind in ("encoder self", "self", "cross"):
        assert f"\n{kind} attention, layer 1\n" in seen.out

    again = ctxlab("eval", run.id, "eval.translation.max_pairs=4", "profile.contexts=none", "logger.mode=disabled")
    assert again.code == 0, again.err
    child = ctxlab("train", f"init={run.id}", *PAIRS, "name=child", "trainer.freeze=[encoder]")
    assert child.code == 0, child.err
    before, after = run_weights(run), run_weights(the_run("child"))
    frozen = [name for name in before if name.startswith("encoder.")]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def run_weights(run: Run) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_run(run.id, runs="runs").model.state_dict()
    return weights


def test_what_is_measured_at_the_end_of_a_training_is_measured_without_dropout(folder: Path) -> None:
    text = "\n\n".join(" ".join(random.Random(n).choices(sorted(WORDS), k=60)) for n in range(40))
    Path("text.txt").write_text(text, encoding="utf-8")
    quiet = ("eval.objective.rows=8", "profile.contexts=none", "logger.mode=disabled")
    done = ctxlab(
        "train", "objective=masked", "data=text", "data.path=text.txt", "tokenizer=byte", "model=nano", "model.dropout=0.5",
        "model.architecture=encoder", "context=32", "trainer.max_steps=2", "trainer.max_tokens=none", "name=spoilt", *quiet,
    )  # fmt: skip
    assert done.code == 0, done.err
    again = ctxlab("eval", "last", *quiet)
    assert again.code == 0, again.err
    (evaluated,) = (one for one in RunStore(Path("runs")).runs() if one.record.command == "eval")
    at_the_end = {m.name: m.value for m in the_run("spoilt").measurements()}
    assert {m.name: m.value for m in evaluated.measurements()} == at_the_end


def test_two_berts_begin_with_a_folders_weights(folder: Path) -> None:
    """A training of no rate ends with them; the folder need not be there afterwards."""
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
        )
    )
    bert.save_pretrained("it's a BERT")
    words = (
        *PAIRS[:-2],
        *PAIRS[-1:],
        *BERTS,
        "tokenizer=byte",
        "eval=none",
        "optim.learning_rate=1e-12",
        "optim.weight_decay=0",
    )
    done = ctxlab("train", *words, "model.pretrained=it's a BERT", "name=begun")
    assert done.code == 0, done.err
    Path("it's a BERT").rename("gone")
    weights, theirs = run_weights(the_run("begun")), bert.state_dict()
    for half in ("encoder", "decoder"):
        name = "encoder.layer.0.attention.self.query.weight"
        torch.testing.assert_close(weights[f"{half}.bert.{name}"], theirs[name], atol=1e-6, rtol=0)
    tried = ctxlab("train", *words, "model.pretrained=it's a BERT", "name=again")
    assert (tried.code, len(tried.errors)) == (2, 1)
    assert tried.errors[0].startswith("model.pretrained: it's a BERT has no config.json that can be read")
    resumed = ctxlab("train", f"resume={the_run('begun').id}", "trainer.max_steps=4")
    assert resumed.code == 0, resumed.err


@pytest.mark.slow
def test_cost_of_two_berts(folder: Path) -> None:
    pytest.importorskip("transformers")
    quiet = ("logger.mode=disabled", "optim=adamw")
    done = ctxlab("plan", *BERTS, *quiet, "plan.contexts=[32]", "plan.memory=1GiB", "plan.changes=false")
    assert done.code == 0, done.err
    done = ctxlab("profile", *BERTS, *quiet, "profile.contexts=[32]")
    assert done.code == 0, done.err
    found = {m.name: m for m in the_run("profile-bert2bert").measurements() if m.context == 32}
    for name in ("peak_memory_bytes", "step_seconds", "decode_seconds_per_token", "cache_bytes"):
        assert found[name].value is not None, found[name].reason


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*NATIVE, *APART),
         "model.share_embeddings: source and target have tokens of their own (tokenizer.separate=true), which one matrix "
         "cannot embed; use false"),
        (("tokenizer.separate=true", "data=text", "data.path=pairs.tsv", "model=nano"),
         "tokenizer.separate: text has no sources and targets; use data=parallel data.path=FILE, or false"),
        ((*BERTS, "position=rope"), "position: model=bert2bert has none (it brings BERT's); leave position=rope out"),
        ((*BERTS, "model.n_heads=6"),
         "model: d_model (32) must be divisible by n_heads (6), whose widths add up to it in BERT"),
        ((*BERTS, "data=shakespeare", "objective=causal", "eval=perplexity"),
         "objective: causal trains model.architecture=decoder or lstm, not bert2bert; use "
         "objective=span_corruption, model=tiny model.architecture=decoder or model=lstm"),
        ((*BERTS, "trainer.compile=true"),
         "trainer.compile: BERT's layers are run as they come (model=bert2bert); use false"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(folder: Path, words: tuple[str, ...], said: str) -> None:
    if "model=bert2bert" in words:
        pytest.importorskip("transformers")
    chosen = {word.partition("=")[0] for word in words}
    base = [word for word in PAIRS if word.partition("=")[0] not in chosen]
    if "data" in chosen:
        base = [word for word in base if not word.startswith(("data.", "eval."))]
    done = ctxlab("train", *base, *words)
    assert (done.code, done.errors) == (2, [said])
    assert not Path("runs").exists()


def test_pairs_too_long_for_a_models_positions_are_left_out_and_counted(folder: Path) -> None:
    """The longest test sources are longer than the table; the others are translated, and never beyond its end."""
    done = ctxlab("train", *PAIRS, *NATIVE, "tokenizer=byte", "position=learned", "context=36", "name=short")
    assert done.code == 0, done.err
    run = the_run("short")
    found = {m.name: m for m in run.measurements()}
    items = run.items()
    left_out = found["bleu"].facts["too_long"]
    assert left_out > 0
    assert found["bleu"].n_docs == len(items) == 4 - left_out
    assert np.max([len(item.wanted[0].encode()) + 1 for item in items]) <= 36
    assert json.loads((run.path / "run.json").read_text())["status"] == "done"


def test_where_a_models_positions_end(folder: Path) -> None:
    """A file of sources is answered to its last line, and what cannot be read is named."""
    quick = (*PAIRS[:-2], *PAIRS[-1:], "eval=none")
    assert ctxlab("train", *quick, *NATIVE, "tokenizer=byte", "position=learned", "context=36", "name=table").code == 0
    Path("lines.txt").write_text("красный\nкрасный красный красный\nкот\n", encoding="utf-8")  # 14, 44 and 6 bytes
    for more in ("decoding.temperature=0", "decoding.num_beams=2"):
        done = ctxlab("generate", "last", "prompts_file=lines.txt", more, "batch=2")
        assert done.code == 0, done.err
        assert [bool(line) for line in done.out.splitlines()] == [True, False, True]
        assert done.err.splitlines() == ["stopped: 3 of 3 lines, line 1 first, where the model's 36 positions end"]
    done = ctxlab("generate", "last", "prompts_file=lines.txt", "decoding.temperature=0", "decoding.max_new_tokens=3")
    assert done.err.splitlines() == ["stopped: line 2 where the model's 36 positions end"]
    for text, target, which in (("кот", "red " * 10, "target"), ("кот " * 8, "red", "text")):
        seen = ctxlab("attention", "last", text, f"target={target}", "file=none")
        assert (seen.code, len(seen.errors)) == (2, 1)
        assert seen.errors[0].startswith(f"{which}: is too long for the run: position ")
