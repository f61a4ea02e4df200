"""What a process and those that it starts are told in the environment: how many threads there are and how they wait, which
has to be decided before torch is imported, and where the cache is.

Spinning OpenMP threads on shared cores cost a factor of three to five, so they wait passively. A variable that the user
has set is never touched.
"""

from __future__ import annotations

import os
from pathlib import Path

from ctxlab.cores import available_cores


def set_thread_defaults(share: int = 1) -> None:
    """Sets OpenMP's defaults in the environment, each of `share` processes getting its part of the cores."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // share)))


def set_cache(folder: str) -> None:
    """Makes `paths.cache` the cache folder of all that this process and its children keep, the compiled kernel too."""
    if folder != "auto":
        os.environ["CTXLAB_CACHE"] = str(Path(folder).expanduser().absolute())
