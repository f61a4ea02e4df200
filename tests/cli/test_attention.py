"""`ctxlab attention`: maps and numbers in the terminal, a page and a picture, and one line for what cannot be looked at."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ctxlab as package
from ctxlab.model.seeing import attention_weights
from tests.cli.lines import SMALL, ctxlab

QUICK = (*(word for word in SMALL if not word.startswith("eval.")), "eval=none", "logger.mode=disabled")
PAIRS = [("je", "I"), ("tu", "you"), ("il", "he"), ("ne", "not"), ("pas", "never"), ("parle", "speak"), ("va", "go")]


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    found: dict[str, Any] = json.loads(data)
    return found


@pytest.fixture
def translator(place: Path) -> str:
    """The id of a run that translates, three steps of it."""
    lines = [f"{a} {b}\t{x} {y}" for a, x in PAIRS for b, y in PAIRS for _ in range(3)]
    Path("pairs.tsv").write_text("\n".join(f"{line} {n}" for n, line in enumerate(lines)) + "\n", encoding="utf-8")
    done = ctxlab(
        "train", "data=parallel", "data.path=pairs.tsv", "model=nano", "model.architecture=encoder_decoder",
        "model.n_layers=2", "position=sinusoidal", "context=32", "tokenizer=byte", "trainer.max_steps=2",
        "trainer.max_tokens=none", "eval=none", "profile.contexts=none", "logger.mode=disabled", "name=translator",
    )  # fmt: skip
    assert done.code == 0, done.err
    (run,) = place.glob("runs/translator-*")
    return run.name


def test_shows_every_head_in_the_terminal_and_in_files(trained: Path) -> None:
    done = ctxlab("attention", "last", "it's, a=b ${5}")
    assert done.code == 0, done.err
    assert "text: it's, a=b ${5}" in done.out
    assert [line for line in done.out.splitlines() if line.startswith("self attention, layer")] == [
        f"self attention, layer {layer}" for layer in (1, 2, 3, 4)
    ]
    rows = [line.split() for line in done.out.splitlines() if re.match(r"self +\d", line)]
    assert [(row[1], row[2]) for row in rows] == [(str(a), str(b)) for a in range(1, 5) for b in range(1, 5)]
    assert all(len(row) == 8 for row in rows)
    page, picture = Path(f"attention-{trained.name}.html"), Path(f"attention-{trained.name}.png")
    assert done.out.splitlines()[-2:] == [f"drawn into {page}", f"drawn into {picture}"]
    assert len(data_of(page)["maps"]) == 16
    with Image.open(picture) as drawn:
        assert drawn.width > drawn.height / 2 > 100


def test_the_page_has_the_weights_of_the_model(trained: Path) -> None:
    from base64 import b64decode

    done = ctxlab("attention", "run=last", "text=to be or not", "layers=[2]", "heads=[3,1]", "file=some.html")
    assert done.code == 0, done.err
    loaded = package.load("last")
    x = torch.tensor([loaded.tokenizer.encode("to be or not")])
    expected = attention_weights(loaded.model, x, 1)[0]
    maps = data_of(Path("some.html"))["maps"]
    assert [(one["layer"], one["head"]) for one in maps] == [(2, 1), (2, 3)]
    for one in maps:
        raw = torch.frombuffer(bytearray(b64decode(one["weights"])), dtype=torch.uint16).double() / 65535
        torch.testing.assert_close(
            raw.view(12, 12), expected[one["head"] - 1].double(), atol=1e-5, rtol=0
        )  # fmt: skip


def test_words_stand_for_their_pieces(trained: Path) -> None:
    done = ctxlab("attention", "last", "to be, or not", "words=true", "file=some.html")
    assert done.code == 0, done.err
    axes = data_of(Path("some.html"))["axes"]["self"]
    assert axes == {"rows": ["to", "be", ",", "or", "not"], "columns": ["to", "be", ",", "or", "not"]}


@pytest.mark.parametrize("words", ["true", "false"])
def test_no_character_of_a_text_acts_on_a_terminal_or_turns_a_page(words: str, trained: Path) -> None:
    text = "a \u202eabc \x1b[31m \x9b31m x\u200dy\nb"
    Path("odd.txt").write_text(text, encoding="utf-8")
    done = ctxlab(
        "attention", "last", "text_file=odd.txt", f"words={words}", "layers=[1]", "heads=[1]", "file=some.html"
    )
    assert done.code == 0, done.err
    assert "text: a <202E>abc <1B>[31m <9B>31m x<200D>y\nb\n" in done.out
    data = data_of(Path("some.html"))
    said = [done.out, *data["facts"], *data["axes"]["self"]["rows"]]
    assert [c for c in "".join(said) if not c.isprintable() and c != "\n"] == []
    if words == "true":
        names = ["a", "<202E>", "abc", "<1B>", "[", "31m", "<9B>", "31m", "x", "<200D>", "y", "b"]
        assert data["axes"]["self"]["rows"] == names


def test_a_long_text_is_drawn_in_parts(trained: Path) -> None:
    Path("long.txt").write_text("to be or not " * 40, encoding="utf-8")
    done = ctxlab("attention", "last", "text_file=long.txt", "cells=10", "layers=[1]", "heads=[1]", "file=some.html")
    assert done.code == 0, done.err
    data = data_of(Path("some.html"))
    assert len(data["axes"]["self"]["rows"]) == 10
    assert data["facts"][-1].startswith("up to 52 tokens a row and a column")
    assert "up to 13 tokens a row and a column" in done.out


def test_a_translation_is_read_beside_its_source_and_step_by_step(translator: str) -> None:
    done = ctxlab("attention", "last", "ne pas", "decoding.max_new_tokens=5", "file=some.html")
    assert done.code == 0, done.err
    data = data_of(Path("some.html"))
    assert list(dict.fromkeys(one["kind"] for one in data["maps"])) == ["encoder", "self", "cross"]
    assert data["axes"]["cross"]["columns"] == ["n", "e", "·", "p", "a", "s", "</s>"]
    assert data["axes"]["cross"]["rows"][0] == "<s>"
    steps = data["steps"]
    assert len(steps) == 5
    assert [step["read"] for step in steps] == ["<s>", *(step["chosen"] for step in steps[:-1])]
    for step in steps:  # greedy: nothing else was likelier
        assert step["p"] >= max(p for _, p in step["others"])
        assert len(step["others"]) == len(step["sources"]) == 3


def test_a_target_that_is_given_is_what_is_read(translator: str) -> None:
    done = ctxlab("attention", "last", "ne pas", "target=I, no", "kind=cross", "file=some.html")
    assert done.code == 0, done.err
    data = data_of(Path("some.html"))
    assert {one["kind"] for one in data["maps"]} == {"cross"}
    assert data["axes"]["cross"]["rows"] == ["<s>", "I", ",", "·", "n", "o"]
    assert [step["chosen"] for step in data["steps"]] == ["I", ",", "·", "n", "o", "</s>"]
    searched = ctxlab("attention", "last", "ne pas", "decoding.num_beams=2", "decoding.max_new_tokens=4", "file=none")
    assert searched.code == 0, searched.err


def test_a_terminal_without_unicode_gets_what_it_can_print(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from ctxlab.cli import console

    raw = io.BytesIO()
    plain = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80, color_system=None)
    monkeypatch.setattr(console.stdout, "cache_clear", lambda: None, raising=False)
    monkeypatch.setattr(console, "stdout", _always(plain))
    done = ctxlab("attention", "last", "ça va", "layers=[1]", "heads=[1]", "file=none")
    plain.file.flush()
    assert done.code == 0, done.err
    assert "text: ?a va" in raw.getvalue().decode("ascii")


def _always(value: Any) -> Callable[[], Any]:
    def give() -> Any:
        return value

    give.cache_clear = lambda: None  # type: ignore[attr-defined]
    return give


MISTAKES = {
    "run": (("nobody", "a"), r"run: there is no run 'nobody' in runs; available: nano-rope-64-\w+"),
    "no text": (
        ("last",),
        r"text: expected a text to look at, got nothing; ctxlab attention last \"To be, or not to be\"",
    ),
    "layer": (("last", "a", "layers=[5]"), r"layers: the model has 4, 1 to 4, got 5; the nearest is 4"),
    "head": (("last", "a", "heads=[1,0]"), r"heads: the model has 4, 1 to 4, got 0; the nearest is 1"),
    "no list": (("last", "a", "layers=2"), r"layers: expected all or a list, got 2; write \[2\]"),
    "twice": (("last", "a", "heads=[1,1]"), r"heads: '1' is given twice .*"),
    "kind": (("last", "a", "kind=cross"), r"kind: the model has no cross attention; it has self"),
    "target": (("last", "a", "target=b"), r"target: .* reads no source, so its text has no target; leave it out"),
    "file": (("last", "a", "file=a.gif"), r"file: expected a name that ends in .html, .png or .svg, got 'a.gif'"),
    "folder": (("last", "a", "file=gone/a.html"), r"file: there is no folder gone"),
    "text file": (("last", "text_file=gone.txt"), r"text_file: gone.txt cannot be read: No such file or directory"),
    "both": (("last", "a", "text_file=b.txt"), r"text_file: is given beside text; give one of them"),
    "a word too many": (("last", "a", "b"), r"attention: 'b' is one word too many \(bare words are run and text; .*"),
    "the model": (("last", "a", "model.d_model=8"), r"model.d_model: is as in the recorded run; .*"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, trained: Path) -> None:
    words, said = MISTAKES[name]
    done = ctxlab("attention", *words)
    assert (done.code, len(done.errors)) == (2, 1), done.err
    assert re.fullmatch(said, done.errors[0]), done.errors[0]
    assert not list(Path().glob("attention-*"))


def test_a_recurrent_model_attends_to_nothing(place: Path) -> None:
    done = ctxlab("train", *QUICK, "model=lstm_nano", "model.d_model=16", "optim=adamw", "name=recurrent")
    assert done.code == 0, done.err
    done = ctxlab("attention", "recurrent", "a")
    assert done.code == 2
    assert re.fullmatch(r"run: recurrent-\w+ \(model=lstm_nano\) has no attention that could be seen", done.errors[0])


def test_a_text_that_is_longer_than_its_positions_is_refused(place: Path) -> None:
    done = ctxlab("train", *QUICK, "position=learned", "name=table")
    assert done.code == 0, done.err
    done = ctxlab("attention", "table", "to be " * 20, "file=none")
    assert done.code == 2
    assert done.errors[0].startswith(
        "text: is too long for the run: position 119: learned positions are defined up to 63"
    )
    Path("long.txt").write_text("to be " * 20, encoding="utf-8")
    done = ctxlab("attention", "table", "text_file=long.txt", "file=none")
    assert done.errors[0].startswith("text_file: is too long for the run: position 119")
