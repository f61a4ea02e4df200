"""From a line to typed configs: runs looked up, parts inherited, every cell composed and checked, none started."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxlab.config import catalog, plugins, rules, schema
from ctxlab.config.compose import Composed, Composer, set_key
from ctxlab.config.explain import unknown_key
from ctxlab.config.overrides import SELECTOR_KEYS, Line, key_of, split_selector
from ctxlab.errors import ConfigError, IncompatibleError
from ctxlab.records.store import RunStore

# What `train init=RUN` takes over from the run, unless the line chooses another.
INHERITED = ("model", "position", "attention", "tokenizer")
# What `train resume=RUN` may still change, whole keys or everything below a dot.
RESUMABLE = (
    "trainer.max_tokens", "trainer.max_steps", "trainer.max_time", "trainer.devices", "trainer.strategy",
    "trainer.accelerator", "logger.", "paths.", "tags", "note", "sweep.",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run to be: its own overrides, the resolved config as JSON and typed, and why it is skipped, if it is."""

    overrides: tuple[str, ...]
    config: dict[str, Any]
    typed: Any
    line: str
    skipped: str = ""


@dataclass(frozen=True)
class Prepared:
    """What a line comes to: one cell, or the cells of a sweep with the keys that it sweeps over."""

    line: Line
    cells: tuple[Cell, ...]
    is_sweep: bool
    swept: tuple[str, ...]
    plugins: tuple[plugins.Plugin, ...]
    runs: Path


def prepare(
    line: Line, *, validate: bool = True, each: Callable[[Iterable[list[str]]], Iterable[list[str]]] = iter
) -> Prepared:
    """Composes and checks everything that a line asks for.

    With `validate=False` the configs stay plain (what `--cfg job` prints). `each` wraps the loop over cells, to show
    progress. Raises ConfigError with one line for each wrong cell of a sweep: a wrong name or type refuses it whole.
    """
    loaded = tuple(plugins.load(path) for path in line.plugins)
    with tempfile.TemporaryDirectory(prefix="ctxlab-") as folder:
        generated = Path(folder).resolve()
        if loaded:
            plugins.write_options(generated, line.config_dirs)
        with Composer(line.command, line.config_dirs, (generated,)) as composer:
            first = _without_sweeps(composer, line)
            runs = Path(line.free_text.get("paths.runs", first.config["paths"]["runs"])).expanduser()
            work = _Work(line, composer, RunStore(runs), generated, validate)
            is_sweep = line.multirun or first.multirun
            if not is_sweep:
                return Prepared(line, (work.cell(list(line.overrides)),), False, (), loaded, runs)
            rows = composer.cells(line.overrides, first.sweep_params)
            swept = tuple(key_of(row) for index, row in enumerate(rows[0]) if len({r[index] for r in rows}) > 1)
            return Prepared(line, tuple(work.sweep(each(rows))), True, swept, loaded, runs)


@dataclass(frozen=True)
class _Work:
    line: Line
    composer: Composer
    store: RunStore
    generated: Path
    validate: bool

    def sweep(self, rows: Iterable[list[str]]) -> list[Cell]:
        """All cells, or one ConfigError with every mistake and the cells that make it."""
        cells: list[Cell] = []
        wrong: dict[str, list[str]] = {}
        for number, row in enumerate(rows):
            try:
                cells.append(self.cell(row))
            except ConfigError as error:
                for text in str(error).splitlines():
                    wrong.setdefault(text, []).append(str(number))
        if wrong:
            raise ConfigError("\n".join(f"{text} (cell {', '.join(numbers)})" for text, numbers in wrong.items()))
        return cells

    def cell(self, overrides: list[str]) -> Cell:
        """Composes one config, looks its runs up, sets its free text, reads it through the schema."""
        selectors = dict(self.line.selectors)
        for override in overrides:
            if key_of(override) in SELECTOR_KEYS:
                selectors[key_of(override)] = split_selector(override.partition("=")[2])
        plain = [override for override in overrides if key_of(override) not in SELECTOR_KEYS]
        inherited = self._inherit(selectors.get("init", ("none",)), plain)
        config = self.composer.compose([*inherited, *plain]).config
        self._refuse_unknown(config, [*self.line.free_text, *selectors])
        for key, value in self.line.free_text.items():
            set_key(config, key, value)
        ids = self._resolve(config, selectors)
        line = self._text(overrides, ids)
        if not self.validate:
            return Cell(tuple(overrides), config, None, line)
        typed = schema.parse(self.line.command, config)
        try:
            rules.check(typed)
        except IncompatibleError as error:
            return Cell(tuple(overrides), typed.model_dump(mode="json"), typed, line, skipped=str(error))
        return Cell(tuple(overrides), typed.model_dump(mode="json"), typed, line)

    def _inherit(self, init: tuple[str, ...], overrides: list[str]) -> list[str]:
        """The recorded parts of a run as group options, for the groups that the line does not choose itself."""
        if init == ("none",):
            return []
        run = self.store.resolve(_single("init", init))
        chosen = {key_of(override) for override in overrides}
        parts = []
        for group in INHERITED:
            if group not in chosen:
                name = f"from_{run.id}"
                plugins.write_option(self.generated, group, name, run.record.config[group])
                parts.append(f"{group}={name}")
        return parts

    def _resolve(self, config: dict[str, Any], selectors: dict[str, tuple[str, ...]]) -> dict[str, str]:
        """Selectors become ids, in the config and in the line that is recorded."""
        ids: dict[str, str] = {}
        for key in SELECTOR_KEYS:
            wanted = selectors.get(key)
            if wanted is None and isinstance(config.get(key), str) and config[key] != "none":
                wanted = split_selector(config[key])
            if wanted is None or wanted == ("none",) or key not in config:
                continue
            if key == "run" and self.line.command == "eval":
                found = [self.store.resolve(selector).id for selector in wanted]
                config[key] = found
                ids[key] = found[0] if len(found) == 1 else f"[{','.join(found)}]"
            else:
                config[key] = ids[key] = self.store.resolve(_single(key, wanted)).id
        return ids

    def _refuse_unknown(self, config: dict[str, Any], keys: Iterable[str]) -> None:
        """Free text did not pass through Hydra, which would have refused a key that the config does not have."""
        known = catalog.keys(self.line.command, self.line.config_dirs)
        for key in keys:
            top, _, _ = key.partition(".")
            if top not in config or (key in known and not _has(config, key)):
                raise ConfigError(unknown_key(key, self.line.command, self.line.overrides, self.line.config_dirs))

    def _text(self, overrides: list[str], ids: dict[str, str]) -> str:
        words = [override for override in overrides if key_of(override) not in ids]
        words += [f"{key}={value}" for key, value in ids.items()]
        words += [f"{key}={value}" for key, value in self.line.free_text.items()]
        words += [word for path in self.line.plugins for word in ("--plugin", str(path))]
        words += [word for path in self.line.config_dirs for word in ("--config-dir", str(path))]
        return shlex.join(["ctxlab", self.line.command, *words])


def prepare_resume(line: Line, runs: Path) -> Cell:
    """The config of a run that goes on: the recorded one, with a larger budget, other devices, another logger."""
    for key in (*map(key_of, line.overrides), *line.free_text, *(k for k in line.selectors if k != "resume")):
        if not any(key == allowed or (allowed.endswith(".") and key.startswith(allowed)) for allowed in RESUMABLE):
            allowed = ", ".join(entry.rstrip(".") for entry in RESUMABLE)
            raise ConfigError(f"{key}: is as in the run that goes on; resume=RUN accepts only {allowed}")
    run = RunStore(runs).resolve(_single("resume", line.selectors["resume"]))
    config = dict(run.record.config)
    with Composer(line.command) as composer:
        composer.compose(line.overrides)  # refuses what does not exist
        for override in composer.parse(line.overrides):
            set_key(config, key_of(override.input_line or ""), override.value())
    for key, value in line.free_text.items():
        set_key(config, key, value)
    config["resume"] = run.id
    typed = schema.parse(line.command, config)
    rules.check(typed)
    return Cell(line.overrides, typed.model_dump(mode="json"), typed, line.text)


def _without_sweeps(composer: Composer, line: Line) -> Composed:
    """One composition that tells where runs are kept and whether an experiment is a sweep, before that is expanded."""
    overrides = [o.input_line or "" for o in composer.parse(line.overrides) if not o.is_sweep_override()]
    return composer.compose([o for o in overrides if key_of(o) not in SELECTOR_KEYS])


def _has(config: dict[str, Any], key: str) -> bool:
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _single(key: str, selectors: tuple[str, ...]) -> str:
    if len(selectors) != 1 or not selectors[0]:
        raise ConfigError(f"{key}: expected one run, got '[{','.join(selectors)}]'")
    return selectors[0]
