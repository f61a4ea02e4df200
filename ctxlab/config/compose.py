"""Hydra's part: a line's overrides in, a plain resolved dict out. Everything that could run code is refused here.

A config file from somebody else is data. `_target_` is refused everywhere; under `hydra` only the sweep itself may be
set, since other keys there import classes, set the environment or open files; environment variables cannot be read.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from ctxlab.config import catalog
from ctxlab.config.explain import explain_hydra
from ctxlab.config.overrides import key_of
from ctxlab.data.source import SOURCES
from ctxlab.errors import ConfigError
from ctxlab.model.base import architecture_of
from ctxlab.registry import nearest
from ctxlab.train.objectives.base import OBJECTIVES, objectives_of

# The keys below `hydra` that a line or a file may set, exact or as the start of a dotted key.
_ALLOWED = ("mode", "sweeper.params", "run.dir", "sweep.dir", "sweep.subdir")
_NO_TARGET = "'_target_' is refused; components are chosen by name and code comes from --plugin"
# What Hydra itself fills in at each composition.
_FILLED_IN = ("overrides.", "runtime.", "job.name", "job.override_dirname", "job.config_name", "searchpath")


@dataclass(frozen=True)
class Composed:
    """One resolved config, still untyped, and what was chosen to get there."""

    config: dict[str, Any]
    choices: dict[str, Any]
    multirun: bool = False
    sweep_params: dict[str, str] = field(default_factory=dict)


class Composer:
    """Hydra, set up for one command over the shipped conf/ and further folders. Use it as a context manager.

    `generated` are folders of ours (the recorded parts of a run, a plugin's components); `config_dirs` are the user's,
    whose files must not carry a shipped name: Hydra would silently prefer the shipped one.
    """

    def __init__(self, command: str, config_dirs: Sequence[Path] = (), generated: Sequence[Path] = ()) -> None:
        self.command = command
        self.folders = (*generated, *config_dirs)
        for folder in config_dirs:
            _refuse_shadows(folder)
        self._stack = ExitStack()
        self._plain_hydra: dict[str, Any] = {}

    def __enter__(self) -> Composer:
        self._stack.enter_context(initialize_config_dir(str(catalog.conf_dir()), version_base="1.3"))
        OmegaConf.register_new_resolver("oc.env", _refuse_environment, replace=True)
        self._stack.callback(OmegaConf.register_new_resolver, "oc.env", oc.env, replace=True)
        try:
            self._plain_hydra = _flat_hydra(self._load([]))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def compose(self, overrides: Sequence[str]) -> Composed:
        """Composes one config. Raises ConfigError, one line, for anything that Hydra or the rules above refuse."""
        parsed = self.parse(overrides)
        for override in parsed:
            self._refuse_override(override)
        try:
            implied = self._implied(parsed)
            loaded = self._load([*implied, *overrides])
            if (fitting := _fitting_objective(loaded, implied)) is not None:
                implied = [fitting if override.startswith("objective=") else override for override in implied]
                loaded = self._load([*implied, *overrides])
            overrides = [*implied, *overrides]
            _refuse_targets(OmegaConf.to_container(_without_hydra(loaded), resolve=False))
            self._refuse_hydra_changes(loaded)
            config = OmegaConf.to_container(_without_hydra(loaded), resolve=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise ConfigError(explain_hydra(error, self.command, overrides, self.folders)) from error
        assert isinstance(config, dict)
        choices = {k: v for k, v in loaded.hydra.runtime.choices.items() if not str(k).startswith("hydra/")}
        for default in catalog.defaults(self.command):
            if not default.option.startswith("[") and default.group not in choices:
                raise ConfigError(f"{default.group}: expected one of its options, got a list")
        resolved = {str(key): value for key, value in config.items()}
        if "experiment" in choices:
            resolved["experiment"] = choices["experiment"] or "none"
        if os.environ.get("CTXLAB_RUNS") and "paths" in resolved:
            resolved["paths"]["runs"] = os.environ["CTXLAB_RUNS"]
        params = loaded.hydra.sweeper.get("params") or {}
        return Composed(
            config=resolved,
            choices=choices,
            multirun=loaded.hydra.mode is not None and loaded.hydra.mode.name == "MULTIRUN",
            sweep_params={str(key): str(value) for key, value in params.items()},
        )

    def _implied(self, overrides: Sequence[Override]) -> list[str]:
        """What a choice of data or objective means for other groups, where neither the line nor an experiment chose them."""
        said = {override.get_key_element(): override for override in overrides}
        groups = {default.group: default.option for default in catalog.defaults(self.command)}
        choices: dict[str, Any] = {}
        if "experiment" in said:
            choices = self._load([said["experiment"].input_line or ""]).hydra.runtime.choices
        found: dict[str, str] = {}
        for group, registry in (("objective", OBJECTIVES), ("data", SOURCES)):
            chosen = said[group].value() if group in said else choices.get(group)
            if group in groups and isinstance(chosen, str) and chosen in registry.names():
                found |= registry.get(chosen).implies
        return [
            f"{group}={option}"
            for group, option in found.items()
            if group in groups and group not in said and str(choices.get(group, groups[group])) == groups[group]
        ]

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Hydra's own reading of the overrides; `glob(*)` sees the options that there are."""
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        try:
            return list(parser.parse_overrides(list(overrides)))
        except HydraException as error:
            raise ConfigError(explain_hydra(error, self.command, overrides, self.folders)) from error

    def cells(self, overrides: Sequence[str], params: dict[str, str]) -> list[list[str]]:
        """Every cell's overrides, in Hydra's own order: the product of all sweeps, the last one running fastest.

        A sweep on the line replaces the experiment's sweep of the same key.
        """
        axes: dict[str, list[str]] = {}
        for override in self.parse([*(f"{key}={value}" for key, value in params.items()), *overrides]):
            key = override.get_key_element()
            if not override.is_sweep_override():
                axes[key] = [override.input_line or ""]
            elif override.is_discrete_sweep():
                try:
                    axes[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
                except HydraException as error:
                    raise ConfigError(f"{key_of(key)}: {error}") from error
                if not axes[key]:
                    raise ConfigError(f"{key_of(key)}: the sweep '{override.input_line}' has no values")
            else:
                raise ConfigError(
                    f"{key_of(key)}: an interval has no list of values; write range(...) or choices, "
                    "or search it: hydra/sweeper=optuna"
                )
        return [list(cell) for cell in itertools.product(*axes.values())]

    def _load(self, overrides: Sequence[str]) -> DictConfig:
        paths = ",".join(_quoted(f"file://{folder}") for folder in self.folders)
        search = [f"hydra.searchpath=[{paths}]"] if self.folders else []
        return compose(self.command, [*search, *overrides], return_hydra_config=True)

    def _refuse_override(self, override: Override) -> None:
        text = override.input_line or ""
        key = key_of(text)
        if "_target_" in text:
            raise ConfigError(
                f"{key}: '_target_' is refused; components are chosen by name and code comes from --plugin"
            )
        if key == "hydra":
            raise ConfigError(
                "hydra: not allowed; of hydra only mode, sweeper.params, run.dir and sweep.dir may be set"
            )
        if key.startswith("hydra.") and not _allowed(key.removeprefix("hydra.")):
            raise ConfigError(_hydra_refusal(key.removeprefix("hydra.")))
        if key.startswith("hydra/"):
            raise ConfigError(_hydra_refusal(key.removeprefix("hydra/").replace("/", ".")))
        said = text.partition("=")[2]
        if key.startswith("hydra.sweeper.params"):
            swept = key.removeprefix("hydra.sweeper.params").lstrip(".") or "KEY"
            raise ConfigError(f"{key}: is for experiment files; on the line write -m {swept}={said}")
        groups = {default.group for default in catalog.defaults(self.command)}
        group, _, field = key.partition(".")
        if field == "name" and group in groups - {"model"}:
            raise ConfigError(f"{key}: is chosen with its settings, by {group}={said or 'NAME'}")
        if key not in groups:
            return
        if override.is_delete():
            raise ConfigError(f"{key}: cannot be left out; choose one of its options")
        if override.is_add():
            raise ConfigError(f"{key}: is there already; write {key}={said}")
        value = override.value()
        if value is None or isinstance(value, bool | int | float | dict):
            known = [option.name for option in catalog.groups(self.folders).get(key, [])]
            raise ConfigError(f"{key}: no {key} is called '{said}'{nearest(said, known)}")

    def _refuse_hydra_changes(self, loaded: DictConfig) -> None:
        flat = _flat_hydra(loaded)
        for key in sorted(flat.keys() | self._plain_hydra.keys(), key=lambda key: (key not in flat, key)):
            if flat.get(key, "") != self._plain_hydra.get(key, "") and not _allowed(key):
                raise ConfigError(_hydra_refusal(key))


def _fitting_objective(loaded: DictConfig, implied: Sequence[str]) -> str | None:
    """What data means for the objective of a model that its usual one does not train: the only other one that does, if any."""
    if not any(override.startswith("objective=") for override in implied):
        return None
    architecture = architecture_of(loaded.model)
    if architecture in OBJECTIVES.get(loaded.objective.name).architectures:
        return None
    fitting = objectives_of(architecture, SOURCES.get(loaded.data.name))
    return f"objective={fitting[0]}" if len(fitting) == 1 else None


def set_key(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in nested dicts, adding what is missing: the schema says later whether the key exists."""
    *parents, last = key.split(".")
    for parent in parents:
        below = config.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{key}: {parent} is one value here and has no part '{last}'")
        config = below
    config[last] = value


def _refuse_shadows(folder: Path) -> None:
    shipped = catalog.conf_dir()
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder)
        if (shipped / name).is_file():
            raise ConfigError(f"--config-dir: {path} has the name of a shipped file, which Hydra prefers; rename yours")


def _allowed(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in _ALLOWED)


def _hydra_refusal(key: str) -> str:
    part = key.split(".")[0]
    if part == "launcher":
        return f"hydra.{key}: a launcher is chosen on the line of a sweep, by hydra/launcher=NAME and hydra.launcher.KEY=VALUE"
    if part == "sweeper":
        return f"hydra.{key}: a sweeper is chosen on the line of a sweep, by hydra/sweeper=NAME and hydra.sweeper.KEY=VALUE"
    return f"hydra.{key}: not allowed; of hydra only mode, sweeper.params, run.dir and sweep.dir may be set"


def _refuse_targets(node: Any, path: str = "") -> None:
    for key, value in _children(node):
        here = f"{path}.{key}" if path else str(key)
        if str(key) == "_target_":
            raise ConfigError(
                f"{here}: '_target_' is refused; components are chosen by name and code comes from --plugin"
            )
        _refuse_targets(value, here)


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list):
        yield from enumerate(node)


def _refuse_environment(name: str, default: str | None = None) -> str:
    raise ConfigError(f"oc.env:{name}: a config may not read environment variables")


def _without_hydra(loaded: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(loaded, [str(key) for key in loaded if key != "hydra"])


def _flat_hydra(loaded: DictConfig) -> dict[str, Any]:
    """Hydra's own part as dotted leaves, unresolved, without what it fills in itself."""
    flat: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        children = list(_children(node))
        for key, value in children:
            walk(value, f"{path}.{key}" if path else str(key))
        if not children and not path.startswith(_FILLED_IN):
            flat[path] = str(node)

    walk(OmegaConf.to_container(loaded.hydra, resolve=False), "")
    return flat


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
