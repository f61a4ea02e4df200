"""A sweep's cells in other hands: one of Hydra's launchers (joblib, submitit, ray) runs what is written down.

Hydra does not compose the cells, it only counts them: its jobs are the constant conf/_cell.yaml with `cell` from 0 on, and
each runs the cell of that number as the pool would, in a process of its own, under the same limits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctxlab.config import catalog
from ctxlab.errors import ConfigError
from ctxlab.launch import Pool, Sweep, read_sweep, sweep_folder
from ctxlab.records.store import RunStore
from ctxlab.registry import nearest

LAUNCHERS = {
    "basic": "", "joblib": "hydra-joblib-launcher", "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher", "ray": "hydra-ray-launcher",
}  # fmt: skip


def check_launcher(words: Sequence[str]) -> None:
    """Raises ConfigError for a launcher that there is not, or whose package is not installed."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    chosen = [word.partition("=")[2] for word in words if word.startswith("hydra/launcher=")]
    if len(chosen) != 1:
        raise ConfigError("hydra/launcher: expected one launcher beside its settings, e.g. hydra/launcher=joblib")
    if chosen[0] not in LAUNCHERS:
        raise ConfigError(f"hydra/launcher: no launcher is called '{chosen[0]}'{nearest(chosen[0], LAUNCHERS)}")
    Plugins.instance()  # they put their configs into the store when they are found
    if f"{chosen[0]}.yaml" not in ConfigStore.instance().repo["hydra"]["launcher"]:
        raise ConfigError(f"hydra/launcher: {chosen[0]} is not installed here; pip install {LAUNCHERS[chosen[0]]}")


def launch_cells(words: Sequence[str], root: Path, sweep: Sweep, cells: Sequence[int]) -> None:
    """Runs cells by number under the launcher that `words` choose and set. Their outcomes are in their records."""
    import hydra

    line = ["ctxlab", "-m", *words, f"root={_quoted(root.absolute())}", f"sweep={sweep.id}"]
    line += [f"cell={','.join(map(str, cells))}", f"hydra.sweep.dir={_quoted(sweep_folder(root, sweep.id).absolute())}"]
    line += ["hydra.sweep.subdir=launcher"]
    before = sys.argv
    sys.argv = line
    try:
        hydra.main(config_path=str(catalog.conf_dir()), config_name="_cell", version_base="1.3")(run_one)()
    finally:
        sys.argv = before


def run_one(config: Any) -> None:
    """One cell, wherever the launcher has put it."""
    store = RunStore(Path(config.root))
    run = store.open(read_sweep(store.root, str(config.sweep)).cells[int(config.cell)])
    limits = run.record.config["sweep"]
    memory, timeout = (None if limits[name] == "none" else limits[name] for name in ("memory", "timeout"))
    Pool(jobs=1, memory=memory, timeout=timeout).execute([run])


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"
