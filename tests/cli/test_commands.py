"""The commands from their line to their end, on the smallest model: what they print, and what they leave on disk."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctxlab.cli.commands import profile
from ctxlab.cli.commands.list import KINDS
from ctxlab.config import catalog
from ctxlab.data.tokenizers.base import load_tokenizer
from ctxlab.model.attention import native
from ctxlab.model.beam import beam_search
from ctxlab.model.generation import DecodingConfig
from ctxlab.profiling import measure
from ctxlab.profiling import point as points
from ctxlab.profiling.measure import Point
from ctxlab.records.run import Run
from ctxlab.records.schema import SCHEMA
from ctxlab.records.store import RunStore
from ctxlab.train import checkpoint
from tests.cli.lines import SMALL, ctxlab, write_text
from tests.records import leet

LENGTHS = (32, 64, 128, 256, 512)  # 1/2, 1, 2, 4 and 8 times the context of the small training
QUIET = (*SMALL, "logger.mode=disabled")


def the_new_run(before: set[str]) -> Run:
    (run,) = (run for run in RunStore(Path("runs")).runs() if run.id not in before)
    return run


def ids() -> set[str]:
    return {run.id for run in RunStore(Path("runs")).runs()}


# train


def test_the_record_of_a_training_is_whole(trained: Path) -> None:
    run = Run(trained)
    record = run.record
    assert (record.id, record.name) == (trained.name, "nano-rope-64")
    assert trained.name[:-4] == "nano-rope-64-"
    assert (record.schema_number, record.command, record.status, record.reason) == (SCHEMA, "train", "done", "")
    assert record.started < record.finished  # type: ignore[operator]
    assert (record.attempt, record.parent, record.sweep, record.experiment, record.process) == (1, None, None, None, {})
    assert record.wall_seconds is not None
    assert record.wall_seconds > 0
    assert set(shlex.split(record.line)) == {"ctxlab", "train", *SMALL}
    assert record.config["model"]["head_dim"] == 32, "derived numbers are in the config"
    assert record.parameters["all"] - record.parameters["without_embeddings"] == 260 * 128
    where = record.provenance
    assert (where.seed, where.device, where.threads) == (1, "cpu", 1)
    assert where.precision in ("fp32", "bf16")
    assert {"torch", "lightning", "wandb"} <= set(where.libraries)
    assert where.hardware["memory_bytes"] > 0
    assert where.data["splits"]["test"]["documents"] >= 8
    assert len(where.data["text_sha256"]) == len(where.data["tokenizer"]["sha256"]) == 64
    assert where.resolved["n_steps"] == 3
    for what, path in record.artifacts.items():
        assert (trained / path).exists(), what

    rows = run.metrics()
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3]
    assert all(row["attempt"] == 1 and row["tokens"] == 4096 * row["step"] for row in rows)
    measured = {(m.name, m.context): m for m in run.measurements()}
    assert {context for name, context in measured if name == "perplexity"} == {*LENGTHS, None}
    assert {sums.context for sums in run.documents()} == set(LENGTHS)
    assert len({m.n_targets for m in measured.values() if m.name == "perplexity"}) == 1
    assert load_tokenizer(trained / "tokenizer").vocab_size == 260
    last = checkpoint.find_checkpoint(run.checkpoints)
    assert (last.step, last.tokens) == (3, 3 * 4096)
    assert (trained / "log.txt").is_file()
    assert (trained / "loss_by_length.png").stat().st_size > 1000


def test_the_mirror_of_a_training_is_read_back(trained: Path) -> None:
    records = leet.inspect(trained)
    (head,) = records["run"]
    assert (head["run_id"], head["job_type"], head["project"]) == (trained.name, "train", "ctxlab")
    assert records["exit"][0].get("exit_code", 0) == 0
    rows = leet.history(records)
    trained_rows = [row for row in rows if "train/loss" in row]
    assert [row["train/loss"] for row in trained_rows] == [
        row["loss"] for row in Run(trained).metrics() if row["split"] == "train"
    ]
    by_context = {row["context"]: row["eval/perplexity"] for row in rows if "eval/perplexity" in row}
    measured = {m.context: m.value for m in Run(trained).measurements() if m.name == "perplexity"}
    counted = measured.pop(None)  # by n-grams, which have no context
    assert by_context == measured
    summary = {name: value for one in records["summary"] for name, value in one["update"].items()}
    assert summary["baseline/ngram/perplexity"] == counted
    axes = leet.axes(records)
    assert (axes["train/loss"], axes["eval/perplexity"]) == ("tokens", "context")


def test_the_end_of_a_training_says_what_to_type_next(place: Path) -> None:
    done = ctxlab("train", *QUIET, "name=Über alles")
    run = the_new_run({path.parent.name for path in place.glob("runs/nano*/run.json")})
    assert done.code == 0
    assert f'ctxlab generate {run.id} "To be, or not to be"' in done.out
    assert f"run {run.id} in {run.path}" in done.out
    assert "\x1b" not in done.out + done.err
    assert (run.record.name, run.record.config["name"]) == ("Über alles", "Über alles")


def test_the_recorded_line_trains_the_same_again(trained: Path) -> None:
    before = ids()
    _, *words = shlex.split(Run(trained).record.line)
    assert ctxlab(*words, "logger.mode=disabled").code == 0
    again = the_new_run(before)
    first, second = ([{**row, "seconds": 0} for row in run.metrics()] for run in (Run(trained), again))
    timings = ("tokens_per_second", "step_seconds", "flops_per_second", "peak_memory_bytes")
    for row in (*first, *second):
        for name in timings:
            row.pop(name, None)
    assert first == second
    assert [m.value for m in again.measurements()] == [m.value for m in Run(trained).measurements()]


def test_free_text_is_recorded_as_it_was_typed(place: Path) -> None:
    """Quotes, commas, accents, `=`, `#`, `~`, `${5}`: in the record, in its config, and again by its line."""
    file = Path("mes pièces") / "il dit: «a=b, c» #1 ~ ${5}.txt"
    file.parent.mkdir()
    write_text(file)
    note = 'it\'s, a=b ${5} # ~x "q"'
    before = ids()
    assert ctxlab("train", *QUIET, f"note={note}", f"data.path={file}").code == 0
    run = the_new_run(before)
    assert (run.record.note, run.record.config["note"], run.record.config["data"]["path"]) == (note, note, str(file))
    assert run.record.provenance.data["path"] == str(file)
    _, *words = shlex.split(run.record.line)
    before = ids()
    assert ctxlab(*words).code == 0
    again = the_new_run(before)
    assert (again.record.config, again.record.note) == (run.record.config, note)


def test_a_run_that_fails_says_so_everywhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    before = ids()
    done = ctxlab("train", *SMALL)
    run = the_new_run(before)
    assert (done.code, run.record.status) == (1, "failed")
    assert run.record.reason.startswith("ZeroDivisionError: division by zero (traceback in ")
    assert done.errors == [run.record.reason]
    assert "Traceback (most recent call last)" in (run.path / "log.txt").read_text()
    assert [one["exit_code"] for one in leet.inspect(run.path)["exit"]] == [1]


# eval, generate, profile


def test_eval_of_one_run_and_of_two_side_by_side(trained: Path) -> None:
    before = ids()
    done = ctxlab("eval", "last", "eval.perplexity.lengths=[32,100]", "logger.mode=disabled")
    assert (done.code, done.out.splitlines()[0]) == (0, f"{trained.name}, evaluated again")
    one = the_new_run(before)
    assert (one.record.parent, one.record.command, one.record.status) == (trained.name, "eval", "done")
    assert f"run={trained.name}" in shlex.split(one.record.line)
    assert {m.context for m in one.measurements()} == {32, 100, None}
    assert "nats/token by tokens seen in the window" in done.out.splitlines()

    shutil.copytree(trained, "runs/other-aaaa")
    record = json.loads(Path("runs/other-aaaa/run.json").read_text())
    Path("runs/other-aaaa/run.json").write_text(json.dumps({**record, "id": "other-aaaa"}))
    before = ids()
    done = ctxlab(
        "eval", "run=[nano,other]", "checkpoint=best", "logger.mode=disabled", "eval.perplexity.max_tokens=256",
        "eval.perplexity.lengths=[32,64]",
        "eval.perplexity.strides=[16]", "eval.perplexity.streaming=[32]", "eval.perplexity.bos=true", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    both = the_new_run(before)
    (said,) = json.loads(done.out)
    assert said["id"] == both.id
    assert said["measurements"] == [m.model_dump(mode="json") for m in both.measurements()]
    less = [m.facts for m in both.measurements() if m.name == "nats_per_token" and m.axes["run"] == "other-aaaa"]
    compared = [facts for facts in less if "less" in facts]
    assert len(less) - len(compared) == 1, "all but what counting reaches"
    assert {(facts["compared_with"], facts["less"], facts["less_low"]) for facts in compared} == {
        (trained.name, 0.0, 0.0)
    }
    assert {m.protocol for m in both.measurements() if m.name == "perplexity"} == {
        *(f"{way}{bos}" for way in ("non-overlapping", "sliding", "streaming") for bos in ("", ", bos first")),
        "modified Kneser-Ney, order 5",
    }
    assert {m.axes["top"] for m in both.measurements() if m.name == "relative_effective_context"} == {0.1, 0.5, 1.0}
    assert both.record.config["run"] == [trained.name, "other-aaaa"]
    by_run: dict[str, dict[int | None, float | None]] = {}
    for m in both.measurements():
        if m.name == "nats_per_token" and not {"stride", "sinks", "bos", "from"} & m.axes.keys():
            by_run.setdefault(m.axes["run"], {})[m.context] = m.value
    assert by_run[trained.name] == by_run["other-aaaa"]
    assert set(by_run[trained.name]) == {32, 64, None}


def test_generate_prints_the_text_and_nothing_else(place: Path) -> None:
    prompt = "Je ne parle pas français: «it's, a=b ${5} # ~x» [b]\t:smile:\n"
    done = ctxlab("generate", "last", prompt, "decoding.max_new_tokens=4", "decoding.temperature=0")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(prompt)
    Path("start.txt").write_text(prompt, encoding="utf-8")
    for words in (
        ("run=last", f"prompt={prompt}"),
        ("nano", "prompt_file=start.txt"),
        ("checkpoint=best", f"prompt={prompt}"),
    ):
        again = ctxlab("generate", *words, "decoding.max_new_tokens=4", "decoding.temperature=0")
        assert (again.code, again.out) == (0, done.out)
    assert ids() == {path.parent.name for path in place.glob("runs/*/run.json")}, "it makes no record"


def test_generate_goes_on_from_every_line_of_a_file(place: Path) -> None:
    prompts = ["To be", "Je ne parle pas français: «it's, a=b ${5}»", "", "x"]
    Path("prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    settings = (
        "decoding.max_new_tokens=30", "decoding.top_k=20", "decoding.repetition_penalty=1.2",
        "trainer.precision=fp32",  # in bf16 what a product of two rows rounds is not what that of one does
    )  # fmt: skip
    done = ctxlab("generate", "last", "prompts_file=prompts.txt", "batch=2", "seed=5", *settings)
    assert done.code == 0, done.err
    alone = [ctxlab("generate", "last", f"prompt={p}", f"seed={5 + n}", *settings) for n, p in enumerate(prompts)]
    expected = [one.out[len(p) : -1].replace("\n", "\\n") for one, p in zip(alone, prompts, strict=True)]
    assert done.out.split("\n") == [*expected, ""]
    letters = re.search(r"(?<=.)[A-Za-z]+", expected[0])
    assert letters
    stop = letters[0]
    words = (*settings, f"decoding.stop_strings=[{stop}]")
    Path("windows.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8", newline="\r\n")
    cut = ctxlab("generate", "last", "prompts_file=windows.txt", "seed=5", *words)
    assert cut.out.split("\n") == [*(text.partition(stop)[0] for text in expected), ""]
    assert (
        ctxlab("generate", "last", "prompt=To be", "seed=5", *words).out == f"To be{expected[0].partition(stop)[0]}\n"
    )


def test_generate_searches(place: Path) -> None:
    one, greedy, four = (
        ctxlab("generate", "last", "To be", "decoding.max_new_tokens=6", *more).out
        for more in (
            ("decoding.num_beams=1", "decoding.temperature=0"),
            ("decoding.temperature=0",),
            ("decoding.num_beams=4",),
        )
    )
    assert one == greedy
    loaded = checkpoint.load_run("last")
    ids = loaded.tokenizer.encode("To be")
    best = beam_search(
        loaded.model, [ids], DecodingConfig(max_new_tokens=6, num_beams=4), stop_ids=(loaded.tokenizer.eos_id,)
    )[0][0]
    assert four == f"To be{loaded.tokenizer.decode(best.tokens)}\n"


@pytest.fixture
def at_hand(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Points are measured in this process and in torch, the memory of a step in one of its own; returned is what was asked."""
    monkeypatch.setattr(native, "prepare", lambda *_: None)
    asked: list[str] = []
    alone = measure.run_point

    def run_point(point: Point, what: str, timeout: float) -> dict[str, Any]:
        asked.append(what)
        if what == "memory":
            return alone(point, what, timeout)
        spec = {**point.__dict__, "what": what, "plugins": [], "enough_seconds": 0.1}
        return {"status": "done", **points.measure(spec)}

    for place in (measure, profile):
        monkeypatch.setattr(place, "run_point", run_point)
    return asked


def test_profile_measures_a_context(place: Path, at_hand: list[str]) -> None:
    before = ids()
    done = ctxlab("profile", "model=nano", "profile.contexts=[32]", "logger.mode=disabled")
    assert done.code == 0, done.err
    assert at_hand == ["memory", "time", "generation", "matmul"]
    run = the_new_run(before)
    found = {m.name: m.value for m in run.measurements()}
    assert set(found) >= {"peak_memory_bytes", "step_seconds", "tokens_per_second", "decode_seconds_per_token"}
    assert None not in found.values()
    assert (run.record.command, run.record.status, run.record.provenance.device) == ("profile", "done", "cpu")
    assert "32" in done.out
    assert run.record.provenance.resolved["attention_kernel"] == "torch"
    measured = [m for m in run.measurements() if m.protocol in (measure.PROTOCOL, measure.GENERATION)]
    clocked = [m for m in measured if not m.name.startswith("flops")]
    assert [m.facts["attention_kernel"] for m in clocked] == ["torch"] * 6
    assert "attention kernel: torch" in done.out.splitlines()


@pytest.mark.parametrize(
    ("words", "built"),
    [
        (("profile.contexts=[64,512]",), ["auto"]), (("profile.contexts=[64]",), []),
        (("profile.contexts=[64]", "profile.generation=true"), ["auto"]),
        (("profile.contexts=[1k]", "profile.generation=true", "attention.kernel=torch"), []),
        (("profile.contexts=[512]", "model.architecture=encoder", "profile.generation=auto"), ["auto"]),
        (("profile.contexts=[64]", "position=t5"), ["auto"]), (("profile.contexts=[64]", "position=cope_ctx"), []),
        (("profile.contexts=[512]", "position=nope", "attention=linear"), []),
        (("profile.contexts=[64]", "attention.kernel=native"), ["native"]),
        (("profile.contexts=[512]", "model=lstm_nano"), []),
    ],
)  # fmt: skip
def test_profile_builds_the_kernel_before_it_measures_if_a_point_can_use_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], built: list[str]
) -> None:
    done: list[str] = []

    def build(kernel: str, operations: float, say: Any) -> None:
        assert operations >= native.PAYS_FROM
        done.append(kernel)

    def run_point(*_: object) -> dict[str, Any]:
        assert done == built
        return {"status": "failed", "reason": "not today"}

    monkeypatch.setattr(native, "prepare", build)
    monkeypatch.setattr(measure, "run_point", run_point)
    line = (
        "profile",
        "model=nano",
        "profile.generation=false",
        *words,
        "logger.mode=disabled",
        "trainer.precision=fp32",
        "trainer.accelerator=cpu",
    )
    assert ctxlab(*line).code == 1
    assert done == built


def test_what_no_kernel_can_compute_is_refused(place: Path) -> None:
    for command in ("train", "profile", "plan"):
        done = ctxlab(command, "model=nano", "position=cope_ctx", "attention.kernel=native")
        assert (done.code, done.errors) == (
            2, ["attention.kernel: native cannot compute the bias of position=cope_ctx; use auto or torch"],
        )  # fmt: skip


ENCODER = ("profile", "model=nano", "model.architecture=encoder", "profile.contexts=[32]", "logger.mode=disabled")


def test_generation_of_an_encoder_is_left_out_or_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run_point(point: Point, what: str, timeout: float) -> dict[str, Any]:
        asked.append(what)
        return {"status": "failed", "reason": "not today"}

    monkeypatch.setattr(measure, "run_point", run_point)
    done = ctxlab(*ENCODER, "profile.generation=true")
    assert (done.code, done.errors) == (
        2,
        [
            "profile.generation: model.architecture=encoder writes no text, since each of its places sees what follows; "
            "use false or auto"
        ],
    )
    assert asked == []
    before = ids()
    done = ctxlab(*ENCODER)
    assert asked == ["memory", "time"]
    assert {m.name for m in the_new_run(before).measurements()} == {
        "peak_memory_bytes", "step_seconds", "tokens_per_second",
    }  # fmt: skip
    assert done.err.splitlines().count("generation is not measured: encoder writes no text") == 1


# runs, list, doctor, the config


def test_runs_from_a_listing_to_the_trash(trained: Path) -> None:
    shutil.copytree(trained, "runs/other-aaaa")
    record = json.loads(Path("runs/other-aaaa/run.json").read_text())
    record |= {"id": "other-aaaa", "config": {**record["config"], "context": 32}}
    Path("runs/other-aaaa/run.json").write_text(json.dumps(record))
    listed = ctxlab("runs", "context=64", "perplexity<1e9")
    assert [line.split()[0] for line in listed.out.splitlines()] == ["run", trained.name]
    shown = ctxlab("runs", "show", "nano-rope")
    assert record["line"] in shown.out
    assert "nats/token" in shown.out
    assert ["context", "64", "32"] in [
        line.split() for line in ctxlab("runs", "diff", "nano", "other").out.splitlines()
    ]
    assert ctxlab("runs", "tag", "nano", "baseline").code == ctxlab("runs", "note", "nano", "à la carte, #1").code == 0
    assert (Run(trained).record.tags, Run(trained).record.note) == (("baseline",), "à la carte, #1")
    assert ctxlab("runs", "rm", "nano").code == 0
    assert ids() == {"other-aaaa"}


@pytest.mark.parametrize("kind", KINDS)
def test_list_names_every_option(kind: str) -> None:
    done = ctxlab("list", kind)
    assert (done.code, done.err) == (0, "")
    listed = {line.split()[0] for line in done.out.splitlines() if line.strip()}
    assert {option.name for option in catalog.groups()[KINDS[kind]]} <= listed


def test_doctor_looks_where_runs_and_texts_are_kept(place: Path) -> None:
    done = ctxlab("doctor")
    assert (done.code, done.err) == (0, "")
    assert f"{place / 'cache'} (" in done.out
    assert f"{place / 'runs'} (" in done.out
    assert not [line for line in done.out.splitlines() if " no  " in line]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(option.name, marks=[pytest.mark.slow] * (option.name == "context_law"))  # 48 cells are checked
        for option in catalog.groups()["experiment"]
    ],
)
def test_experiments_compose(name: str) -> None:
    done = ctxlab("train", f"experiment={name}", "--cfg", "job")
    configs = list(yaml.safe_load_all(done.out))
    assert done.code == 0
    assert done.err in ("", f"checking {len(configs)} cells\n")  # of many it says so, for it takes a while
    assert all(config["experiment"] == name for config in configs)


def test_cfg_job_prints_the_config_and_runs_nothing(place: Path) -> None:
    before = ids()
    done = ctxlab("train", *SMALL, "note=${5}", "--cfg", "job")
    config = yaml.safe_load(done.out)
    assert (done.code, config["note"], config["context"], config["model"]["name"]) == (0, "${5}", 64, "nano")
    done = ctxlab("train", *SMALL, "--cfg", "job", "-m", "position=rope,alibi", "seed=1,2")
    assert [line for line in done.out.splitlines() if line.startswith("#")] == [
        "# cell 0: position=rope seed=1", "# cell 1: position=rope seed=2",
        "# cell 2: position=alibi seed=1", "# cell 3: position=alibi seed=2",
    ]  # fmt: skip
    configs = list(yaml.safe_load_all(done.out))
    assert [(c["position"]["name"], c["seed"]) for c in configs] == [
        ("rope", 1),
        ("rope", 2),
        ("alibi", 1),
        ("alibi", 2),
    ]
    done = ctxlab("train", "resume=last", "trainer.max_steps=9", "--cfg", "job")
    assert yaml.safe_load(done.out)["trainer"]["max_steps"] == 9
    assert ids() == before
    assert Run(next(iter(place.glob("runs/nano*")))).record.attempt == 1


# A text whose documents are shorter than the longest length


def test_cells_of_different_contexts_score_the_same_tokens(place: Path) -> None:
    """The test documents have some 200 to 400 tokens, the longest length that a cell asks for is 1024."""
    lines = [json.dumps({"text": " ".join(f"{n * k % 97}" for k in range(60 + 2 * n))}) for n in range(60)]
    Path("short.jsonl").write_text("\n".join(lines))
    from ctxlab.config.overrides import split
    from ctxlab.config.prepare import prepare

    words = ("data.path=short.jsonl", "context=32,64,100", "data.packed=true", "eval.perplexity.max_tokens=none")
    few = ("trainer.max_steps=1", "trainer.batch_tokens=100", "trainer.validate_every=none")
    cells = prepare(split("train", ["-m", *QUIET, *words, *few])).cells
    scored = []
    for cell in cells:
        before = ids()
        assert ctxlab(*shlex.split(cell.line)[1:]).code == 0
        run = the_new_run(before)
        assert run.record.config == cell.config
        whole = [sums for sums in run.documents() if "from" not in sums.axes]  # not by position
        scored.append({(sums.names, sums.targets, sums.n_bytes) for sums in whole})
        segments = {m.axes["segment"] for m in run.measurements() if m.value is not None}
        assert len(segments) == 1
        assert 100 < segments.pop() < 800
    assert len(scored[0]) == 1, "every length of a cell scores the same targets"
    assert scored[0] == scored[1] == scored[2], "and every cell those of the others"
