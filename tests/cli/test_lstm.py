"""The recurrent model through every command: trained, beside a decoder too, evaluated, gone on from, measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctxlab.records.run import Run
from ctxlab.records.store import RunStore
from tests.cli.lines import SMALL, ctxlab

QUIET = ("optim=adamw", "logger.mode=disabled")
SCORED = ("eval=perplexity", "eval.perplexity.max_tokens=1k")
SIZES = ("model=lstm_nano", "model.d_model=16", "model.d_hidden=24")


def the_run(stem: str) -> Run:
    (run,) = (run for run in RunStore(Path("runs")).runs() if run.id.startswith(stem))
    return run


def test_it_is_trained_evaluated_and_gone_on_from(place: Path) -> None:
    done = ctxlab("train", *SMALL[1:], *SIZES, *SCORED, *QUIET)
    assert done.code == 0, done.err
    run = the_run("lstm_nano-64-")
    assert (run.record.config["position"], run.record.config["attention"]) == ("none", "none")
    layers = 4 * 24 * (16 + 24) + 8 * 24 + 16 * 24
    assert run.record.parameters == {"all": layers + 260 * 16, "without_embeddings": layers}
    assert {m.context for m in run.measurements() if m.value is not None} >= {32, 64, 128, 256, 512}
    assert "ctxlab train -m model=lstm_nano context=64,128 " in done.out
    assert run.id in ctxlab("runs", "position=none").out
    assert "nano-rope" not in ctxlab("runs", "position=none").out

    again = ctxlab("eval", run.id, *SCORED, "eval.perplexity.lengths=[16,100]", "logger.mode=disabled")
    assert (again.code, "evaluated again" in again.out) == (0, True), again.err
    text = ctxlab("generate", run.id, "To be", "decoding.max_new_tokens=80", "decoding.temperature=0")
    assert (text.code, text.out.startswith("To be")) == (0, True), text.err

    refused = {
        ("show", f"run={run.id}"): f"run: {run.id} has no positional scheme that could be drawn",
        ("eval", run.id, "attention=sliding_window", "logger.mode=disabled"):
            f"attention: {run.id} has none (model=lstm_nano); leave it out",
        ("generate", run.id, "To be", "decoding.cache=streaming"):
            "decoding.cache: an LSTM's state has one size however long the text (model=lstm); use full",
    }  # fmt: skip
    for words, said in refused.items():
        tried = ctxlab(*words)
        assert (tried.code, tried.errors) == (2, [said])


@pytest.mark.slow
def test_beside_a_decoder_it_differs_by_the_models_name_and_shows_its_speed(place: Path) -> None:
    done = ctxlab("train", "-m", "model=nano,lstm_nano", *SMALL[1:], *SCORED, *QUIET)
    assert done.code == 0, done.err
    head, *rows = (line for line in done.out.splitlines() if line.startswith(("model ", "nano ", "lstm_nano ")))
    assert head.split()[:6] == ["model", "32", "64", "128", "256", "512"]
    assert [row.split()[0] for row in rows[:2]] == ["nano", "lstm_nano"]
    assert "tokens/s is the median over training" in done.out


@pytest.mark.slow
def test_its_steps_are_measured(place: Path) -> None:
    done = ctxlab("profile", *SIZES, *QUIET, "profile.contexts=[64]")
    assert done.code == 0, done.err
    run = the_run("profile-lstm_nano-")
    names = {m.name for m in run.measurements() if m.value is not None and m.context == 64}
    assert names >= {"peak_memory_bytes", "step_seconds", "tokens_per_second", "decode_seconds_per_token"}


def test_it_is_listed() -> None:
    assert "Recurrent: an LSTM as large as tiny" in ctxlab("list", "models").out
