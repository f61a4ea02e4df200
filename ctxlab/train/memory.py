"""How much memory this process has used at its worst, and how much the machine has."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_memory_bytes(device: torch.device | str = "cpu") -> tuple[int, str]:
    """Peak memory of this process so far and where the figure comes from.

    CPU: `VmHWM` of /proc/self/status, or `ru_maxrss` where there is no /proc (macOS, in bytes there). CUDA:
    `max_memory_reserved` of the allocator, which includes its cache and excludes the CUDA context.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device), "cuda.max_memory_reserved"
    if _STATUS.exists():
        match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        if match:
            return int(match[1]) * 1024, "VmHWM"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024), "ru_maxrss"


def total_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Memory of the device, or of the machine; a container's own limit where it is lower."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total
