"""Lines on questions and labelled texts: scored again the same, and refused in one line where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctxlab.records.store import RunStore
from ctxlab.train import precision
from tests.cli.lines import alone, ctxlab, write_text
from tests.data.labelled.builders import articles, lines, write_squad

SMALL = (
    "model=nano", "model.d_model=16", "model.n_heads=2", "model.n_layers=1", "model.d_ff=32", "tokenizer=byte",
    "trainer.max_tokens=none", "trainer.max_steps=2", "trainer.batch_tokens=512", "trainer.precision=fp32",
    "logger.mode=disabled", "profile.contexts=none",
)  # fmt: skip
ENCODER = "model.architecture=encoder"
SQUAD = ("data=squad", "data.path=squad.json")
LABELS = ("data=classification", "data.path=texts.tsv")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions, labelled texts, a text, and a run on each of the labelled ones: `asked` and `told`."""
    folder = tmp_path_factory.mktemp("desk")
    write_squad(folder / "squad.json", articles())
    (folder / "texts.tsv").write_text("\n".join(lines()) + "\n", encoding="utf-8")
    write_text(folder / "plays.txt")
    with pytest.MonkeyPatch.context() as patch:
        alone(patch, folder)
        for words in ((*SQUAD, ENCODER, "context=64", "name=asked"), (*LABELS, "context=40", "name=told")):
            done = ctxlab("train", *words, *SMALL)
            assert done.code == 0, done.err
    return folder


@pytest.fixture(autouse=True)
def here(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch, desk)


@pytest.mark.parametrize("name", ["asked", "told"])
def test_a_run_is_scored_again_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, as it was trained, on a machine too where bf16 is fast."""
    (tmp_path / "cpuinfo").write_text("flags : avx512_bf16\n", encoding="utf-8")
    monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "cpuinfo")
    done = ctxlab("eval", name, "logger.mode=disabled", "--json")
    assert done.code == 0, done.err
    (again,) = json.loads(done.out)
    assert again["provenance"]["precision"] == "fp32"
    found = {(m["name"], json.dumps(m["axes"])): m["value"] for m in again["measurements"]}
    run = RunStore(Path("runs")).resolve(name)
    before = {(m.name, json.dumps(m.axes)): m.value for m in run.measurements() if m.axes.get("baseline") != "untuned"}
    assert found == before


def test_several_runs_stand_side_by_side() -> None:
    done = ctxlab("eval", "run=[asked,asked-]", "logger.mode=disabled")
    assert done.code == 2
    assert ctxlab("train", *SQUAD, ENCODER, "context=64", "name=other", "seed=2", *SMALL).code == 0
    done = ctxlab("eval", "run=[asked,other]", "logger.mode=disabled")
    assert done.code == 0, done.err
    assert [line.split()[0].partition("-")[0] for line in done.out.splitlines() if line.startswith(("asked", "other"))] == [
        "asked", "other",
    ]  # fmt: skip
    assert done.out.count("training's most frequent") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", *SQUAD, "objective=extractive"),
         "objective: extractive trains model.architecture=encoder, not decoder; use objective=causal or model.architecture="),
        (("train", *SQUAD, "objective=causal", "model.architecture=encoder_decoder"), "use objective=seq2seq"),
        (("train", *SQUAD, ENCODER, "eval=perplexity"), "eval.perplexity: data=squad is scored by qa; use eval=qa"),
        (("train", *LABELS, "objective=causal"), "labels are chosen; use objective=classification"),
        (("train", "data=text", "data.path=plays.txt", "eval=qa"), "eval.qa: data=text has nothing for it; use data=squad"),
        (("train", "data=text", "data.path=plays.txt", "objective=extractive", ENCODER), "it reads questions; use data=squad"),
        (("train", "data=squad", ENCODER), "data.path: it takes a file of questions in SQuAD's JSON"),
        (("train", "data=classification"), "data.path: it takes a file of texts with labels"),
        (("train", "data=squad", "data.path=texts.tsv", ENCODER), "texts.tsv is no JSON at line 1: expected '{'"),
        (("train", "data=classification", "data.path=squad.json"), "line 1 of squad.json has 1 column between tabs"),
        (("train", *SQUAD, ENCODER, "context=16"), "context: 16 tokens leave no room beside a question"),
        (("train", *SQUAD, ENCODER, "objective.stride=0"), "objective.stride: "),
        (("eval", "asked", *LABELS), "objective=extractive does not go with data=classification: it reads questions"),
        (("eval", "told", *SQUAD), "objective=classification does not go with data=squad: it reads labelled texts"),
        (("eval", "told", "data=text", "data.path=plays.txt"), "objective=classification chooses among labels or places"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_is_refused_in_one_line(words: tuple[str, ...], said: str) -> None:
    before = set(Path("runs").iterdir())
    taken = {word.partition("=")[0] for word in words}
    more = SMALL if words[0] == "train" else ("logger.mode=disabled",)
    done = ctxlab(*words, *(word for word in more if word.partition("=")[0] not in taken))
    assert (done.code, len(done.errors)) == (2, 1), done
    assert said in done.errors[0]
    assert set(Path("runs").iterdir()) == before, "nothing is left behind"
