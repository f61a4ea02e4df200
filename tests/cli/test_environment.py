"""Threads: what the container grants, never over the user's own setting, and before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ctxlab import cores
from ctxlab.cache import default_cache
from ctxlab.cli import environment
from tests.cli.lines import ctxlab


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Eight cores by affinity; files for a quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "_CGROUP_V2", tmp_path / "cpu.max")
    monkeypatch.setattr(cores, "_CGROUP_V1", (tmp_path / "quota", tmp_path / "period"))
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", *environment._CUDA_ALLOCATOR):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("250000 100000", 3),
        ("50000 100000", 1),
        ("1600000 100000", 8),
        ("nonsense", 8),
    ],
)
def test_quota_of_cgroup_v2(machine: Path, limit: str, expected: int) -> None:
    (machine / "cpu.max").write_text(limit)
    assert cores.available_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("400000", 4)])
def test_quota_of_cgroup_v1(machine: Path, quota: str, expected: int) -> None:
    (machine / "quota").write_text(quota)
    (machine / "period").write_text("100000")
    assert cores.available_cores() == expected


def test_without_a_quota(machine: Path) -> None:
    assert cores.available_cores() == 8


def test_cores_are_shared_among_jobs(machine: Path) -> None:
    environment.set_process_defaults(share=3)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("2", "passive")


def test_more_jobs_than_cores_still_have_a_thread_each(machine: Path) -> None:
    environment.set_process_defaults(share=20)
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_the_users_own_settings_stay(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    environment.set_process_defaults()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("5", "active")


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_a_gpus_memory_is_given_out_in_segments_that_grow_unless_the_user_says_how(
    machine: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(environment.sys, "platform", "darwin")
    environment.set_process_defaults()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.setattr(environment.sys, "platform", "linux")
    environment.set_process_defaults()
    assert os.environ.pop("PYTORCH_CUDA_ALLOC_CONF") == "expandable_segments:True"
    monkeypatch.setenv(name, "backend:native")
    environment.set_process_defaults()
    assert {n: os.environ[n] for n in os.environ if n.endswith("ALLOC_CONF")} == {name: "backend:native"}


# The cache


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The cache folder that everybody falls back on inside of a command, as `profile` or `show` sees it."""
    seen: list[Path] = []

    def body(*_: object) -> int:
        seen.append(default_cache())
        return 0

    monkeypatch.setattr("ctxlab.cli.commands.profile.run", body)
    monkeypatch.setattr("ctxlab.cli.commands.show.run", body)
    monkeypatch.setenv("CTXLAB_CACHE", str(tmp_path / "usual"))
    monkeypatch.delenv("CTXLAB_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.mark.parametrize("command", ["profile", "show"])
def test_the_cache_of_a_line_is_that_of_everything_in_its_process(
    caches: list[Path], tmp_path: Path, command: str
) -> None:
    assert ctxlab(command, "paths.cache=mine").code == 0
    assert ctxlab(command).code == 0
    assert caches == [tmp_path / "mine", tmp_path / "usual"]


def test_a_cell_of_a_sweep_takes_the_cache_of_its_record(caches: list[Path], tmp_path: Path) -> None:
    assert ctxlab("profile", "paths.cache=~/mine").code == 0
    (record,) = (tmp_path / "runs").glob("*/run.json")
    record.write_text(record.read_text().replace('"done"', '"interrupted"'))
    assert ctxlab("_run", str(record.parent)).code == 0
    assert caches == [Path("~/mine").expanduser()] * 2
