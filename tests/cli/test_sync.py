"""`ctxlab sync`: wandb's own upload of real mirrors, to a stand-in for the server on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctxlab.cli.commands.sync import mirrors, upload
from ctxlab.records.run import Run
from ctxlab.records.workspace import CHARTS
from tests.cli.lines import Outcome, ctxlab
from tests.records import leet, wandb_server


def typed(*words: str) -> Outcome:
    """A process of its own: wandb reads its settings once a process."""
    done = subprocess.run(
        [sys.executable, "-m", "ctxlab", "sync", *words], capture_output=True, text=True, timeout=120
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[wandb_server.Server]:
    with wandb_server.running() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        yield server


def test_what_an_offline_run_kept_arrives_once(trained: Path, server: wandb_server.Server) -> None:
    run = Run(trained)
    listed = typed("--dry-run")
    assert (listed.code, listed.out.split(":")[0], server.operations) == (0, run.id, [])
    done = typed()
    assert (done.code, done.out) == (0, f"{run.id}: uploaded\n"), done.err
    logged = [row for row in run.metrics() if row["split"] == "train"]
    assert [(row["tokens"], row["train/loss"]) for row in server.history if "train/loss" in row] == [
        (row["tokens"], row["loss"]) for row in logged
    ]
    assert server.exit_codes == [0]
    assert {bucket["name"] for bucket in server.buckets} == {run.id}
    asked = len(server.operations)
    again = typed()
    assert (again.code, again.out, len(server.operations)) == (0, "", asked)
    assert "nothing to upload" in again.err
    assert typed(run.id, "--again").out == f"{run.id}: uploaded\n"


def test_without_a_key_or_a_server_it_says_so_at_once(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    done = typed()
    assert (done.code, done.errors) == (2, ["sync: uploading needs an API key (WANDB_API_KEY, or `wandb login`)"])
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    done = typed()
    assert done.code == 2
    assert done.errors == [
        "sync: http://127.0.0.1:9 does not answer ([Errno 111] Connection refused); nothing was uploaded"
    ]
    assert list(mirrors(Run(trained), uploaded=False)), "still to be uploaded"


def test_a_key_that_is_refused_fails_the_run_and_the_next_is_tried(trained: Path, server: wandb_server.Server) -> None:
    other = trained.parent / "other-aaaa"
    other.mkdir()
    for name in ("metrics.jsonl", "measurements.jsonl"):
        (other / name).write_bytes((trained / name).read_bytes())
    (other / "run.json").write_text(json.dumps({**json.loads((trained / "run.json").read_text()), "id": "other-aaaa"}))
    (mirror,) = mirrors(Run(trained), uploaded=False)
    (other / "wandb").mkdir()
    os.symlink(mirror, other / "wandb" / mirror.name)
    server.known_key = False
    done = typed()
    assert done.code == 1
    assert sorted(line.split(":")[0] for line in done.out.splitlines()) == sorted([trained.name, "other-aaaa"])
    assert "uploaded" not in done.out


def test_a_server_that_falls_silent_is_left_after_the_time(trained: Path, server: wandb_server.Server) -> None:
    server.silent.set()
    (mirror,) = mirrors(Run(trained), uploaded=False)
    started = time.monotonic()
    problem = upload(mirror, 4.0)
    assert problem is not None
    assert problem.startswith("not uploaded within 4 s")
    assert time.monotonic() - started < 30
    assert [mirror] == list(mirrors(Run(trained), uploaded=False))
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(mirror).encode() in _read(p)], "nothing is left"


def test_a_workspace_and_a_report_draw_what_runs_log_against_their_axes(
    trained: Path, server: wandb_server.Server
) -> None:
    pytest.importorskip("wandb_workspaces")
    done = typed("--workspace", "me/lab")
    assert (done.code, len(done.out.splitlines())) == (0, 2), done.err
    assert [(view["type"], view["entityName"], view["projectName"]) for view in server.views] == [
        ("project-view", "me", "lab"), ("runs", "me", "lab")
    ]  # fmt: skip
    defined = leet.axes(leet.inspect(trained))
    for view in server.views:
        plots = list(line_plots(json.loads(view["spec"])))
        assert len(plots) == len(CHARTS)
        drawn = {metric: plot["xAxis"] for plot in plots for metric in plot["metrics"]}
        assert drawn == {chart.metric: chart.axis for chart in CHARTS}
        logged = drawn.keys() & defined.keys()
        assert {metric: drawn[metric] for metric in logged} == {metric: defined[metric] for metric in logged}
        assert {"eval/perplexity", "train/loss", "val/nats_per_token"} <= logged


def line_plots(spec: Any) -> Iterator[dict[str, Any]]:
    """The settings of every line plot, however deep."""
    if isinstance(spec, dict):
        if spec.get("viewType") == "Run History Line Plot":
            yield spec["config"]
        spec = list(spec.values())
    if isinstance(spec, list):
        for each in spec:
            yield from line_plots(each)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--timeout", "soon"], "ctxlab sync: --timeout: 'soon' is not a number with a unit"),
        (["--workspace", "lab"], "sync: --workspace: expected ENTITY/PROJECT, got 'lab'"),
        (["nobody"], "run: there is no run"),
    ],
)
def test_a_line_that_cannot_be_is_refused(trained: Path, words: list[str], message: str) -> None:
    done = ctxlab("sync", *words)
    assert done.code == 2
    assert done.errors[0].startswith(message)
