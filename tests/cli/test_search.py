"""Sweepers other than Hydra's own: trials as cells, by a stand-in and by Optuna; cells listed in advance; refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.sweeper import Sweeper

from ctxlab.launch import Pool, read_sweep
from ctxlab.records.run import Run
from ctxlab.records.store import RunStore
from tests.cli.lines import SMALL, ctxlab
from tests.records.builders import scores

QUIET = (*SMALL, "logger.mode=disabled", "eval=perplexity")


class TwoRounds(Sweeper):
    """Tries what it is told to in its `rounds`, the second one only when the first has come back."""

    returned: list[tuple[JobStatus, Any]]
    arguments: list[str]
    settings: dict[str, Any]

    def __init__(self, rounds: Any, **settings: Any) -> None:
        self.rounds = rounds
        TwoRounds.returned, TwoRounds.settings = [], settings

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        TwoRounds.arguments = arguments
        first = 0
        for batch in self.rounds:
            done = self.launcher.launch([tuple(trial) for trial in batch], initial_job_idx=first)
            first += len(done)
            TwoRounds.returned += [(one.status, one._return_value) for one in done]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """hydra/sweeper=rounds, and a pool whose cells end at once with a loss of their learning rate."""
    name = f"hydra_plugins.stand_in.{TwoRounds.__name__}"
    defaults = {"_target_": name, "rounds": [], "direction": "?", "n_jobs": 0, "max_failure_rate": 0.0}
    ConfigStore.instance().store(group="hydra/sweeper", name="rounds", node=defaults)
    Plugins.instance().class_name_to_class[name] = TwoRounds
    for table, value in (
        ("SWEEPERS", {"rounds": "stand-in"}),
        ("ADAPTIVE", ("rounds",)),
        ("_SETTINGS", {"rounds": ("rounds", "n_jobs", "direction", "max_failure_rate")}),
    ):
        monkeypatch.setattr(f"ctxlab.config.sweepers.{table}", value)

    def execute(pool: Pool, runs: Sequence[Run]) -> None:
        for run in runs:
            run.restart()
            rate = run.record.config["optim"]["learning_rate"]
            if rate < 1:
                run.measure(*scores(64, rate))
                run.finish("done")
            else:
                run.finish("failed", "RunError: the loss is nan")
            pool.finished(run)

    monkeypatch.setattr(Pool, "execute", execute)


def sweep() -> tuple[str, list[Run]]:
    """The one sweep there is, and its cells in order."""
    store = RunStore(Path("runs"))
    (name,) = (path.name for path in Path("runs/sweeps").iterdir())
    return name, [store.open(run_id) for run_id in read_sweep(store.root, name).cells]


def test_trials_are_cells_whose_failures_are_results(place: Path, stand_in: None) -> None:
    rounds = (
        "[[['position=rope','optim.learning_rate=0.2'],['position=alibi','optim.learning_rate=2.0']],"
        "[['position=alibi','optim.learning_rate=0.1'],['position=typo','optim.learning_rate=0.3'],"
        "['position=rope','optim.learning_rate=0.4','+optim.typo=1'],['position=rope','model.head_dim=33']]]"
    )
    done = ctxlab(
        "train", "-m", *QUIET, "hydra/sweeper=rounds", f"hydra.sweeper.rounds={rounds}", "sweep.jobs=2",
        "position=rope,alibi", "optim.learning_rate=tag(log,interval(0.1,3))",
    )  # fmt: skip
    assert done.code == 1, done.err
    assert TwoRounds.arguments == ["position=rope,alibi", "optim.learning_rate=tag(log,interval(0.1,3))"]
    assert TwoRounds.settings == {"direction": "minimize", "n_jobs": 2, "max_failure_rate": 1.0}
    name, runs = sweep()
    statuses = ["done", "failed", "done", "failed", "failed", "skipped"]
    assert [run.record.status for run in runs] == statuses
    assert [run.record.sweep.cell for run in runs if run.record.sweep] == list(range(6))
    for run, (status, value) in zip(runs, TwoRounds.returned, strict=True):
        assert (status is JobStatus.COMPLETED) == (run.record.status == "done")
        if status is JobStatus.COMPLETED:
            assert value == scores(64, run.record.config["optim"]["learning_rate"])[2].value
        else:
            assert run.record.reason
            assert run.record.reason in str(value)
    assert runs[3].record.config["position"] == "typo"
    assert "typo" in runs[3].record.reason
    assert "typo" in runs[4].record.reason
    assert re.search(rf"^best of 2 in bits/byte: 0\.048, position=alibi .*\({runs[2].id}\)$", done.out, re.MULTILINE)
    for run in runs:
        assert run.id in done.out
        assert run.record.reason in done.out

    again = ctxlab("train", f"sweep.resume={name}")
    assert f"sweep {name}: 6 cells, 3 to run" in again.err


def test_contexts_that_are_searched_over_want_one_length_of_segments(place: Path, stand_in: None) -> None:
    rounds = "hydra.sweeper.rounds=[[['context=64'],['context=128']]]"
    words = ("train", "-m", *QUIET[:1], *QUIET[2:], "hydra/sweeper=rounds", rounds, "context=64,128")
    assert ctxlab(*words).code == 1
    _, runs = sweep()
    assert all("eval.perplexity.segment: contexts are searched over" in run.record.reason for run in runs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-m", "hydra/sweeper=optunna", "seed=1,2"), "no sweeper is called 'optunna'; did you mean 'optuna'?"),
        (("hydra/sweeper=optuna", "seed=1"), "hydra/sweeper: says which cells a sweep has; this line is one run"),
        (("-m", "hydra.sweeper.n_trials=3", "seed=1,2"), "hydra/sweeper: expected one sweeper beside its settings"),
        (("-m", "hydra/sweeper=optuna", "hydra.sweeper.custom_search_space=os.system", "seed=1,2"), "of optuna n_trials"),
        (("-m", "hydra/sweeper=optuna", "hydra.sweeper._target_=os.system", "seed=1,2"), "of optuna n_trials"),
        (("-m", "hydra/sweeper=optuna", "sweep.resume=x"), "hydra/sweeper: a sweep that goes on has its cells already"),
        (("-m", "optim.learning_rate=interval(0.1,1)"), "or search it: hydra/sweeper=optuna"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_written(place: Path, words: tuple[str, ...], message: str) -> None:
    before = sorted(path.name for path in Path("runs").iterdir())
    done = ctxlab("train", *QUIET, *words)
    assert done.code == 2
    assert message in done.errors[0]
    assert sorted(path.name for path in Path("runs").iterdir()) == before


def test_nothing_to_search_leaves_nothing(place: Path, stand_in: None) -> None:
    done = ctxlab("train", "-m", *QUIET, "hydra/sweeper=rounds")
    assert (done.code, done.errors) == (
        2, ["hydra/sweeper: nothing is searched over, e.g. optim.learning_rate=interval(0.001,0.1)"],
    )  # fmt: skip
    assert not Path("runs/sweeps").exists()


def test_lists_side_by_side(place: Path) -> None:
    """hydra-list-sweeper 1.1: two cells, not four."""
    pytest.importorskip("hydra_plugins.list_sweeper_plugin")
    lists = ("+hydra.sweeper.list_params.position=[rope,alibi]", "+hydra.sweeper.list_params.seed=[1,2]")
    done = ctxlab("train", "-m", *QUIET, "hydra/sweeper=list", *lists, "--cfg", "job")
    assert done.code == 0, done.err
    assert [line for line in done.out.splitlines() if line.startswith("#")] == [
        "# cell 0: position=rope seed=1", "# cell 1: position=alibi seed=2",
    ]  # fmt: skip


@pytest.mark.slow
def test_optuna_searches(place: Path) -> None:
    """hydra-optuna-sweeper 1.3 with the optuna 2.10 that it pins. Odd head sizes fit no RoPE: those trials are skipped."""
    pytest.importorskip("optuna")
    done = ctxlab(
        "train", "-m", *QUIET, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler.seed=1",
        "sweep.jobs=2", "model.head_dim=32,33", "optim.learning_rate=tag(log,interval(0.001,0.1))",
    )  # fmt: skip
    assert done.code == 0, done.err
    name, runs = sweep()
    assert len(runs) == 6
    sizes = [run.record.config["model"]["head_dim"] for run in runs]
    assert set(sizes) == {32, 33}
    assert [run.record.status for run in runs] == ["done" if size == 32 else "skipped" for size in sizes]
    assert len({run.record.config["optim"]["learning_rate"] for run in runs}) == 6
    assert "Error executing job" not in done.err
    best = min(
        (m.value, run.id) for run in runs for m in run.measurements() if (m.name, m.context) == ("bits_per_byte", 64)
    )
    assert f"({best[1]})" in done.out
    (written,) = Path(f"runs/sweeps/{name}").glob("optimization_results.yaml")
    assert json.dumps(best[0])[:8] in written.read_text(encoding="utf-8")
