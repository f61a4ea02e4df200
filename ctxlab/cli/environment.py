"""What must be decided before torch is imported: how many threads there are and how they wait.

Spinning OpenMP threads on shared cores cost a factor of three to five, so they wait passively. A variable that the user
has set is never touched.
"""

from __future__ import annotations

import os

from ctxlab.cores import available_cores


def set_thread_defaults(share: int = 1) -> None:
    """Sets OpenMP's defaults in the environment, each of `share` processes getting its part of the cores."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // share)))
