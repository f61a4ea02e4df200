"""Tasks from their line to their end: trained on, evaluated, swept over, mirrored, listed."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ctxlab.cli.commands.eval import same_lengths
from ctxlab.cli.scoring import training_corpora
from ctxlab.config.schema import Evaluations
from ctxlab.data.tokenizers.base import load_tokenizer
from ctxlab.evaluation.perplexity import PerplexityConfig
from ctxlab.evaluation.tasks import NeedleGrid, OwnTask
from ctxlab.launch import Pool
from ctxlab.records.run import Run
from ctxlab.records.store import RunStore
from tests.cli.lines import alone, ctxlab
from tests.records import leet
from tests.records.builders import make_run

QUICK = (
    "model=nano", "context=32", "trainer.max_steps=2", "trainer.batch_tokens=256", "trainer.validate_tokens=128",
    "profile.contexts=none", "eval.task.items=6",
)  # fmt: skip
MQAR = ("data=task/mqar", "data.pairs=[2]", "data.vocab_size=32")
LENGTHS = (16, 32, 64, 128, 256)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose runs/ has one run on MQAR, mirrored, and one on copies."""
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        alone(patch, folder)
        first = ctxlab("train", *QUICK, *MQAR, "name=mqar")
        second = ctxlab("train", *QUICK, "data=task/copy", "data.symbols=5", "name=copy", "logger.mode=disabled")
        assert first.code == second.code == 0, first.err + second.err
        (folder / "said.txt").write_text(first.out)
    return folder


def the(name: str) -> Run:
    (found,) = [run for run in RunStore(Path("runs")).runs() if run.record.name == name]
    return found


def newest(before: set[str]) -> Run:
    (found,) = [run for run in RunStore(Path("runs")).runs() if run.id not in before]
    return found


def ids() -> set[str]:
    return {run.id for run in RunStore(Path("runs")).runs()}


def test_a_training_on_a_task_speaks_its_numbers_and_is_asked_that_task(place: Path) -> None:
    run = the("mqar")
    record = run.record
    assert record.status == "done"
    assert set(shlex.split(record.line)) == {"ctxlab", "train", *QUICK, *MQAR, "name=mqar"}
    assert (record.config["tokenizer"]["name"], record.config["data"]["pairs"]) == ("ids", [2])
    assert [part for part, settings in record.config["eval"].items() if settings != "none"] == ["task"]
    assert load_tokenizer(run.path / "tokenizer").vocab_size == 32 + 3
    facts = record.provenance.data
    assert (facts["task"], facts["settings"]["pairs"], facts["tokenizer"]["vocab_size"]) == ("task/mqar", [2], 35)

    rows = run.metrics()
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2]
    checked = [row for row in rows if row["split"] == "validation"]
    assert checked
    assert all(0 <= row["accuracy"] <= 1 and row["nats_per_token"] > 0 for row in checked)

    measured = {m.context: m for m in run.measurements()}
    assert tuple(measured) == LENGTHS
    assert {(m.name, m.axes["task"], m.status, m.split) for m in measured.values()} == {
        ("accuracy", "mqar", "done", "test")
    }
    assert all(m.facts["chance"] == 0.5 and m.facts["oracle"] == 1 and m.n_targets == 12 for m in measured.values())
    items = run.items()
    assert [(item.context, item.item) for item in items] == [(n, i) for n in LENGTHS for i in range(6)]
    for context, m in measured.items():
        mean = sum(item.score for item in items if item.context == context) / 6
        assert m.value == pytest.approx(mean, abs=1e-12)


def test_the_end_of_it_says_the_scores_by_length_with_chance(place: Path) -> None:
    said = Path("said.txt").read_text().splitlines()
    head = said.index("share of right answers by length")
    assert said[head + 1].split() == ["task", *map(str, LENGTHS)]
    assert said[head + 2].split()[0] == "mqar"
    assert "mqar: chance 0.5, oracle 1" in said
    assert any(line.startswith("labelled places: 6 examples a cell, the same for every run") for line in said)
    prompt = next(line for line in said if "ctxlab generate" in line)
    words = shlex.split(prompt.split("  ")[1])
    done = ctxlab(*words[1:], "decoding.max_new_tokens=3")
    assert (done.code, done.err) == (0, ""), "what it says to type next works"
    assert re.fullmatch(r"1 2 3 4 ?(\d+ ){0,3}\n?", done.out)


def test_the_mirror_names_accuracy_by_task(place: Path) -> None:
    history = leet.history(leet.inspect(the("mqar").path))
    measured = {m.context: m.value for m in the("mqar").measurements()}
    assert {row["context"]: row["eval/mqar/accuracy"] for row in history if "eval/mqar/accuracy" in row} == measured
    assert [row["val/accuracy"] for row in history if "val/accuracy" in row] == [
        row["accuracy"] for row in the("mqar").metrics() if row["split"] == "validation"
    ]


@pytest.mark.parametrize("name", ["mqar", "copy"])
def test_eval_of_a_run_asks_its_own_task_again(place: Path, name: str) -> None:
    parent, before = the(name), ids()
    done = ctxlab("eval", parent.id, "eval.task.items=6", "profile.contexts=none", "logger.mode=disabled")
    assert done.code == 0, done.err
    again = newest(before)
    assert (again.record.parent, again.record.command) == (parent.id, "eval")
    assert again.measurements() == parent.measurements()
    assert again.items() == parent.items()
    assert "share of right answers by length" in done.out


def test_the_answer_to_a_copy_is_kept_with_what_was_wanted(place: Path) -> None:
    for item in the("copy").items():
        n = (item.context - 1) // 2
        (wanted,) = item.wanted
        assert len(wanted.split()) == n + 1
        assert wanted.split()[-1] == "6"
        assert item.answer is not None
        assert len(item.answer.split()) <= n + 1
        assert item.score == float(item.answer == wanted)


def test_eval_of_runs_side_by_side_compares_the_same_examples(place: Path) -> None:
    parent, before = the("mqar"), ids()
    shutil.copytree(parent.path, "runs/other-aaaa")
    record = (parent.path / "run.json").read_text().replace(f'"{parent.id}"', '"other-aaaa"')
    Path("runs/other-aaaa/run.json").write_text(record)
    words = ("eval.task.items=6", "eval.task.lengths=[16,64]", "profile.contexts=none", "logger.mode=disabled")
    done = ctxlab("eval", f"run=[{parent.id},other-aaaa]", *words)
    assert done.code == 0, done.err
    both = newest({*before, "other-aaaa"})
    assert {(m.axes["run"], m.context) for m in both.measurements()} == {
        (whose, n) for whose in (parent.id, "other-aaaa") for n in (16, 64)
    }
    lines = done.out.splitlines()
    assert lines[0] == "mqar: share of right answers by length"
    assert lines[1].split() == ["run", "16", "64"]
    values = {m.context: m.value for m in parent.measurements()}
    assert lines[2].split() == [parent.id, *(f"{values[n]:.3f}" for n in (16, 64))]
    assert lines[3].split() == [
        "other-aaaa", *(word for n in (16, 64) for word in (f"{values[n]:.3f}", "(+0.000", "±0.000)")),
    ]  # fmt: skip
    assert "nats/token by context" not in done.out


def test_a_sweep_over_tasks_shows_each_of_them(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_here(pool: Pool, runs: Sequence[Run]) -> None:
        for run in runs:
            assert ctxlab("_run", str(run.path)).code == 0

    monkeypatch.setattr(Pool, "execute", run_here)
    words = (*QUICK, "context=64", "logger.mode=disabled", "eval.task.lengths=[16]")
    done = ctxlab("train", "-m", *words, "data=task/copy,task/mqar", "tokenizer=ids", "eval=task")
    assert done.code == 0, done.err
    heads = [line.split(":")[0] for line in done.out.splitlines() if "share of right answers by length" in line]
    assert heads == ["copy", "mqar"]
    assert "does not fit at 16: mqar does not fit in 16 tokens" in done.out, "16 pairs at the end"


def test_a_sweep_over_tasks_knows_what_each_implies(place: Path) -> None:
    done = ctxlab("train", "-m", *QUICK, "data=task/copy,shakespeare", "--cfg", "job")
    assert done.code == 2, "eval.task.items is of tasks alone"
    words = [word for word in QUICK if not word.startswith("eval.")]
    done = ctxlab("train", "-m", *words, "data=task/copy,shakespeare,task/needle", "--cfg", "job")
    assert done.code == 0, done.err
    found = re.findall(r"^  name: (ids|unigram)$", done.out, flags=re.MULTILINE)
    assert found == ["ids", "unigram", "unigram"]


def test_list_shows_tasks_with_what_they_are(place: Path) -> None:
    done = ctxlab("list", "corpora")
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in done.out.splitlines() if line.startswith("task/")}
    assert {"task/mqar", "task/copy", "task/needle"} <= lines.keys()
    assert lines["task/mqar"].startswith("Pairs of keys and values")


def test_help_names_tasks_as_data(place: Path) -> None:
    done = ctxlab("train", "--help")
    assert re.search(
        r"data +classification, parallel, shakespeare\*, squad, stdlib, task/copy,\s+task/induction", done.out
    )
    assert re.search(r"eval +classification, lm_eval,[\s\S]{0,120}\btask,\s+translation", done.out)


def test_several_runs_are_asked_at_the_same_lengths_whatever_they_were_trained_at() -> None:
    parents: Any = [SimpleNamespace(record=SimpleNamespace(config={"context": context})) for context in (64, 32)]
    asked = Evaluations(perplexity=PerplexityConfig(), needle=NeedleGrid(), task=OwnTask(lengths=(7,)))
    both = same_lengths(asked, parents)
    assert both.perplexity.lengths == both.needle.lengths == (16, 32, 64, 128, 256, 512)
    assert both.task.lengths == (7,)
    assert both.ngram == "none"
    assert same_lengths(asked, parents[:1]) is asked


def test_the_texts_that_weights_have_seen_are_those_of_the_runs_they_come_from_too(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    before = "none"
    made = []
    for data in (
        {"name": "text", "path": "books"},
        {"name": "task/needle", "haystack": "stdlib"},
        {"name": "task/mqar"},
    ):
        made.append(make_run(tmp_path, config={"data": data, "init": before}))
        before = made[-1].id
    assert [corpus.name for corpus in training_corpora(made[2], store)] == ["stdlib", "text"]
    assert [getattr(corpus, "path", "") for corpus in training_corpora(made[1], store)] == ["", "books"]
    shutil.rmtree(made[0].path)
    assert [corpus.name for corpus in training_corpora(made[2], store)] == ["stdlib"]
