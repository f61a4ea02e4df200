"""How many processor cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1 = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))


def available_cores() -> int:
    """Cores this process may use: its affinity, lowered by the quota of its control group (a container's limit)."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _quota()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _quota() -> float | None:
    """Cores' worth of time that the control group grants, None without a limit."""
    try:
        if _CGROUP_V2.exists():
            limit, period = _CGROUP_V2.read_text().split()[:2]
            return None if limit == "max" else float(limit) / float(period)
        limit, period = (path.read_text().strip() for path in _CGROUP_V1)
        return float(limit) / float(period) if float(limit) > 0 else None
    except (OSError, ValueError):
        return None
