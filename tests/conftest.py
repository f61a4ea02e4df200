"""One thread a test process, said before torch is imported: tests run side by side, and spinning threads would fight."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
