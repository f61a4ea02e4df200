"""What wandb's own reader finds in the files of an offline run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def inspect(run_folder: Path) -> dict[str, list[dict[str, Any]]]:
    """type -> the bodies of all records of that type, in order: `run`, `metric`, `history`, `exit`, ..."""
    (offline,) = (run_folder / "wandb").glob("offline-run-*")
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", str(offline), "--json"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], []).append(record.get(record["type"], {}))
    return found


def history(records: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of metrics, without what wandb adds of its own (`_step`, `_runtime`)."""
    rows = [record["item"] for record in records["history"]]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


def axes(records: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """metric -> the metric that it is drawn against."""
    return {m["name"]: m["step_metric"] for m in records["metric"] if "step_metric" in m}
