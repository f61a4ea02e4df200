"""What a process and those that it starts are told in the environment: how many threads there are, how they wait and how a
GPU's memory is given out, which has to be decided before torch is imported, and where the cache is.

Spinning OpenMP threads on shared cores cost a factor of three to five, so they wait passively. On a GPU torch's allocator keeps
blocks of the sizes that it was asked for, which other lengths cannot use; segments that grow, and give pages back before
memory is said to be out, hold little more than what is in use. A variable that the user has set is never touched.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ctxlab.cores import available_cores

_CUDA_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The older name, which all versions know, the newer one, and that of AMD's GPUs."""


def set_process_defaults(share: int = 1) -> None:
    """Sets the defaults of OpenMP, each of `share` processes getting its part of the cores, and of CUDA's allocator."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // share)))
    if sys.platform == "linux" and not any(name in os.environ for name in _CUDA_ALLOCATOR):
        os.environ[_CUDA_ALLOCATOR[0]] = "expandable_segments:True"


def set_cache(folder: str) -> None:
    """Makes `paths.cache` the cache folder of all that this process and its children keep, the compiled kernel too."""
    if folder != "auto":
        os.environ["CTXLAB_CACHE"] = str(Path(folder).expanduser().absolute())
