"""Composition and what is refused in it: misspelt names, keys that run code, files that read secrets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ctxlab.config.compose import Composer, set_key
from ctxlab.errors import ConfigError


def compose(*overrides: str, command: str = "train", config_dir: Path | None = None) -> dict:
    with Composer(command, [config_dir] if config_dir else []) as composer:
        return composer.compose(overrides).config


def experiment(folder: Path, text: str, name: str = "mine") -> Path:
    (folder / "experiment").mkdir(parents=True, exist_ok=True)
    (folder / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}", encoding="utf-8")
    return folder


def test_context_is_a_plain_value() -> None:
    assert compose("context=512")["context"] == 512
    assert compose("context=2k")["context"] == "2k"


def test_experiment_is_recorded_by_name() -> None:
    assert compose()["experiment"] == "none"
    assert compose("experiment=quickstart_long")["experiment"] == "quickstart_long"


def test_the_line_wins_over_an_experiment() -> None:
    assert compose("experiment=quickstart_long")["model"]["dropout"] == 0.1
    assert compose("experiment=quickstart_long", "model.dropout=0.2")["model"]["dropout"] == 0.2


def test_runs_folder_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CTXLAB_RUNS", raising=False)
    assert compose()["paths"]["runs"] == "runs"
    monkeypatch.setenv("CTXLAB_RUNS", "/elsewhere, with é/runs")
    assert compose()["paths"]["runs"] == "/elsewhere, with é/runs"


def test_own_configs_from_a_folder_with_an_awkward_name(tmp_path: Path) -> None:
    folder = tmp_path / "my conf, it's é"
    experiment(folder, "context: 64\n")
    (folder / "model").mkdir()
    (folder / "model" / "mine.yaml").write_text("name: mine\nd_model: 48\n")
    config = compose("experiment=mine", "model=mine", config_dir=folder)
    assert (config["context"], config["model"]) == (64, {"name": "mine", "d_model": 48})


def test_sweep_params_of_an_experiment_and_the_line(tmp_path: Path) -> None:
    text = "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      position: rope,alibi\n      context: 256,2k\n"
    with Composer("train", [experiment(tmp_path, text)]) as composer:
        first = composer.compose(["experiment=mine"])
        assert first.multirun
        cells = composer.cells(["experiment=mine", "seed=range(1,3)", "context=64"], first.sweep_params)
    assert cells == [
        ["position=rope", "context=64", "experiment=mine", "seed=1"],
        ["position=rope", "context=64", "experiment=mine", "seed=2"],
        ["position=alibi", "context=64", "experiment=mine", "seed=1"],
        ["position=alibi", "context=64", "experiment=mine", "seed=2"],
    ]


def test_a_sweep_without_values_is_one_cell() -> None:
    with Composer("train") as composer:
        assert composer.cells(["seed=3"], {}) == [["seed=3"]]
        assert composer.cells([], {}) == [[]]
        assert composer.cells(["seed=1,1"], {}) == [["seed=1"], ["seed=1"]]


def test_glob_sweeps_over_the_options_there_are() -> None:
    with Composer("train") as composer:
        cells = composer.cells(["position=glob(*,exclude=[s*,t5,no*,l*])"], {})
    assert ["position=alibi"] in cells
    assert ["position=rope"] in cells
    assert ["position=nope"] not in cells


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("position=rop", r"position: no position is called 'rop'; did you mean 'rope'\?"),
        ("model=tny", r"model: no model is called 'tny'; did you mean 'tiny'\?"),
        ("experiment=extrapolate", r"no experiment is called 'extrapolate'; did you mean 'extrapolation'\?"),
        ("positon=rope", r"positon: no such key; did you mean 'position'\?"),
        ("position.theat=3", r"position.theat: no such key; did you mean 'position.theta'\?"),
        ("n_layers=3", r"n_layers: no such key; did you mean 'model.n_layers'\?"),
        ("lerning_rate=3", r"lerning_rate: no such key; did you mean 'optim.learning_rate'\?"),
        ("decoding.top_k=3", "decoding.top_k: no such key"),
        ("~model.n_layrs", r"model.n_layrs: no such key; did you mean 'model.n_layers'\?"),
        ("optim/schedule=wsd", "optim/schedule: write it as optim.schedule"),
        ("position=[rope,alibi]", "position: expected one of its options, got a list"),
        ("context=256,512", "context: '256,512' is several values; to sweep over them add -m"),
        ("context=(1", r"context: Hydra cannot read the value \(1"),
        ("seed=${nope}", "seed: Interpolation key 'nope' not found"),
        ("model._target_=os.getcwd", "model._target_: '_target_' is refused"),
        ("+model.x={_target_:os.getcwd}", "model.x: '_target_' is refused"),
        ("hydra.callbacks.x=1", "hydra.callbacks.x: not allowed"),
        ("+hydra.callbacks.x._target_=os.getcwd", "_target_"),
        ("hydra/job_logging=disabled", "hydra.job_logging: not allowed"),
        ("hydra.job.env_set.LD_PRELOAD=x", "hydra.job.env_set.LD_PRELOAD: not allowed"),
        ("+hydra.job.env_copy=[HOME]", "hydra.job.env_copy: not allowed"),
        ("hydra.searchpath=[file:///tmp]", "hydra.searchpath: not allowed"),
        ("hydra.verbose=true", "hydra.verbose: not allowed"),
        ("hydra=null", "hydra: not allowed"),
        ("hydra={job:{env_set:{A:b}}}", "hydra: not allowed"),
        ("experiment=null", "no experiment is called 'null'"),
        ("~position", "position: cannot be left out"),
        ("+position=alibi", "position: is there already; write position=alibi"),
        ("+hydra.sweeper.params.seed=1", "is for experiment files; on the line write -m seed=1"),
        ("hydra/launcher=joblib", "hydra.launcher: a launcher is chosen on the line"),
        ("hydra/sweeper=optuna", "hydra.sweeper: a sweeper is chosen on the line of a sweep"),
        ("seed=${oc.env:HOME}", "oc.env:HOME: a config may not read environment variables"),
        ("seed=${${x}.env:HOME}", "seed"),
    ],
)
def test_refused_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compose(override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  _target_: os.getcwd\n", "model._target_: '_target_' is refused"),
        ("tags:\n  - {_target_: os.getcwd}\n", r"tags.0._target_: '_target_' is refused"),
        ("hydra:\n  callbacks:\n    x:\n      _target_: os.getcwd\n", "hydra.callbacks.x._target_: not allowed"),
        ("hydra:\n  job:\n    env_set:\n      A: b\n", "hydra.job.env_set.A: not allowed"),
        (
            "hydra:\n  job_logging:\n    handlers:\n      file:\n        filename: /tmp/x\n",
            "hydra.job_logging.*: not allowed",
        ),
        ("hydra:\n  launcher:\n    _target_: os.getcwd\n", "hydra.launcher._target_"),
        ("hydra:\n  output_subdir: x\n", "hydra.output_subdir: not allowed"),
        ("defaults:\n  - override /hydra/job_logging: disabled\n", "hydra.job_logging.*: not allowed"),
        ("note: ${oc.env:HOME}\n", "oc.env:HOME: a config may not read environment variables"),
        ("a: oc\nnote: ${${a}.env:HOME}\n", "oc.env:HOME: a config may not read"),
        ("note: [1\n", r"mine.yaml:\d+: not valid YAML"),
        ("defaults:\n  - override /position: rop\n", "no position is called 'rop'"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compose("experiment=mine", config_dir=experiment(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_refused_target_is_never_called(tmp_path: Path) -> None:
    witness = tmp_path / "called"
    text = f"hydra:\n  callbacks:\n    x:\n      _target_: pathlib.Path.touch\n      self: {witness}\n"
    with pytest.raises(ConfigError):
        compose("experiment=mine", config_dir=experiment(tmp_path / "conf", text))
    assert not witness.exists()


def test_environment_resolver_is_put_back() -> None:
    compose()
    assert OmegaConf.create({"home": "${oc.env:PATH}"}).home == os.environ["PATH"]


def test_a_file_with_a_shipped_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "position").mkdir()
    (tmp_path / "position" / "rope.yaml").write_text("name: rope\n")
    with pytest.raises(ConfigError, match="has the name of a shipped file"):
        compose(config_dir=tmp_path)


def test_interval_sweep_is_refused() -> None:
    with (
        Composer("train") as composer,
        pytest.raises(ConfigError, match=r"optim\.learning_rate: an interval has no list"),
    ):
        composer.cells(["optim.learning_rate=interval(0.1,1)"], {})


def test_a_key_of_another_option_names_its_owner() -> None:
    with pytest.raises(
        ConfigError, match=r"position.theta: position=alibi has no 'theta'; it belongs to position=.*\brope\b.* or "
    ):
        compose("position=alibi", "position.theta=3")


def test_set_key() -> None:
    config = {"a": {"b": 1}}
    set_key(config, "a.c", 2)
    set_key(config, "d.e", 3)
    assert config == {"a": {"b": 1, "c": 2}, "d": {"e": 3}}
    with pytest.raises(ConfigError, match=r"a\.b\.x: b is one value here"):
        set_key(config, "a.b.x", 1)
