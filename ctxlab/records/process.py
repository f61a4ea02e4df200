"""Whether the process that wrote a record still lives: its pid may be somebody else's by now, its start time not."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
from pathlib import Path
from typing import Any

BEAT_SECONDS = 10.0
STALE_SECONDS = 300.0  # without a heartbeat, on a host that cannot be asked


def started_at(pid: int) -> str | None:
    """When a process started, in whatever unit the system counts; None when there is none of that pid."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            # Field 22, counted behind the command's name, which may hold spaces and brackets.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]
    shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return shown.stdout.strip() or None


def this_process() -> dict[str, Any]:
    """host, pid and start of the process that asks."""
    return {"host": platform.node(), "pid": os.getpid(), "start": started_at(os.getpid())}


def is_alive(process: dict[str, Any], heartbeat_age: float) -> bool:
    """Whether a record's process still runs: asked of the system on its own host, judged by its heartbeat elsewhere."""
    if process.get("host") != platform.node():
        return heartbeat_age < STALE_SECONDS
    start = started_at(int(process.get("pid", 0)))
    return start is not None and start == process.get("start")


class Heartbeat:
    """Touches a file every ten seconds from a thread of its own: a long evaluation looks alive from afar too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while True:
            try:
                self._path.touch()
            except OSError:
                return  # the folder is gone, or the disk: nothing is left to vouch for
            if self._stop.wait(BEAT_SECONDS):
                return
