"""A model that is composed from fewer parts: what a line may still choose, and what the config says of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctxlab.config.overrides import split
from ctxlab.config.prepare import Cell, Prepared, prepare, prepare_resume
from ctxlab.errors import ConfigError
from ctxlab.model.config import LSTMConfig, ModelConfig
from ctxlab.records.run import Run
from ctxlab.records.store import RunStore


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CTXLAB_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def prepared(*words: str) -> Prepared:
    return prepare(split(words[0], list(words[1:])))


def cell(*words: str) -> Cell:
    (found,) = prepared(*words).cells
    return found


def parts(config: dict[str, Any]) -> tuple[Any, Any]:
    return config["position"], config["attention"]


def recorded(root: Path, *words: str) -> Run:
    """A run of this line that was stopped after a step."""
    found = cell("train", *words)
    run = RunStore(root).create("train", "run", config=found.config, line=found.line)
    run.finish("interrupted")
    saved = run.checkpoints / "step-000001"
    saved.mkdir(parents=True)
    (saved / "checkpoint.json").write_text('{"step": 1, "tokens": 4096, "seconds": 1.0, "validation_loss": null}')
    (run.checkpoints / "last").write_text(saved.name)
    return run


@pytest.mark.parametrize("command", ["train", "profile"])
def test_an_lstm_has_neither_position_nor_attention(command: str) -> None:
    found = cell(command, "model=lstm", "model.d_hidden=auto")
    assert isinstance(found.typed.model, LSTMConfig)
    assert found.typed.model.d_hidden == 256
    assert (found.typed.position, found.typed.attention) == ("none", "none")
    assert parts(found.config) == ("none", "none")
    assert not found.skipped


def test_the_config_that_is_printed_says_so_too() -> None:
    plain = prepare(split("train", ["model=lstm"]), validate=False).cells[0].config
    assert parts(plain) == ("none", "none")


@pytest.mark.parametrize(
    ("word", "group"),
    [
        ("position=alibi", "position"), ("position=rope", "position"), ("position.theta=5.0", "position"),
        ("attention=sliding_window", "attention"),
    ],
)  # fmt: skip
def test_a_part_that_is_chosen_on_the_line_is_refused_in_one_line(word: str, group: str) -> None:
    expected = f"{group}: model=lstm has none (it reads one token after the other); leave {word} out"
    assert cell("train", "model=lstm", word).skipped == expected


def test_in_a_sweep_only_those_cells_are_skipped() -> None:
    cells = prepared("train", "-m", "model=nano,lstm", "position=rope,alibi").cells
    assert [bool(found.skipped) for found in cells] == [False, False, True, True]
    cells = prepared("train", "-m", "model=nano,lstm").cells
    assert [found.skipped for found in cells] == ["", ""]
    assert [parts(found.config)[0] for found in cells] == [cells[0].config["position"], "none"]
    assert cells[0].config["position"]["name"] == "rope"


def test_an_experiment_that_chooses_a_scheme_takes_an_lstm_all_the_same() -> None:
    found = cell("train", "experiment=quickstart_long", "model=lstm")
    assert (parts(found.config), found.skipped) == (("none", "none"), "")


def test_a_run_starts_from_one_that_has_no_parts_and_goes_on_with_it(runs: Path) -> None:
    run = recorded(runs, "model=lstm", "model.d_hidden=64")
    child = cell("train", f"init={run.id}")
    assert child.config["model"] == run.record.config["model"]
    assert (parts(child.config), child.skipped) == (("none", "none"), "")
    again = prepare_resume(split("train", [f"resume={run.id}", "trainer.max_tokens=2M"]), runs)
    assert {**again.config, "resume": "none", "trainer": None} == {**run.record.config, "trainer": None}


def test_a_decoder_that_starts_from_an_lstm_has_its_own_parts(runs: Path) -> None:
    child = cell("train", f"init={recorded(runs, 'model=lstm').id}", "model=nano", "position=alibi")
    assert isinstance(child.typed.model, ModelConfig)
    assert [part["name"] for part in parts(child.config)] == ["alibi", "full"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model.architecture=lstm",), "model.architecture: lstm has no n_encoder_layers, n_heads, n_kv_heads, .*; "
         "an architecture is chosen with its sizes, by model=NAME"),
        (("model=lstm", "model.architecture=decoder"), "model.architecture: decoder has no d_hidden, carry_state; "),
        (("model.architecture=lstn",), r"model.architecture: no architecture is called 'lstn'; did you mean 'lstm'\?"),
        (("model=lstm", "+model.d_hiden=3"), r"model.d_hiden: no such key; did you mean 'd_hidden'\?"),
        (("model=lstm", "model.n_heads=3"), "model.n_heads: model=lstm has no 'n_heads'; it belongs to model="),
        (("model=lstm", "model.d_hidden=0"), "model.d_hidden: expected a number > 0, got 0"),
    ],
)  # fmt: skip
def test_settings_of_another_architecture_are_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}") as caught:
        prepared("train", *words)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trainer.compile=true",), "trainer.compile: torch does not compile its LSTM (model=lstm); use false"),
        (("trainer.recompute=true",), "trainer.recompute: an LSTM's layers are not run again (model=lstm); use none"),
        (("data.packed=true",), ""),
        (("data=task/mqar", "tokenizer=ids", "eval=task"), ""),
        (("data=task/mqar", "tokenizer=ids", "eval=task", "model.carry_state=true"),
         "model.carry_state: an LSTM carries its state from window to window of a text, and the examples of task/mqar "
         "stand alone"),
        (("data.packed=true", "model.carry_state=true"),
         "data.packed: model.carry_state carries a state along whole rows; use false"),
    ],
)  # fmt: skip
def test_ways_of_training_that_torchs_lstm_does_not_have(words: tuple[str, ...], said: str) -> None:
    assert cell("train", "model=lstm", *words).skipped == said


def test_there_is_no_scheme_to_draw() -> None:
    with pytest.raises(ConfigError, match=r"^model: lstm has no positional scheme that could be drawn$"):
        prepared("show", "model=lstm")
