"""What a user can get wrong: one line a mistake with the nearest valid value, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ctxlab.launch import Pool
from ctxlab.records.run import Run
from ctxlab.records.store import RunStore
from ctxlab.train import checkpoint
from tests.cli.lines import SMALL, alone, ctxlab

TRAIN = ("train", *SMALL, "logger.mode=disabled")

# id -> words, what is said (one expression a line of it)
MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # names
    "command": (("trian",), (r"ctxlab has no command 'trian'; did you mean 'train'\?",)),
    "group": ((*TRAIN, "positon=rope"), (r"positon: no such key; did you mean 'position'\?",)),
    "option": ((*TRAIN, "position=rop"), (r"position: no position is called 'rop'; did you mean 'rope'\?",)),
    "option that reads as a number": ((*TRAIN, "model=1"), (r"model: no model is called '1'; did you mean '1b'\?",)),
    "option that is null": ((*TRAIN, "position=null"), (r"position: no position is called 'null'; available: alibi",)),
    "key": ((*TRAIN, "model.d_modl=64"), (r"model.d_modl: no such key; did you mean 'model.d_model'\?",)),
    "key without its group": ((*TRAIN, "d_model=64"), (r"d_model: no such key; did you mean 'model.d_model'\?",)),
    "added key": ((*TRAIN, "+model.d_modl=64"), (r"model.d_modl: no such key; did you mean 'd_model'\?",)),
    "added group": ((*TRAIN, "+position=alibi"), (r"position: is there already; write position=alibi",)),
    "deleted group": ((*TRAIN, "~position"), (r"position: cannot be left out; choose one of its options",)),
    "flag": ((*TRAIN, "--plugn", "x"), (r"--plugn: no such flag of ctxlab train; did you mean '--plugin'\?",)),
    "bare word": ((*TRAIN, "rope"), (r"train: expected key=value, got 'rope' \(see ctxlab train --help\)",)),
    "metric": ((*TRAIN, "sweep.metric=bits_per_bite"), (r"sweep.metric: .* did you mean 'bits_per_byte'\?",)),
    "kind": (("list", "positons"), (r"list: there is no kind 'positons'; did you mean 'positions'\?",)),
    "experiment": (
        (*TRAIN, "experiment=extrapolaton"),
        (r"experiment: no experiment is called 'extrapolaton'; did you mean 'extrapolation'\?",),
    ),
    # tasks
    "task": (("train", "data=task/mqat"), (r"data: no data is called 'task/mqat'; did you mean 'task/mqar'\?",)),
    "folder of tasks": (("train", "data=tasks/copy"), (r"data: no data is called 'tasks/copy'; did you mean 'task/copy'\?",)),
    "task without its folder": (("train", "data=mqar"), (r"data: no data is called 'mqar'; did you mean 'task/mqar'\?",)),
    "tokenizer of a task": (
        ("train", "data=task/mqar", "tokenizer=byte"),
        (r"tokenizer: data=task/mqar goes with ids, not with byte",),
    ),
    "numbers for a text": (
        (*TRAIN[:-2], "tokenizer=ids"),
        (r"tokenizer: data=text goes with unigram, bpe, byte or file, not with ids",),
    ),
    "perplexity of a task": (
        ("train", "data=task/copy", "eval=perplexity"),
        (r"eval: perplexity and ngram are of text, and task/copy has none; use eval=task",),
    ),
    "needles in numbers": (
        ("train", "data=task/copy", "eval=needle"),
        (r"eval: needles and RULER ask in words, and task/copy speaks in numbers; use eval=task",),
    ),
    "task of a text": (("train", "eval=task"), (r"eval.task: data=shakespeare is text and no task; use eval=needle, ",)),
    "task of a run on text": (("eval", "last", "eval=task"), (r"eval.task: the run was trained on text and has no task",)),
    "memory over a task": (
        ("train", "data=task/copy", "attention=recurrent"),
        (r"attention: recurrent carries a memory from window to window of a text, and the examples of task/copy stand",),
    ),
    "depths in numbers": (
        ("train", "data=task/copy", "eval.task.depths=5"),
        (r"eval.task.depths: task/copy has no depth to choose; the nearest valid value is 1",),
    ),
    "no lengths": (
        ("train", "data=task/copy", "eval.task.lengths=[]"),
        (r"eval.task.lengths: expected at least one length, or auto, got \[\]",),
    ),
    "one example": (("train", "data=task/copy", "eval.task.items=1"), (r"eval.task.items: expected a number >= 2, got 1",)),
    "more pairs than keys": (
        ("train", "data=task/mqar", "data.pairs=[4,64]"),
        (r"data: pairs \(64\) must be at most 63, the keys of vocab_size 128",),
    ),
    "one number for pairs": (("train", "data=task/mqar", "data.pairs=4"), (r"data.pairs: expected a list, got 4; write \[4\]",)),
    "setting of a task": (
        (*TRAIN, "data.pairs=[2]"),
        (r"data.pairs: data=text has no 'pairs'; it belongs to data=task/mqar",),
    ),
    "pairs that do not fit": (
        ("train", "data=task/mqar", "context=32", "model=nano", "logger.mode=disabled"),
        (r"mqar does not fit in 32 tokens.*at least 64",),
    ),
    # types and ranges
    "length of letters": ((*TRAIN, "context=abc"), (r"context: 'abc' is not a number with a unit",)),
    "length 0": ((*TRAIN, "context=0"), (r"context: expected a number > 0, got 0",)),
    "negative length": ((*TRAIN, "context=-5"), (r"context: expected a number > 0, got -5",)),
    "true for a number": ((*TRAIN, "model.n_layers=true"), (r"model.n_layers: expected a whole number, got true",)),
    "half a layer": ((*TRAIN, "model.n_layers=3.5"), (r"model.n_layers: expected a whole number, got 3.5",)),
    "word for a number": ((*TRAIN, "optim.learning_rate=fast"), (r"optim.learning_rate: expected a number, got 'f",)),
    "not a number": ((*TRAIN, "optim.learning_rate=nan"), (r"optim.learning_rate: expected a finite number, got nan",)),
    "negative seed": ((*TRAIN, "seed=-1"), (r"seed: expected a number >= 0, got -1",)),
    "empty batch": ((*TRAIN, "trainer.batch_tokens=0"), (r"trainer.batch_tokens: expected a number > 0, got 0",)),
    "dropout above 1": ((*TRAIN, "model.dropout=1.5"), (r"model.dropout: expected a number < 1, got 1.5",)),
    "word of a few": ((*TRAIN, "trainer.precision=fp16"), (r".*: expected auto, fp32 or bf16, got 'fp16'; did you",)),
    "one value for a list": ((*TRAIN, "tags=abc"), (r"tags: expected a list, got 'abc'; write \[abc\]",)),
    "cache of sinks": (
        (*TRAIN, "eval.perplexity.streaming=[64,4]"),
        (r"eval.perplexity.streaming: a cache of 4 has no token beside its 4 sinks; the nearest valid value is 5",),
    ),
    "empty list": (
        (*TRAIN, "eval.perplexity.lengths=[]"),
        (r"eval.perplexity.lengths: expected at least one length, or auto, got \[\]",),
    ),
    "empty text": ((*TRAIN, "logger.project="), (r"logger.project: expected text that is not empty, got ''",)),
    "several mistakes": (
        (*TRAIN, "context=0", "seed=x", "model.n_layers=0"),
        (r"seed: expected a whole", r"context: expected a number > 0", r"model.n_layers: expected a number > 0"),
    ),
    # parts that do not go together
    "width by heads": ((*TRAIN, "model.d_model=130"), (r"model: d_model \(130\) must be divisible by n_heads \(4\)",)),
    "shared heads": ((*TRAIN, "model.n_kv_heads=3"), (r"model: n_heads \(4\) must be divisible by n_kv_heads \(3\)",)),
    "odd heads": ((*TRAIN, "model.head_dim=33"), (r"model.head_dim: rope .* needs an even number, got 33",)),
    "small batch": (
        (*TRAIN, "trainer.batch_tokens=32"),
        (r"trainer.batch_tokens: 32 tokens hold no window of context=64; set trainer.batch_tokens to 64 or more",),
    ),
    "endless cosine": (
        (*TRAIN, "trainer.max_time=1min", "trainer.max_steps=none", "trainer.max_tokens=none"),
        (r"trainer.max_time: a cosine needs to know its last step; use optim.schedule=wsd or constant",),
    ),
    "no budget": (
        (*TRAIN, "trainer.max_steps=none", "trainer.max_tokens=none"),
        (r"trainer: set one of max_tokens, max_steps, max_time",),
    ),
    "uneven devices": (
        (*TRAIN, "trainer.devices=3"),
        (r"trainer.devices: 3 processes cannot share the 64 windows of a step .*; the nearest valid value is 2",),
    ),
    "key of another option": (
        (*TRAIN, "position=alibi", "position.theta=3"),
        (r"position.theta: position=alibi has no 'theta'; it belongs to position=",),
    ),
    # code and secrets
    "target on the line": ((*TRAIN, "model._target_=os.getcwd"), (r"model._target_: '_target_' is refused",)),
    "target in a file": (
        (*TRAIN, "--config-dir", "conf", "experiment=target"),
        (r"model._target_: '_target_' is refused; components are chosen by name and code comes from --plugin",),
    ),
    "callbacks": ((*TRAIN, "+hydra.callbacks.x.y=1"), (r"hydra.callbacks.x.y: not allowed; of hydra only mode",)),
    "environment": ((*TRAIN, "hydra.job.env_set.A=b"), (r"hydra.job.env_set.A: not allowed",)),
    "logging": ((*TRAIN, "hydra.job_logging.version=2"), (r"hydra.job_logging.version: not allowed",)),
    "launcher": ((*TRAIN, "hydra/launcher=jobli"), (r"hydra/launcher: no launcher is called 'jobli'; did you mean 'joblib'\?",)),
    "launcher of one run": ((*TRAIN, "hydra/launcher=basic"), (r"hydra/launcher: runs the cells of a sweep; this line",)),
    "settings of no launcher": ((*TRAIN, "-m", "hydra.launcher.n_jobs=2"), (r"hydra/launcher: expected one launcher",)),
    "sweeper params": (
        (*TRAIN, "+hydra.sweeper.params.seed=1"),
        (r"hydra.sweeper.params.seed: is for experiment files; on the line write -m seed=1",),
    ),
    "secret on the line": ((*TRAIN, "seed=${oc.env:HOME}"), (r"oc.env:HOME: a config may not read environment",)),
    "secret in a file": (
        (*TRAIN, "--config-dir", "conf", "experiment=secret"),
        (r"oc.env:HOME: a config may not read environment variables",),
    ),
    # files of the user's
    "no config folder": ((*TRAIN, "--config-dir", "nowhere"), (r"--config-dir: there is no folder nowhere",)),
    "shipped name": ((*TRAIN, "--config-dir", "shadow"), (r"--config-dir: .*rope.yaml has the name of a shipped",)),
    "broken YAML": (
        (*TRAIN, "--config-dir", "broken", "experiment=mine"),
        (r".*/broken/experiment/mine.yaml:\d+: not valid YAML: ",),
    ),
    "no plugin": ((*TRAIN, "--plugin", "nowhere.py"), (r"--plugin: there is no file nowhere.py",)),
    "plugin that does not import": (
        (*TRAIN, "--plugin", "imports.py"),
        (r"--plugin: .*imports.py: ModuleNotFoundError: No module named 'nosuchmodule'",),
    ),
    "plugin that ends Python": ((*TRAIN, "--plugin", "exits.py"), (r"--plugin: .*exits.py: SystemExit: 5",)),
    # text
    "no text": ((*TRAIN, "data.path=nowhere.txt"), (r"data.path: nowhere.txt does not exist",)),
    "text not named": (
        ("train", "model=nano", "data=text", "trainer.max_steps=1"),
        (r"data.path: a value is needed here",),
    ),
    "empty file": ((*TRAIN, "data.path=empty.txt"), (r"data.path: empty.txt is empty",)),
    "binary file": ((*TRAIN, "data.path=binary.txt"), (r"data.path: binary.txt is not text \(it holds zero bytes\)",)),
    "another encoding": ((*TRAIN, "data.path=latin.txt"), (r"data.path: latin.txt is not UTF-8 text",)),
    "folder without text": ((*TRAIN, "data.path=pictures"), (r"data.path: pictures holds no \.txt, \.md, \.jsonl file",)),
    "one line of text": ((*TRAIN, "data.path=line.txt"), (r"data: 1 .*document of .* a corpus needs 24",)),
    "documents that are too short": (
        (*TRAIN, "context=32k", "trainer.batch_tokens=32768"),
        (r"context: 32768 is longer than every document .*; the nearest valid value is \d+, or pack documents",),
    ),
    "no tokenizer": (
        (*TRAIN, "tokenizer=file", "tokenizer.path=nowhere.model"),
        (r"tokenizer.path: there is no file nowhere.model",),
    ),
    # runs
    "no such run": (("eval", "nano-rope-64-0000"), (r"run: there is no run .*; did you mean 'nano-rope-64-\w{4}'\?",)),
    "no such runs": (("eval", "run=[x,y]"), (r"run: there is no run 'x'", r"run: there is no run 'y'")),
    "ambiguous prefix": (("generate", "nano"), (r"run: 'nano' begins 2 runs: nano-rope-64-\w{4}, nano-waits-",)),
    "run without weights": (("eval", "nano-waits"), (r"run: nano-waits-\w{4} \(ctxlab train, waiting\) has no weights",)),
    "run named by nothing": (("generate", "run="), (r"run: expected a run id, a unique prefix of one, a path or last",)),
    "init of no run": ((*TRAIN, "init=nowhere"), (r"init: there is no run 'nowhere'",)),
    "one run twice": (("eval", "run=[last,last]"), (r"run: 'nano-rope-64-\w{4}' is given twice",)),
    "run of train": ((*TRAIN, "run=last"), (r"run: ctxlab train starts from a run with init=RUN",)),
    "damaged record": (("runs", "show", "damaged-aaaa"), (r".*/damaged-aaaa/run.json: not a run record",)),
    "position of a run": (("eval", "last", "position=alibi"), (r"position: is as in the recorded run;",)),
    "model of a run": (("generate", "last", "model.n_layers=2"), (r"model.n_layers: is as in the recorded run;",)),
    "tokenizer of a run": (("eval", "last", "tokenizer=byte"), (r"tokenizer: is as in the recorded run;",)),
    "resume with another seed": (("train", "resume=last", "seed=3"), (r"seed: is as in the run that goes on; resume=RUN",)),
    "resume with a misspelt key": (
        ("train", "resume=last", "trainer.max_stps=9"),
        (r"trainer.max_stps: no such key; did you mean 'trainer.max_steps'\?",),
    ),
    "resume of a sweep": (
        ("train", "-m", "resume=last"),
        (r"resume: goes on with one training run; a sweep goes on with sweep.resume=ID",),
    ),
    "resume in a file": (
        (*TRAIN, "--config-dir", "conf", "experiment=resumes"),
        (r"resume: goes on with one training run, and only from the line",),
    ),
    # sweeps
    "misspelt cell": (
        (*TRAIN, "-m", "position=rope,alibbi", "seed=1,2"),
        (r"position: no position is called 'alibbi'; did you mean 'alibi'\? \(cell 2, 3\)",),
    ),
    "cell without text": ((*TRAIN, "-m", "seed=1,2", "data.path=no.txt"), (r"data.path: no.txt does not .*\(cell 0, 1\)",)),
    "sweep without values": ((*TRAIN, "-m", "seed=range(0,0)"), (r"seed: the sweep 'seed=range\(0,0\)' has no values",)),
    "sweep of an interval": (
        (*TRAIN, "-m", "optim.learning_rate=interval(0.1,1)"),
        (r"optim.learning_rate: an interval has no list of values; write range\(...\) or choices",),
    ),
    "values without -m": ((*TRAIN, "context=32,64"), (r"context: '32,64' is several values; to sweep .* add -m",)),
    "sweep of texts": (("generate", "-m", "run=last"), (r"-m: ctxlab generate makes no record",)),
    "no such sweep": (("train", "sweep.resume=position-0000"), (r"sweep.resume: there is no sweep 'position-0000'",)),
    # machine and mirror
    "no host beside the device": (
        (*TRAIN, "trainer.accelerator=cpu", "trainer.offload=cpu", "data.path=nowhere.txt"),  # before any text is read
        (r"trainer.offload: on a CPU what backward needs is in its memory already; use none or disk",),
    ),
    "no GPU": ((*TRAIN, "trainer.accelerator=gpu"), (r"trainer.accelerator: no CUDA device is available here",)),
    "online without a key": (
        (*TRAIN, "logger.mode=online"),
        (r"logger.mode: online needs an API key .*; use logger.mode=offline",),
    ),
    "runs in a file": ((*TRAIN, "paths.runs=plays.txt"), (r"paths.runs: plays.txt is not a folder",)),
    "runs below a file": ((*TRAIN, "paths.runs=plays.txt/runs"), (r"paths.runs: plays.txt/runs cannot be made: Not a",)),
    "sweep in a file": ((*TRAIN, "-m", "seed=1,2", "paths.runs=plays.txt"), (r"paths.runs: plays.txt/sweeps.*: Not a",)),
    "runs on a read-only file system": ((*TRAIN, "paths.runs=/proc/x"), (r"paths.runs: /proc/x cannot be made",)),
    "cache in a file": ((*TRAIN, "paths.cache=plays.txt"), (r"paths.cache: plays.txt/tokens cannot be written: Not a",)),
    # generation
    "no prompt file": (("generate", "last", "prompt_file=nowhere"), (r"prompt_file: nowhere cannot be read: No such",)),
    "prompts and a prompt": (
        ("generate", "last", "x", "prompts_file=line.txt"), (r"prompts_file: is given beside prompt; give one",)
    ),
    "search and draw": (
        ("generate", "last", "x", "decoding.num_beams=4", "decoding.top_k=5"),
        (r"decoding.num_beams: a search draws nothing; leave out top_k=5",),
    ),
    "two prompts": (("generate", "last", "x", "prompt_file=line.txt"), (r"prompt_file: is given beside prompt",)),
    "too many words": (("generate", "last", "To", "be"), (r"generate: 'be' is one word too many .*quote text with spa",)),
    "prompt that looks like a key": (
        ("generate", "last", "E=mc2"),
        (r'E: no such key; see ctxlab generate --help; a prompt with a = in it is given as prompt="..."',),
    ),
    "text that is none": (("generate", "last", "prompt=\udcc3"), (r"prompt: expected UTF-8 text, got '\\udcc3'",)),
    "nucleus above 1": (("generate", "last", "decoding.top_p=2"), (r"decoding.top_p: expected a number <= 1, got 2",)),
    "checkpoint": (("generate", "last", "checkpoint=first"), (r"checkpoint: expected last, best or average, got 'first'",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def desk(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with one trained run, one that waits, one that is damaged, and files that no line can use."""
    folder = tmp_path_factory.mktemp("desk") / "desk"
    shutil.copytree(trained_once, folder, symlinks=True)
    runs = RunStore(folder / "runs")
    runs.create("train", "nano-waits", config={"context": 64}, line="ctxlab train", status="waiting")
    (folder / "runs" / "damaged-aaaa").mkdir()
    (folder / "runs" / "damaged-aaaa" / "run.json").write_text('{"schema": 1, "id"')
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(b"\0\1\2" * 99)
    (folder / "latin.txt").write_bytes("\n".join(["déjà vu"] * 99).encode("latin-1"))
    (folder / "line.txt").write_text("one line\n")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").touch()
    (folder / "imports.py").write_text("import nosuchmodule\n")
    (folder / "exits.py").write_text("import sys\nsys.exit(5)\n")
    files = {
        "conf/experiment/target": "model:\n  _target_: os.getcwd\n",
        "conf/experiment/secret": "seed: ${oc.env:HOME}\n",
        "conf/experiment/resumes": "resume: last\n",
        "shadow/position/rope": "name: rope\n",
        "broken/experiment/mine": "note: [1\n",
    }
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# @package _global_\n{text}")
    with pytest.MonkeyPatch.context() as patch:
        alone(patch, folder)
        yield folder


def tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != ".heartbeat"}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_exit_2_and_leaves_nothing(name: str, desk: Path) -> None:
    words, said = MISTAKES[name]
    before = tree(desk / "runs")
    done = ctxlab(*words)
    assert done.code == 2, done
    assert len(done.errors) == len(said), done.err
    for line, expected in zip(done.errors, said, strict=True):
        assert re.match(expected, line), line
    assert done.out == ""
    assert "Traceback" not in done.err
    assert tree(desk / "runs") == before


def test_a_mode_of_the_mirror_that_there_is_not(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "onlin")
    before = tree(desk / "runs")
    for words in (("train", *SMALL), ("train", *SMALL, "-m", "seed=1,2"), ("eval", "nano-rope")):
        done = ctxlab(*words)
        assert (done.code, done.errors[0][:55]) == (2, "WANDB_MODE: there is no mode 'onlin'; did you mean 'onl")
    assert tree(desk / "runs") == before


def test_last_without_runs(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXLAB_RUNS", "elsewhere")
    for words in (("eval", "last"), ("generate",), ("train", "resume=last"), (*TRAIN, "init=last")):
        done = ctxlab(*words)
        assert done.code == 2
        assert re.match(
            r"(run|resume|init): no run in elsewhere has weights yet; make one with: ctxlab train", done.errors[0]
        )
    assert not Path("elsewhere").exists()


def test_an_empty_prompt_starts_a_document(desk: Path) -> None:
    done = ctxlab("generate", "nano-rope", "", "decoding.max_new_tokens=3")
    assert (done.code, done.err) == (0, "")
    assert ctxlab("generate", "nano-rope", "decoding.max_new_tokens=3").out == done.out


@pytest.fixture
def best(trained: Path) -> Path:
    """The folder of the one checkpoint."""
    return trained / "checkpoints" / (trained / "checkpoints" / "last").read_text().strip()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_cut_weights_are_refused_and_the_run_stays_as_it_was(trained: Path, best: Path) -> None:
    cut(best / "weights.safetensors")
    before, record = {path.name for path in Path("runs").iterdir()}, (trained / "run.json").read_text()
    for words in (
        ("generate", "last", "x"), ("eval", "last"), (*TRAIN, "init=last"), ("train", "resume=last", "trainer.max_steps=9"),
    ):  # fmt: skip
        done = ctxlab(*words)
        assert (done.code, len(done.errors)) == (2, 1), done
        assert re.search(r"weights.safetensors cannot be read: ", done.errors[0])
    assert {path.name for path in Path("runs").iterdir()} == before
    assert (trained / "run.json").read_text() == record


def test_a_cut_training_state_is_refused_and_the_run_stays_as_it_was(trained: Path, best: Path) -> None:
    cut(best / "training.pt")
    record = json.loads((trained / "run.json").read_text())
    done = ctxlab("train", "resume=last", "trainer.max_steps=9", "note=more")
    assert (done.code, len(done.errors)) == (2, 1), done
    assert re.search(r"training.pt cannot be read: ", done.errors[0])
    assert json.loads((trained / "run.json").read_text()) == record
    assert ctxlab("generate", "last", "x", "decoding.max_new_tokens=2").code == 0


def test_a_damaged_record_does_not_hide_the_others(trained: Path) -> None:
    shutil.copytree(trained, "runs/other-aaaa")
    Path("runs/other-aaaa/run.json").write_text("{}")
    done = ctxlab("runs")
    assert (done.code, [line.split()[0] for line in done.out.splitlines()]) == (0, ["run", trained.name])


def test_parts_of_a_sweep_that_do_not_go_together_skip_their_cell(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_here(pool: Pool, runs: Sequence[Run]) -> None:
        for run in runs:
            assert ctxlab("_run", str(run.path)).code == 0

    monkeypatch.setattr(Pool, "execute", run_here)
    done = ctxlab(*TRAIN, "-m", "model.head_dim=33,32")
    assert done.code == 0, done.err
    assert re.search(r"model.head_dim: rope rotates pairs and needs an even number, got 33", done.err)
    cells = {run.record.sweep.cell: run.record for run in RunStore(Path("runs")).runs() if run.record.sweep is not None}
    assert [cells[number].status for number in (0, 1)] == ["skipped", "done"]
    assert re.match(r"model.head_dim: rope .* got 33", cells[0].reason)


def test_a_disk_that_is_full_from_the_start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path.name for path in Path("runs").iterdir()}
    monkeypatch.setattr("ctxlab.records.run._flush_folder", flush)
    for words in (TRAIN, (*TRAIN, "-m", "seed=1,2")):
        done = ctxlab(*words)
        assert (done.code, len(done.errors)) == (2, 1), done
        assert done.errors[0].endswith("run.json cannot be written: No space left on device")
    left = {path.name for path in Path("runs").iterdir()} - {"sweeps"}
    assert left == before
    assert not list(Path("runs").glob("sweeps/*"))


def test_a_disk_that_fills_up_ends_a_run_with_1_and_loses_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second checkpoint finds no room: the first one stays, and the run goes on from it when there is room again."""
    save, saved = checkpoint.save_file, []

    def save_file(tensors: Any, path: Path) -> None:
        saved.append(path)
        if len(saved) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    done = ctxlab(*TRAIN, "trainer.checkpoint_every=1", "trainer.validate_every=none", "name=full")
    assert (done.code, len(done.errors)) == (1, 1), done
    assert re.match(r".*checkpoint of step 2 could not be written to .*No space left on device", done.errors[0])
    run = RunStore(Path("runs")).resolve("full")
    assert (run.record.status, run.has_weights) == ("failed", True)
    assert "No space left" in run.record.reason
    assert [row["step"] for row in run.metrics()] == [1, 2]
    monkeypatch.setattr(checkpoint, "save_file", save)
    assert ctxlab("train", "resume=full", "logger.mode=disabled").code == 0
    assert Run(run.path).record.status == "done"
