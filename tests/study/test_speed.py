"""`experiments/speed`: the contestants are what they are called, and the rows say what was measured."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ctxlab.errors import ConfigError
from ctxlab.model.generation import DecodingConfig, generate
from ctxlab.registry import import_file
from tests.model.builders import tokens

FOLDER = Path(__file__).parents[2] / "experiments/speed"
CONTEXT, D, LAYERS, VOCAB = 64, 384, 6, 8192
GATED = VOCAB * D + LAYERS * (4 * D**2 + 3 * D * 1024 + 2 * D) + D
PLAIN = VOCAB * D + LAYERS * (4 * D**2 + 2 * D * 1536 + 1536 + D + 2 * D) + D  # biases in the feed-forward layer alone
BIASED = VOCAB * D + CONTEXT * D + LAYERS * (4 * (D**2 + D) + 2 * D * 1536 + 1536 + D + 4 * D) + 2 * D


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Its scripts by name; they know one another by their files' names."""
    names = ("contestants", "speed", "decode")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def script(name: str) -> Any:
        return sys.modules[name] if name in sys.modules else import_file(name, FOLDER / f"{name}.py")

    script("contestants")
    yield script
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "package", "expected"),
    [
        ("ctxlab rope", "ctxlab", GATED),
        ("ctxlab alibi", "ctxlab", GATED),
        ("ctxlab t5", "ctxlab", GATED + 32 * 6),
        ("nanoGPT's recipe", "torch", BIASED),
        ("HF Llama", "transformers", GATED),
        ("litgpt", "litgpt", GATED),
        ("x-transformers rope", "x_transformers", PLAIN),
        ("x-transformers alibi", "x_transformers", PLAIN),
        ("x-transformers t5", "x_transformers", PLAIN + 32 * 6),
    ],
)
def test_contestants_have_the_parameters_counted_by_hand(
    name: str, package: str, expected: int, study: Callable[[str], Any]
) -> None:
    pytest.importorskip(package, exc_type=ImportError)
    model, _ = study("contestants").CONTESTANTS[name](CONTEXT)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_nanogpt_is_gpt2(study: Callable[[str], Any]) -> None:
    transformers = pytest.importorskip("transformers")
    recipe, loss = study("contestants").nanogpt(CONTEXT)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in recipe.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=CONTEXT, n_embd=D, n_layer=LAYERS, n_head=6, activation_function="gelu"
        )
    ).eval()
    source = recipe.state_dict()
    weights = {"transformer.wte.weight": source["embedding.weight"], "lm_head.weight": source["embedding.weight"]}
    weights["transformer.wpe.weight"] = source["positions.weight"]
    parts = {
        "before_attention": "ln_1", "before_mlp": "ln_2", "qkv": "attn.c_attn", "out": "attn.c_proj",
        "up": "mlp.c_fc", "down": "mlp.c_proj",
    }  # fmt: skip
    for end in ("weight", "bias"):
        weights[f"transformer.ln_f.{end}"] = source[f"norm.{end}"]
        for n in range(LAYERS):
            for mine, name in parts.items():  # their Conv1D holds matrices the other way round
                weights[f"transformer.h.{n}.{name}.{end}"] = source[f"blocks.{n}.{mine}.{end}"].t()
    theirs.load_state_dict(weights)
    text = tokens(2, CONTEXT, vocab_size=VOCAB)
    recipe, theirs = recipe.double(), theirs.double()
    with torch.no_grad():
        torch.testing.assert_close(recipe(text), theirs(text).logits, atol=1e-10, rtol=0)
        nats = -theirs(text).logits.log_softmax(-1)[:, :-1].gather(-1, text[:, 1:, None])
        torch.testing.assert_close(loss(text[:, :-1], text[:, 1:]), nats.mean(), atol=1e-10, rtol=0)


def test_llama_with_our_weights_says_what_we_say(study: Callable[[str], Any]) -> None:
    pytest.importorskip("transformers")
    ours, theirs = study("decode").alike(CONTEXT)
    text = tokens(2, CONTEXT, vocab_size=VOCAB)
    with torch.no_grad():
        torch.testing.assert_close(ours(text), theirs(text).logits, atol=1e-5, rtol=0)
        prompt = text[:1, :16]
        said = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    continued = said[0, 16:].tolist()
    assert list(generate(ours, prompt[0].tolist(), DecodingConfig(max_new_tokens=8, temperature=0))) == continued
    assert len(set(continued)) > 4  # not one token for ever


def test_ratios_of_rates_are_those_of_the_best_rival(study: Callable[[str], Any]) -> None:
    rates = {"ctxlab rope": [200.0, 300.0, 240.0], "litgpt": [100.0, 400.0, 110.0], "HF Llama": [150.0, 120.0, 160.0]}
    assert study("speed").compared_times("ctxlab rope", rates) == {
        "rival": "HF Llama",  # by its median, 150; litgpt's one good round counts for nothing
        "best_ratio": 300 / 160,
        "median_ratio": 240 / 150,
        "lowest_ratio": 200 / 150,
        "highest_ratio": 300 / 120,
    }
    assert study("speed").compared_times("ctxlab alibi", rates)["status"] == "skipped"


def test_ratios_of_peaks_are_those_of_the_leanest_rival(study: Callable[[str], Any]) -> None:
    peaks = {"ctxlab rope": 3e9, "litgpt": 5e9, "HF Llama": 4e9, "x-transformers alibi": 1e9}
    assert study("speed").compared_peaks("ctxlab rope", peaks) == {"rival": "HF Llama", "peak_ratio": 0.75}
    assert study("speed").compared_peaks("ctxlab alibi", peaks)["status"] == "skipped"


def test_one_that_dies_is_a_row_and_in_no_further_round(
    study: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def ask(contestant: str, context: int, what: str, precision: str, *, rows: int) -> dict[str, Any]:
        asked.append(contestant)
        here = {"contestant": contestant, "context": context}
        if contestant == "x-transformers t5":
            return {**here, "status": "out_of_memory", "reason": "no room"}
        return {**here, "status": "done", "seconds": [8.0, 4.0 if contestant == "ctxlab rope" else 16.0]}

    speed = study("speed")
    speed.time_steps(speed.Asked.of(["2k"]), "fp32", ask)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert asked.count("x-transformers t5") == 1
    assert asked.count("litgpt") == 5
    assert {"contestant": "x-transformers t5", "context": 2048, "status": "out_of_memory", "reason": "no room"} in rows
    assert [row["median"] for row in rows if row.get("contestant") == "ctxlab rope" and "median" in row] == [8192 / 4]
    assert sum("seconds" in row for row in rows) == 8 * 5  # each point, as it is measured
    compared = {row["ours"]: row for row in rows if "compared" in row}
    assert compared["ctxlab rope"]["median_ratio"] == 2.0
    assert compared["ctxlab t5"]["status"] == "skipped"


def test_words_say_what_is_measured(study: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    speed, asked = study("speed"), []

    def ask(contestant: str, context: int, what: str, precision: str, *, rows: int) -> dict[str, Any]:
        asked.append((contestant, context, what, rows))
        return {"status": "done", "seconds": [1.0], "peak_bytes": 3.0 if contestant == "litgpt" else 2.0}

    words = speed.Asked.of(["litgpt", "4096", "ctxlab rope", "rounds=2", "budget=2MiB"])
    assert (words.contexts, words.rounds, words.budget) == ((4096,), 2, 2**21)
    speed.time_steps(words, "fp32", ask)
    speed.weigh(words, "fp32", ask)
    both = ("litgpt", "ctxlab rope")
    assert asked == [(n, 4096, "time", 2) for n in both * 2] + [(n, 4096, "memory", 2) for n in both]
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["ours"], last["rival"], last["peak_ratio"]) == ("ctxlab rope", "litgpt", 2 / 3)
    nothing = speed.Asked.of([])
    assert (nothing.contexts, set(nothing.names), nothing.rounds) == ((), set(speed.CONTESTANTS), 5)


def test_the_longest_of_the_contexts_that_are_asked_for_in_the_ways_that_are(
    study: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    speed = study("speed")

    def ask(contestant: str, context: int, what: str, precision: str, *, rows: int, way: str) -> dict[str, Any]:
        assert (what, precision, rows) == ("memory", "fp32", 1)
        return {"context": context, "peak_bytes": context * {"none": 4.0, "recompute": 2.0, "disk": 1.0}[way]}

    words = ["disk", "none", "512", "1k", "2k", "budget=2KiB", "ctxlab rope", "HF Llama"]
    speed.longest_of_all(speed.Asked.of(words), "fp32", ask)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [(row["longest"], row["way"], row["context"], len(row["peaks"])) for row in rows]
    assert found == [("ctxlab rope", "none", 512, 3), ("HF Llama", "none", 512, 3), ("ctxlab rope", "disk", 2048, 3)]
    assert ["predicted" in row for row in rows] == [True, False, True]


def test_a_way_that_nobody_goes_is_refused(study: Callable[[str], Any]) -> None:
    speed = study("speed")
    with pytest.raises(ConfigError, match=r"^speed: none of litgpt goes in the way recompute or disk$"):
        speed.longest_of_all(speed.Asked.of(["litgpt", "recompute", "disk"]), "fp32")
    with pytest.raises(ConfigError, match=r"^speed: disk says nothing of memory; use it with longest$"):
        speed.main(["memory", "fp32", "disk"])


@pytest.mark.parametrize("word", ["rounds=0", "rounds=few", "litgtp", "budget=much"])
def test_a_word_that_means_nothing_is_refused(study: Callable[[str], Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word.partition("=")[2] or word):
        study("speed").Asked.of(["2k", word])


@pytest.mark.parametrize(
    ("peak", "most"),
    [
        (lambda n: 2e8 + 2e5 * n, 4),
        (lambda n: 2e8 + 2e5 * n if n < 9000 else float("inf"), 12),
        (lambda n: 2e8 + 1e5 * n + 40.0 * n**2, 12),
        (lambda n: 2e8 + 1.9e5 * n + (1e8 if n > 8192 else 0.0), 8),
    ],
    ids=["linear", "dies", "quadratic", "a step"],
)
def test_the_longest_context_is_found_to_a_thirty_second(
    peak: Callable[[int], float], most: int, study: Callable[[str], Any]
) -> None:
    asked: list[int] = []
    budget = 4 * 2**30

    def count(context: int) -> float:
        asked.append(context)
        return peak(context)

    found = study("speed").longest(count, budget)
    assert peak(found) <= budget < peak(found + max(64, found // 32))
    assert found in asked
    assert len(asked) == len(set(asked)) <= most


def test_nothing_far_beyond_the_line_is_tried(study: Callable[[str], Any]) -> None:
    """Hugging Face's peaks at these contexts: the third that fits lies so near the budget that a little above it is itself."""
    measured = {512: 331_304_960, 2048: 689_090_560, 3584: 1_042_845_696, 3648: 1_058_033_664, 3712: 1_072_844_800}
    asked: list[int] = []

    def peak(context: int) -> float:
        asked.append(context)
        return measured.get(context, 230_000.0 * context + 219e6)

    assert study("speed").longest(peak, 2**30) == 3712
    assert max(asked) == 3776


def test_a_budget_too_small_for_the_shortest(study: Callable[[str], Any]) -> None:
    assert study("speed").longest(lambda context: 1e9 + context, 10**9) == 0


def test_what_is_not_installed_and_what_finds_no_room_are_rows(
    study: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "litgpt.py").write_text("raise ModuleNotFoundError(\"No module named 'litgpt'\", name='litgpt')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(FOLDER.parents[1])]))
    speed = study("speed")
    row = speed.ask("litgpt", 512, "memory", "fp32", rows=1)
    assert row == {
        "contestant": "litgpt", "context": 512, "precision": "fp32", "status": "skipped",
        "reason": "litgpt is not installed",
    }  # fmt: skip
    monkeypatch.setattr(speed, "ADDRESS_SPACE", 2**29)
    row = speed.ask("nanoGPT's recipe", 512, "memory", "fp32", rows=1)
    assert row["status"] in ("out_of_memory", "failed")
    assert row["reason"]
