"""The mirror, read back with wandb's own reader; online against a server on the loopback that keeps what arrives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ctxlab.errors import ConfigError
from ctxlab.records.run import Run
from ctxlab.records.sinks import LoggerConfig, NullSink, RunSink, open_mirror, resolve_mode
from tests.records import leet, wandb_server
from tests.records.builders import costs, make_run, missing, result, scores

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from ctxlab.errors import ConfigError
from ctxlab.records.sinks import LoggerConfig, RunSink, open_mirror
from tests.records.builders import costs, make_run, scores
run = make_run(Path(sys.argv[1]))
def opened(mode):
    def warn(text): print("warned:", text)
    return RunSink(run, open_mirror(run, LoggerConfig(mode=mode), job_type="train", warn=warn))
def row(step):
    return {"split": "train", "step": step, "tokens": 100 * step, "seconds": 0.1, "attempt": 1, "loss": 5.0 - step}
"""


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No W&B settings, keys or folders but this test's."""
    for name in list(os.environ):
        if name.startswith("WANDB") or name == "NETRC":
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)


def train_row(step: int) -> dict[str, Any]:
    return {
        "split": "train", "step": step, "tokens": 4096 * step, "seconds": 0.5 * step, "attempt": 1,
        "loss": 5.0 - step / 10, "learning_rate": 1e-3,
    }  # fmt: skip


def child(code: str, runs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + code, str(runs)],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def the_run(runs: Path) -> Run:
    (path,) = (p for p in runs.iterdir() if not p.name.startswith("."))
    return Run(path)


def test_a_run_is_mirrored_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", tags=["long"], note="why", sweep={"id": "sweep-aaaa", "cell": 1})
    sink = RunSink(run, open_mirror(run, LoggerConfig(), group="sweep-aaaa", job_type="train"))
    for step in (1, 2, 3):
        sink.metrics(train_row(step))
    sink.metrics({"split": "validation", "step": 3, "tokens": 12288, "seconds": 1.6, "attempt": 1, "loss": 4.8})
    sink.measure([*scores(256, 3.5), *scores(512, 3.6), *missing(1024, "no_document", "no test document is that long")])
    sink.measure([*costs(256, 2**20, 0.25), *costs(1024, 2**22, 1.0)])
    figure = tmp_path / "figure.png"
    Image.new("RGB", (4, 3)).save(figure)
    sink.image("loss_by_length", figure)
    sink.finish(3)
    run.finish("failed")

    records = leet.inspect(run.path)
    (head,) = records["run"]
    assert (head["run_id"], head["run_group"], head["job_type"]) == (run.id, "sweep-aaaa", "train")
    assert (head["tags"], head["notes"], head["project"]) == (["long"], "why", "ctxlab")
    config = {name: value for name, value in head["config"]["update"].items() if not name.startswith("_")}
    kept = ("seed", "context", "model", "position", "trainer")
    assert config == {name: run.record.config[name] for name in kept}
    assert [one["exit_code"] for one in records["exit"]] == [3]  # beside it, of a run of seconds, its runtime

    drawn = leet.axes(records)
    assert {name: axis for name, axis in drawn.items() if axis == "tokens"}.keys() == {
        "train/loss", "train/learning_rate", "val/loss",
    }  # fmt: skip
    assert {name: axis for name, axis in drawn.items() if axis == "context"}.keys() == {
        "eval/nats_per_token", "eval/perplexity", "eval/bits_per_byte",
        "scaling/peak_memory_bytes", "scaling/step_seconds", "scaling/tokens_per_second",
    }  # fmt: skip

    rows = leet.history(records)
    assert [(r["tokens"], r["train/loss"]) for r in rows if "train/loss" in r] == [
        (4096, 4.9), (8192, 4.8), (12288, 4.7),
    ]  # fmt: skip
    assert [(r["tokens"], r["val/loss"]) for r in rows if "val/loss" in r] == [(12288, 4.8)]
    assert [(r["context"], r["eval/nats_per_token"]) for r in rows if "eval/nats_per_token" in r] == [
        (256, 3.5), (512, 3.6),
    ]  # fmt: skip
    assert [(r["context"], r["scaling/peak_memory_bytes"]) for r in rows if "scaling/peak_memory_bytes" in r] == [
        (256, 2**20), (1024, 2**22),
    ]  # fmt: skip
    assert not any("eval/loss" in r or "context" in r for r in rows if "tokens" in r)

    (table,) = (run.path / "wandb").glob("offline-run-*/files/media/table/lengths_*.table.json")
    lengths = json.loads(table.read_text())
    assert lengths["columns"][0] == "context"
    by_context = {row[0]: dict(zip(lengths["columns"], row, strict=True)) for row in lengths["data"]}
    assert by_context[256]["eval/nats_per_token"] == 3.5
    assert by_context[256]["status"] == "done"
    assert by_context[1024]["eval/nats_per_token"] is None
    assert by_context[1024]["scaling/peak_memory_bytes"] == 2**22
    assert by_context[1024]["status"] == "no_document: no test document is that long"
    (image,) = (run.path / "wandb").glob("offline-run-*/files/media/images/loss_by_length*.png")
    assert image.read_bytes() == figure.read_bytes()

    summary: dict[str, Any] = {}
    for one in records["summary"]:
        summary |= one["update"]
    assert summary["eval/nats_per_token"] == 3.5  # at the trained context, not at the last one logged
    assert not list((tmp_path / "home").rglob("*wandb*"))  # staged files too stay in the run's folder


def test_the_environment_is_as_before(tmp_path: Path) -> None:
    before = dict(os.environ)
    run = make_run(tmp_path / "runs")
    open_mirror(run, LoggerConfig(), job_type="train").finish(0)
    run.finish("done")
    assert dict(os.environ) == before


def test_two_runs_in_one_process_are_two_wandb_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "runs") for _ in range(2)]
    for step, run in enumerate(runs, start=1):
        sink = open_mirror(run, LoggerConfig(), job_type="train")
        sink.metrics(train_row(step))
        sink.finish(0)
        run.finish("done")
    for step, run in enumerate(runs, start=1):
        records = leet.inspect(run.path)
        assert records["run"][0]["run_id"] == run.id
        assert [row["tokens"] for row in leet.history(records)] == [4096 * step]


def test_several_runs_measured_in_one_record_keep_their_own_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    sink = open_mirror(run, LoggerConfig(), job_type="eval")
    sink.measure([result("nats_per_token", value, 256, axes={"run": who}) for who, value in (("a", 3.0), ("b", 4.0))])
    sink.finish(0)
    run.finish("done")
    rows = leet.history(leet.inspect(run.path))
    assert [row["eval/a/nats_per_token"] for row in rows if "eval/a/nats_per_token" in row] == [3.0]
    assert [row["eval/b/nats_per_token"] for row in rows if "eval/b/nats_per_token" in row] == [4.0]


def test_baselines_and_overlapping_windows_of_several_runs_are_lines_of_the_summary(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    sink = open_mirror(run, LoggerConfig(), job_type="eval")
    for who, value in (("a", 3.0), ("b", 4.0)):
        sink.measure([
            result("nats_per_token", value, None, axes={"run": who, "baseline": "ngram"}),
            result("nats_per_token", value + 1, 256, axes={"run": who, "stride": 64}),
        ])  # fmt: skip
    sink.finish(0)
    run.finish("done")
    records = leet.inspect(run.path)
    summary = {name: value for one in records["summary"] for name, value in one["update"].items()}
    assert {name: value for name, value in summary.items() if "nats" in name} == {
        "baseline/ngram/a/nats_per_token": 3.0, "baseline/ngram/b/nats_per_token": 4.0,
        "sliding/256/64/a/nats_per_token": 4.0, "sliding/256/64/b/nats_per_token": 5.0,
    }  # fmt: skip
    assert "history" not in records  # no points of a curve


def test_every_way_of_scoring_has_a_name_and_loss_by_position_a_curve(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    sink = open_mirror(run, LoggerConfig(), job_type="eval")
    ways = ({"sinks": 4}, {"sinks": 4, "bos": True}, {"stride": 64, "bos": True}, {"bos": True})
    sink.measure([result("nats_per_token", 3.0 + n, 256, axes=way) for n, way in enumerate(ways)])
    sink.measure([
        *(result("nats_per_token", 5.0 - to, None, axes={"length": 2, "from": to, "to": to}) for to in (1, 2)),
        result("effective_context", 256.0, None, axes={"stride": 64}),
        result("relative_effective_context", 512.0, None, axes={"run": "a", "top": 0.5}),
    ])  # fmt: skip
    sink.finish(0)
    run.finish("done")
    records = leet.inspect(run.path)
    summary = {name: value for one in records["summary"] for name, value in one["update"].items()}
    assert {name: value for name, value in summary.items() if "nats" in name or "context" in name} == {
        "streaming/256/4/nats_per_token": 3.0, "streaming/256/4/bos/nats_per_token": 4.0,
        "sliding/256/64/bos/nats_per_token": 5.0, "eval/256/bos/nats_per_token": 6.0,
        "eval/effective_context": 256.0, "eval/0.5/a/relative_effective_context": 512.0,
    }  # fmt: skip
    rows = leet.history(records)
    assert [(row["index"], row["position/nats_per_token"]) for row in rows] == [(1, 4.0), (2, 3.0)]
    assert leet.axes(records)["position/nats_per_token"] == "index"


def test_the_tasks_of_a_harness_are_lines_of_the_summary(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    sink = open_mirror(run, LoggerConfig(), job_type="eval")
    axes = {"harness": "gsm8k", "metric": "exact_match"}
    sink.measure([
        result("accuracy", 0.25, None, axes={**axes, "filter": "none"}),
        result("accuracy", 0.5, None, axes={**axes, "filter": "strict-match", "run": "a"}),
        result("score", None, None, axes={"harness": "piqa"}, status="failed", reason="why"),
    ])  # fmt: skip
    sink.finish(0)
    run.finish("done")
    summary = {name: value for one in leet.inspect(run.path)["summary"] for name, value in one["update"].items()}
    assert {name: value for name, value in summary.items() if name.startswith("lm_eval")} == {
        "lm_eval/gsm8k/exact_match": 0.25, "lm_eval/gsm8k/a/exact_match/strict-match": 0.5,
    }  # fmt: skip


def test_what_a_killed_process_logged_is_there(tmp_path: Path) -> None:
    code = """
sink = opened("offline")
for step in range(1, 41):
    sink.metrics(row(step)); time.sleep(0.05)
time.sleep(1.2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert child(code, tmp_path / "runs").returncode == -9
    run = the_run(tmp_path / "runs")
    assert [row["train/loss"] for row in leet.history(leet.inspect(run.path))] == [5.0 - step for step in range(1, 41)]
    assert [row["loss"] for row in run.metrics()] == [5.0 - step for step in range(1, 41)]


def test_offline_looks_nothing_up_in_a_network(tmp_path: Path) -> None:
    """Of Python's own doing; the helper process that wandb starts was seen to open unix sockets only."""
    code = """
seen = []
def watch(event, arguments):
    if event == "socket.getaddrinfo":
        seen.append(arguments[0])
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        seen.append(arguments[1])
sys.addaudithook(watch)
import atexit
atexit.register(lambda: print("seen:", seen, flush=True))  # registered first, so called last
sink = opened("offline")
sink.metrics(row(1)); sink.finish(0); run.finish("done")
"""
    done = child(code, tmp_path / "runs")
    assert (done.returncode, done.stdout) == (0, "seen: []\n"), done.stderr
    # A user who wants wandb to report on itself gets that, and the watcher does see it.
    asked = child(code, tmp_path / "more", WANDB_ERROR_REPORTING="true", WANDB_BASE_URL="http://127.0.0.1:9")
    assert "127.0.0.1" in asked.stdout, asked.stderr


def test_a_mirror_that_breaks_is_said_once_and_the_record_goes_on(tmp_path: Path) -> None:
    code = """
sink = opened("offline")
sink.metrics(row(1))
for entry in Path("/proc").glob("[0-9]*"):
    try:
        name = (entry / "cmdline").read_bytes()
        parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        continue
    if parent == os.getpid() and b"wandb-core" in name:
        os.kill(int(entry.name), signal.SIGKILL)
time.sleep(0.3)
for step in range(2, 30):
    sink.metrics(row(step)); time.sleep(0.01)
sink.measure(scores(256, 3.0)); sink.finish(0); run.finish("done")
"""
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc to find the helper process")
    done = child(code, tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warned: W&B stopped mirroring") == 1
    run = the_run(tmp_path / "runs")
    assert run.record.status == "done"
    assert [row["step"] for row in run.metrics()] == list(range(1, 30))
    assert len(run.measurements()) == 3


def test_a_mirror_that_cannot_start_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def fail(**_: Any) -> None:
        raise wandb.Error("no helper\nfor this machine")

    monkeypatch.setattr(wandb, "init", fail)
    before, said = dict(os.environ), []
    sink = open_mirror(make_run(tmp_path, status="waiting"), LoggerConfig(), job_type="train", warn=said.append)
    assert isinstance(sink, NullSink)
    assert said == ["W&B cannot start (Error: no helper); the run goes on without a mirror"]
    assert dict(os.environ) == before


class TestModes:
    @pytest.mark.parametrize(
        ("line", "environment", "mode"),
        [
            ("auto", None, "offline"), ("auto", "online", "online"), ("auto", "disabled", "disabled"),
            ("auto", "dryrun", "offline"), ("auto", "", "offline"), ("offline", "online", "offline"),
            ("disabled", "online", "disabled"),
        ],
    )  # fmt: skip
    def test_the_line_wins_over_the_environment(
        self, line: str, environment: str | None, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if environment is not None:
            monkeypatch.setenv("WANDB_MODE", environment)
        assert resolve_mode(LoggerConfig(mode=line)) == mode  # type: ignore[arg-type]

    def test_a_misspelt_mode_names_the_nearest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_MODE", "ofline")
        with pytest.raises(ConfigError, match=r"^WANDB_MODE: there is no mode 'ofline'; did you mean 'offline'"):
            resolve_mode(LoggerConfig())

    def test_disabled_writes_nothing(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "runs", status="waiting")
        sink = open_mirror(run, LoggerConfig(mode="disabled"), job_type="train")
        assert isinstance(sink, NullSink)
        assert not (run.path / "wandb").exists()

    @pytest.mark.parametrize(
        ("settings", "project", "entity"),
        [
            ({}, "theirs", "team"),
            ({"project": "mine", "entity": "me"}, "mine", "me"),
            ({"entity": "none"}, "theirs", None),
        ],
    )
    def test_project_and_entity(
        self,
        settings: dict[str, str],
        project: str,
        entity: str | None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("WANDB_PROJECT", "theirs")
        monkeypatch.setenv("WANDB_ENTITY", "team")
        given: dict[str, Any] = {}
        monkeypatch.setattr("ctxlab.records.sinks.WandbSink", lambda run, **how: given.update(how))
        open_mirror(make_run(tmp_path, status="waiting"), LoggerConfig(**settings), job_type="train")  # type: ignore[arg-type]
        assert (given["project"], given["entity"], given["mode"]) == (project, entity, "offline")


class TestOnline:
    """Against a stub on the loopback: no real server was asked."""

    KEY = "a" * 40

    def test_without_a_key_it_is_refused_at_once(self, tmp_path: Path) -> None:
        code = "\ntry:\n    opened('online')\nexcept ConfigError as error:\n    print(error)"
        started = time.monotonic()
        done = child(code, tmp_path / "runs")
        assert done.stdout == (
            "logger.mode: online needs an API key (WANDB_API_KEY, or `wandb login`); use logger.mode=offline\n"
        )
        assert time.monotonic() - started < 20

    def test_rows_tables_and_the_exit_code_arrive(self, tmp_path: Path) -> None:
        code = """
sink = opened("online")
for step in range(1, 6):
    sink.metrics(row(step))
sink.measure(scores(256, 3.5)); sink.finish(3); run.finish("failed")
"""
        with wandb_server.running() as server:
            done = child(code, tmp_path / "runs", WANDB_API_KEY=self.KEY, WANDB_BASE_URL=server.url)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        run = the_run(tmp_path / "runs")
        assert {bucket["name"] for bucket in server.buckets} == {run.id}
        assert [(r["tokens"], r["train/loss"]) for r in server.history if "train/loss" in r] == [
            (100 * step, 5.0 - step) for step in range(1, 6)
        ]
        assert [r["eval/nats_per_token"] for r in server.history if "eval/nats_per_token" in r] == [3.5]
        assert any(name.startswith("media/table/lengths_") for name in server.uploads)
        assert server.exit_codes == [3]

    def test_a_key_that_is_refused_is_a_refusal(self, tmp_path: Path) -> None:
        code = "\ntry:\n    opened('online')\nexcept ConfigError as error:\n    print(error)"
        with wandb_server.running() as server:
            server.known_key = False
            done = child(code, tmp_path / "runs", WANDB_API_KEY=self.KEY, WANDB_BASE_URL=server.url)
        assert done.stdout.startswith("logger.mode: W&B refused the run (")
        assert done.stdout.endswith("use logger.mode=offline\n")
        assert "user is not logged in" in done.stdout

    def test_a_server_that_is_not_there_is_a_warning_and_an_offline_mirror(self, tmp_path: Path) -> None:
        code = "\nsink = opened('online'); sink.metrics(row(1)); sink.finish(0); run.finish('done')"
        done = child(
            code, tmp_path / "runs",
            WANDB_API_KEY=self.KEY, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="2",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("warned: W&B cannot be reached (")
        run = the_run(tmp_path / "runs")
        assert f"ctxlab sync {run.id}" in done.stdout
        assert [row["train/loss"] for row in leet.history(leet.inspect(run.path))] == [4.0]
