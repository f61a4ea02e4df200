"""Other sweepers of Hydra's, chosen on a sweep's line by hydra/sweeper=NAME: they say which cells there are, we run them.

`list` says so at once, and its cells are written down like those of any sweep. `optuna` goes by what came of the cells
before, so that its cells, the trials of a search, cannot be known in advance.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from hydra import compose
from hydra._internal.callbacks import Callbacks
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf.errors import OmegaConfBaseException

from ctxlab.config.overrides import key_of
from ctxlab.errors import ConfigError
from ctxlab.registry import nearest

SWEEPERS = {"list": "hydra-list-sweeper", "optuna": "hydra-optuna-sweeper"}
ADAPTIVE = ("optuna",)
_SETTINGS = {
    "list": ("list_params", "grid_params"),
    "optuna": ("n_trials", "n_jobs", "direction", "storage", "study_name", "max_failure_rate", "sampler"),
}  # those that run no code of the config's


class Hands(Protocol):
    """What a sweeper gives its cells to: the overrides of each, in batches."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]: ...


def chosen_sweeper(words: Sequence[str]) -> str:
    """The name of the one sweeper that a line chooses; empty where it chooses none.

    Raises ConfigError for one that there is not, one that is not installed, and settings that it does not have.
    """
    if not words:
        return ""
    chosen = [word.partition("=")[2] for word in words if word.startswith("hydra/sweeper=")]
    if len(chosen) != 1:
        raise ConfigError("hydra/sweeper: expected one sweeper beside its settings, e.g. hydra/sweeper=optuna")
    name = chosen[0]
    if name not in SWEEPERS:
        raise ConfigError(f"hydra/sweeper: no sweeper is called '{name}'{nearest(name, SWEEPERS)}")
    for key in map(key_of, words):
        setting = key.removeprefix("hydra.sweeper.").removeprefix("hydra/sweeper/").partition(".")[0]
        if key != "hydra/sweeper" and setting not in _SETTINGS[name]:
            raise ConfigError(f"{key}: of {name} {', '.join(_SETTINGS[name])} may be set")
    Plugins.instance()  # they put their configs into the store when they are found
    if f"{name}.yaml" not in ConfigStore.instance().repo["hydra"]["sweeper"]:
        raise ConfigError(f"hydra/sweeper: {name} is not installed here; pip install {SWEEPERS[name]}")
    return name


def sweep_with(words: Sequence[str], arguments: Sequence[str], hands: Hands, folder: Path) -> None:
    """Runs the sweeper that `words` choose and set over the sweeps in `arguments`. Inside a Composer only.

    What it leaves behind goes into `folder`. Raises ConfigError for what it refuses before its first cell.
    """
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    try:
        config = compose("_cell", [*words, f"hydra.sweep.dir='{quoted}'"], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"hydra.sweeper: {' '.join(str(error).split())}") from error
    plugins = Plugins.instance()
    context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
    # A launcher has to come from Hydra's own packages or an installed plugin; ours is an object that is there already.
    vars(plugins)["instantiate_launcher"] = lambda **_: hands
    try:
        sweeper = plugins.instantiate_sweeper(hydra_context=context, task_function=_no_task, config=config)
    except HydraException as error:
        raise ConfigError(f"hydra/sweeper: {' '.join(str(error).split())}") from error
    finally:
        del vars(plugins)["instantiate_launcher"]
    for name in ("optuna", "hydra_plugins"):  # what they say of a trial, its cell's record says
        logging.getLogger(name).setLevel(logging.ERROR)
    sweeper.sweep(list(arguments))


def _no_task(config: Any) -> None:
    raise AssertionError("cells are not run by Hydra")
