"""One thread a test process, said before torch is imported: tests run side by side, and spinning threads would fight."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest


@pytest.fixture
def native_kernel(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, worker_id: str
) -> Callable[[], str]:
    """The native kernel, built once for all test processes; skips where it cannot be. Gives what has run since."""
    from ctxlab.model.attention import native

    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("CTXLAB_CACHE", str((base if worker_id == "master" else base.parent) / "native"))
    if not native.is_built():
        reason = native.why_not()
        if reason is not None:
            pytest.skip(f"no native kernel: {reason}")
        native.library()
    native.forget()
    return native.ran
