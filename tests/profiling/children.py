"""Points measured each in a process of its own that need not import torch again: it is forked from one that has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from ctxlab.profiling.measure import EXACT_ALLOCATOR, Point, plugin_files

_CODE = """
import io, os, sys
from ctxlab.profiling import point

start_peak, idle = point.start_peak, set()

def begun(device):
    idle.update(sys.modules)
    return start_peak(device)

def measured(spec, say):
    result = point.measure(spec, say)
    return {**result, "imported": sorted(set(sys.modules) - idle)}

point.start_peak = begun
for line in sys.stdin:
    if os.fork() == 0:
        sys.stdin = io.StringIO(line)
        os._exit(point.serve(measured))
    os.wait()
"""


class Parent:
    """Answers as `run_point` does, one point after the other, under the allocator whose peaks are exact, on one thread.

    Bytes of tensors are those of a process that was started afresh. Code of torch that the parent has read and the child
    reads again is some MiB more over its idle process: good for differences between points, not for what one takes in all.
    """

    def __init__(self) -> None:
        environment = {**os.environ, **EXACT_ALLOCATOR, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answers: dict[str, dict[str, Any]] = {}

    def __call__(self, point: Point, what: str = "memory", timeout: float = 0.0) -> dict[str, Any]:
        """The answer of a point, which is measured once for all that ask, with what it `imported` behind the idle process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = json.dumps({**point.__dict__, "what": what, "plugins": plugin_files(point)})
        if asked not in self._answers:
            self._process.stdin.write(asked + "\n")
            self._process.stdin.flush()
            self._answers[asked] = json.loads(self._process.stdout.readline())
        return dict(self._answers[asked])

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()
