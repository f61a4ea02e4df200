"""The line before Hydra: free text unchanged, bare words, selectors, flags."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.config.overrides import is_free_text, key_of, split, split_selector
from ctxlab.errors import ConfigError


@pytest.mark.parametrize(
    "text",
    [
        "Je ne parle pas français.",
        "it's, a=b ${5}",
        '"quoted" and \\ backslash',
        "a#b ~c [d] {e}",
        "",
        "  spaces  ",
        "two\nlines",
        "-m --help",
        "汉字，标点",
    ],
)
def test_free_text_is_taken_off_unchanged(text: str) -> None:
    line = split("generate", ["run=last", f"prompt={text}", "decoding.top_k=3"])
    assert line.free_text == {"prompt": text}
    assert line.overrides == ("decoding.top_k=3",)


@given(st.text())
def test_any_prompt_survives(text: str) -> None:
    assert split("generate", [f"prompt={text}"]).free_text == {"prompt": text}


@pytest.mark.parametrize(
    ("key", "free"),
    [
        ("note", True), ("name", True), ("data.path", True), ("paths.runs", True), ("paths.cache", True),
        ("tokenizer.path", True), ("tokenizer.file", True), ("logger.project", True),
        ("context", False), ("model.name", False), ("data.name", False), ("run", False),
    ],
)  # fmt: skip
def test_which_keys_are_free_text(key: str, free: bool) -> None:
    assert is_free_text(key) is free


def test_path_with_spaces_commas_and_equals_signs() -> None:
    line = split("train", ["data=text", "data.path=/my texts/a,b=c (1).txt", "paths.runs=~/my runs"])
    assert line.overrides == ("data=text",)
    assert line.free_text == {"data.path": "/my texts/a,b=c (1).txt", "paths.runs": "~/my runs"}


def test_free_text_with_a_plus_is_the_same_key() -> None:
    assert split("train", ["+note=x", "++name=y"]).free_text == {"note": "x", "name": "y"}


def test_bare_words_are_the_run_and_the_prompt() -> None:
    line = split("generate", ["last", "To be, or not", "decoding.temperature=0"])
    assert line.selectors == {"run": ("last",)}
    assert line.free_text == {"prompt": "To be, or not"}
    assert split("eval", ["[A,B]"]).selectors == {"run": ("A", "B")}


def test_after_two_dashes_everything_is_a_bare_word() -> None:
    line = split("generate", ["--", "last", "--help a=b"])
    assert (line.selectors, line.free_text, line.help) == ({"run": ("last",)}, {"prompt": "--help a=b"}, False)


def test_selectors_keep_paths_whole() -> None:
    assert split_selector("/a b/c,d") == ("/a b/c,d",)
    assert split_selector("[x, y]") == ("x", "y")


def test_a_sweep_over_runs_stays_with_hydra() -> None:
    line = split("eval", ["-m", "run=a,b"])
    assert line.multirun
    assert line.overrides == ("run=a,b",)
    assert line.selectors == {}


def test_flags(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.touch()
    line = split(
        "train", ["--plugin", str(plugin), f"--config-dir={tmp_path}", "--cfg", "job", "--resolve", "--multirun"]
    )
    assert line.plugins == (plugin,)
    assert line.config_dirs == (tmp_path,)
    assert line.print_config
    assert line.multirun


def test_the_line_can_be_typed_again() -> None:
    line = split("generate", ["last", "it's, a=b ${5}"])
    assert line.text == """ctxlab generate last 'it'"'"'s, a=b ${5}'"""


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("train", ["--multrun"], r"--multrun: no such flag of ctxlab train; did you mean '--multirun'\?"),
        ("train", ["--multirun=yes"], "--multirun: no such flag"),
        ("train", ["--json"], "--json: is of one ctxlab eval; of recorded runs: ctxlab runs --json"),
        ("eval", ["-m", "--json"], "--json: is of one ctxlab eval"),
        ("train", ["--cfg", "hydra"], "--cfg: expected job, got 'hydra'"),
        ("train", ["--config-dir"], "--config-dir: expected a value after it"),
        ("train", ["--config-dir", "/no/such"], "--config-dir: there is no folder /no/such"),
        ("train", ["--plugin=/no/such.py"], "--plugin: there is no file /no/such.py"),
        ("train", ["context"], "train: expected key=value, got 'context'"),
        ("generate", ["last", "To", "be"], "generate: 'be' is one word too many"),
        ("eval", ["last", "run=last"], "run: given twice"),
        ("generate", ["last", "a", "prompt=b"], "prompt: given twice"),
    ],
)
def test_refused_lines(command: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(command, words)


def test_key_of() -> None:
    assert [key_of(o) for o in ("a.b=c", "+a=b", "++a=b", "~a", "a=b=c")] == ["a.b", "a", "a", "a", "a"]
