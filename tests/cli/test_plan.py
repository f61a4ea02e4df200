"""`ctxlab plan` from its line to its record and its screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctxlab.records.store import RunStore
from tests.cli.lines import ctxlab

SMALL = ("plan", "model=nano", "plan.contexts=[64,128]", "plan.changes=false", "logger.mode=disabled")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CTXLAB_RUNS", raising=False)
    return tmp_path


def test_a_plan_is_a_record_and_a_screen(here: Path) -> None:
    done = ctxlab(*SMALL, "plan.memory=1GiB", "trainer.precision=fp32", "trainer.accelerator=cpu")
    assert done.code == 0, done.err
    (run,) = RunStore(here / "runs").runs()
    assert (run.record.command, run.record.status) == ("plan", "done")
    measured = {(m.name, m.context): m for m in run.measurements() if not {"part", "change"} & m.axes.keys()}
    assert measured["peak_memory_bytes", 64].protocol.startswith("predicted")
    (longest,) = [m for m in run.measurements() if m.name == "longest_context"]
    assert longest.value is not None
    assert longest.value > 1024
    lines = done.out.splitlines()
    assert any(line.split()[:1] == ["128"] and "yes" in line for line in lines)
    assert any(line.startswith("known error on cpu") for line in lines)


def test_a_gpu_that_is_not_here_is_planned_for_where_its_memory_is_given(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = ctxlab(*SMALL, "trainer.accelerator=gpu", "plan.memory=8GiB")
    assert done.code == 0, done.err
    assert "bf16 on cuda" in done.out
    assert "known error on cuda in bf16: unmeasured" in done.out
    refused = ctxlab(*SMALL, "trainer.accelerator=gpu")
    assert (refused.code, refused.errors) == (
        2,
        ["plan.memory: there is no GPU here whose memory auto could take; give it, e.g. 24GiB"],
    )
    assert [run.record.command for run in RunStore(here / "runs").runs()] == ["plan"]


def test_no_context_is_refused(here: Path) -> None:
    refused = ctxlab("plan", "plan.contexts=[]")
    assert (refused.code, refused.errors) == (2, ["plan.contexts: expected at least one context, or auto, got []"])
