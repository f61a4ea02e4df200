"""From a line to typed configs: runs looked up, parts inherited, every cell composed and checked, none started."""

from __future__ import annotations

import contextlib
import copy
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctxlab.config import catalog, plugins, rules, schema
from ctxlab.config.compose import Composed, Composer, set_key
from ctxlab.config.explain import unknown_key
from ctxlab.config.overrides import SELECTOR_KEYS, Line, key_of, split_selector
from ctxlab.config.sweepers import chosen_sweeper, sweep_with
from ctxlab.data.source import SOURCES
from ctxlab.errors import ConfigError, IncompatibleError, RecordError
from ctxlab.evaluation.perplexity import PerplexityConfig, auto_lengths, wanted_segment
from ctxlab.records.store import Run, RunStore
from ctxlab.train.budget import plan_budget
from ctxlab.train.checkpoint import find_checkpoint
from ctxlab.train.objectives.base import OBJECTIVES

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
    with _working(line, validate=validate) as (work, first, loaded):
        composer, runs = work.composer, work.store.root
        if not (line.multirun or first.multirun):
            as_it_is = not any(override.is_sweep_override() for override in composer.parse(line.overrides))
            cell = work.cell(list(line.overrides), first if as_it_is else None)
            return Prepared(line, (cell,), False, (), loaded, runs)
        if chosen_sweeper(line.sweeper):
            rows = _listed(line, composer, first, work.generated)
        else:
            rows = composer.cells(line.overrides, first.sweep_params)
        return Prepared(line, tuple(work.sweep(each(rows))), True, _varied(rows), loaded, runs)


@dataclass(frozen=True)
class Search:
    """A sweep whose cells are not known in advance: what is fixed, and a cell from the overrides of a trial."""

    prepared: Prepared  # with one cell: the config before any trial
    arguments: tuple[str, ...]  # the keys that are searched over, in Hydra's words
    _work: _Work

    def cell(self, trial: Sequence[str]) -> Cell:
        """Composes and checks one trial. Raises ConfigError and RecordError like any line."""
        cell = self._work.cell([*self._fixed, *trial])
        if "context" in map(key_of, trial) and _segment(cell.typed) == "auto":
            raise ConfigError(
                "eval.perplexity.segment: contexts are searched over, so give the one length that test segments have "
                "in all trials, e.g. 4k; else their numbers would not be of the same tokens"
            )
        return cell

    def asked(self, trial: Sequence[str]) -> Cell:
        """What a trial that cannot be composed asked for, as far as that can be written down."""
        config = copy.deepcopy(self.prepared.cells[0].config)
        for override in self._work.composer.parse(trial):
            set_key(config, key_of(override.input_line or ""), override.value())
        overrides = [*self._fixed, *trial]
        return replace(
            self.prepared.cells[0],
            overrides=tuple(overrides),
            config=config,
            line=shlex.join(["ctxlab", self.prepared.line.command, *overrides]),
        )

    @property
    def _fixed(self) -> tuple[str, ...]:
        return self.prepared.cells[0].overrides


@contextmanager
def prepare_search(line: Line) -> Iterator[Search]:
    """Composes and checks what is fixed on a line whose sweeper is adaptive, and is there to compose its trials."""
    with _working(line, validate=True) as (work, first, loaded):
        arguments = _sweeps(line, work.composer, first)
        if not arguments:
            raise ConfigError("hydra/sweeper: nothing is searched over, e.g. optim.learning_rate=interval(0.001,0.1)")
        fixed = [o.input_line or "" for o in work.composer.parse(line.overrides) if not o.is_sweep_override()]
        keys = tuple(map(key_of, arguments))
        prepared = Prepared(line, (work.cell(fixed),), True, keys, loaded, work.store.root)
        yield Search(prepared, tuple(arguments), work)


@contextmanager
def _working(line: Line, *, validate: bool) -> Iterator[tuple[_Work, Composed, tuple[plugins.Plugin, ...]]]:
    """What composes the cells of a line, its config without what is swept over, and its plugins, for as long as it is open."""
    loaded = tuple(plugins.load(path) for path in line.plugins)
    with tempfile.TemporaryDirectory(prefix="ctxlab-") as folder:
        generated = Path(folder).resolve()
        if loaded:
            plugins.write_options(generated, line.config_dirs)
        with Composer(line.command, line.config_dirs, (generated,)) as composer:
            first = _without_sweeps(composer, line)
            runs = Path(line.free_text.get("paths.runs", first.config["paths"]["runs"])).expanduser()
            yield _Work(line, composer, RunStore(runs), generated, validate, first.multirun), first, loaded


@dataclass(frozen=True)
class _Work:
    line: Line
    composer: Composer
    store: RunStore
    generated: Path
    validate: bool
    sweeps_by_itself: bool  # the config says so, not the flag: a cell's line then has to say that it does not

    def sweep(self, rows: Iterable[list[str]]) -> list[Cell]:
        """All cells, or one ConfigError with every mistake and the cells that make it."""
        cells: list[Cell] = []
        wrong: dict[str, list[str]] = {}
        for number, row in enumerate(rows):
            try:
                cells.append(self.cell(row))
            except (ConfigError, RecordError) as error:
                for text in str(error).splitlines():
                    wrong.setdefault(text, []).append(str(number))
        if wrong:
            raise ConfigError("\n".join(f"{text} (cell {', '.join(numbers)})" for text, numbers in wrong.items()))
        return self._same_segments(cells) if self.validate else cells

    def cell(self, overrides: list[str], composed: Composed | None = None) -> Cell:
        """Composes one config (unless it is `composed`), looks its runs up, sets its free text, reads it typed."""
        selectors = dict(self.line.selectors)
        for override in overrides:
            if key_of(override) in SELECTOR_KEYS:
                selectors[key_of(override)] = split_selector(override.partition("=")[2])
        plain = [override for override in overrides if key_of(override) not in SELECTOR_KEYS]
        inherited = [
            *self._inherit(selectors.get("init", ("none",)), plain),
            *_own_task(self.line.command, self.store, selectors, plain),
        ]
        if composed is None or inherited:
            composed = self.composer.compose([*inherited, *plain])
        config = composed.config
        self._refuse_unknown(config, [*self.line.free_text, *selectors], overrides)
        for key, value in self.line.free_text.items():
            set_key(config, key, value)
        ids = self._resolve(config, selectors)
        line = self._text(overrides, ids)
        skipped = rules.leave_out(config, overrides)
        if not self.validate:
            return Cell(tuple(overrides), config, None, line)
        if config.get("resume", "none") != "none":
            raise ConfigError("resume: goes on with one training run, and only from the line: ctxlab train resume=RUN")
        typed = schema.parse(self.line.command, config)
        try:
            rules.check(typed)
        except IncompatibleError as error:
            skipped = skipped or str(error)
        return Cell(tuple(overrides), typed.model_dump(mode="json"), typed, line, skipped)

    def _same_segments(self, cells: list[Cell]) -> list[Cell]:
        """Cells that would cut the test text differently get segments of one length: the longest that any asks for.

        Left to itself each would cut the test text by its own longest length, and the cells' numbers would not be of
        the same tokens.
        """
        wanted = [self._wanted_segment(cell) for cell in cells]
        if len({segment for segment in wanted if segment}) < 2:
            return cells
        longest = max(wanted)
        return [
            _with_segment(cell, longest) if segment and cell.typed.eval.perplexity.segment == "auto" else cell
            for cell, segment in zip(cells, wanted, strict=True)
        ]

    def _wanted_segment(self, cell: Cell) -> int:
        """The segments that a cell would cut the test text into, 0 where it is not scored."""
        lengths = self._lengths(cell)
        return wanted_segment(cell.typed.eval.perplexity, lengths) if lengths else 0

    def _lengths(self, cell: Cell) -> tuple[int, ...]:
        """The lengths that a cell is scored at, none where it is not."""
        perplexity = getattr(getattr(cell.typed, "eval", None), "perplexity", "none")
        if cell.skipped or not isinstance(perplexity, PerplexityConfig):
            return ()
        if perplexity.lengths != "auto":
            return tuple(sorted(set(perplexity.lengths)))
        if isinstance(cell.typed, schema.EvalConfig):
            contexts = [self.store.open(run_id).record.config["context"] for run_id in cell.typed.run]
        else:
            contexts = [cell.typed.context]
        return tuple(sorted({length for context in contexts for length in auto_lengths(context)}))

    def _inherit(self, init: tuple[str, ...], overrides: list[str]) -> list[str]:
        """The recorded parts of a run as group options, for the groups that the line does not choose itself."""
        if init == ("none",):
            return []
        run = _found(self.store, "init", init)
        chosen = {key_of(override) for override in overrides}
        parts = []
        for group in INHERITED:
            recorded = run.record.config[group]
            if group not in chosen and recorded != "none":
                name = f"from_{run.id}"
                plugins.write_option(self.generated, group, name, recorded)
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
                found = self._resolve_all(wanted)
                config[key] = found
                ids[key] = found[0] if len(found) == 1 else f"[{','.join(found)}]"
            else:
                config[key] = ids[key] = _name(self.store, _found(self.store, key, wanted))
        return ids

    def _resolve_all(self, selectors: tuple[str, ...]) -> list[str]:
        """The ids of several runs. Raises ConfigError with a line for each that cannot be found."""
        found, wrong = [], []
        for selector in selectors:
            try:
                found.append(_name(self.store, _found(self.store, "run", (selector,))))
            except (ConfigError, RecordError) as error:
                wrong.append(str(error))
        if wrong:
            raise ConfigError("\n".join(dict.fromkeys(wrong)))
        return found

    def _refuse_unknown(self, config: dict[str, Any], keys: Iterable[str], overrides: list[str]) -> None:
        """Free text did not pass through Hydra, which would have refused a key that the config does not have."""
        known = catalog.keys(self.line.command, self.line.config_dirs)
        for key in keys:
            top, _, _ = key.partition(".")
            if top not in config or (key in known and not _has(config, key)):
                raise ConfigError(unknown_key(key, self.line.command, overrides, self.line.config_dirs))

    def _text(self, overrides: list[str], ids: dict[str, str]) -> str:
        words = [override for override in overrides if key_of(override) not in ids]
        if self.sweeps_by_itself:
            words = [word for word in words if key_of(word) != "hydra.mode"] + ["hydra.mode=RUN"]
        words += [f"{key}={value}" for key, value in ids.items()]
        words += [f"{key}={value}" for key, value in self.line.free_text.items()]
        words += [word for path in self.line.plugins for word in ("--plugin", str(path))]
        words += [word for path in self.line.config_dirs for word in ("--config-dir", str(path))]
        return shlex.join(["ctxlab", self.line.command, *words])


def prepare_resume(line: Line, runs: Path) -> Cell:
    """The config of a run that goes on: the recorded one, with a larger budget, other devices, another logger."""
    known = {*catalog.keys(line.command), *(default.group for default in catalog.defaults(line.command))}
    for key in (*map(key_of, line.overrides), *line.free_text, *(k for k in line.selectors if k != "resume")):
        if key not in known:
            raise ConfigError(unknown_key(key, line.command, line.overrides))
        if not any(key == allowed or (allowed.endswith(".") and key.startswith(allowed)) for allowed in RESUMABLE):
            allowed = ", ".join(entry.rstrip(".") for entry in RESUMABLE)
            raise ConfigError(f"{key}: is as in the run that goes on; resume=RUN accepts only {allowed}")
    run = _found(RunStore(runs), "resume", line.selectors["resume"])
    if run.record.command != "train":
        raise ConfigError(f"resume: {run.id} is no training run but one of ctxlab {run.record.command}")
    for path, sha256 in run.record.plugins:
        plugins.load(Path(path), sha256)
    config = copy.deepcopy(run.record.config)
    with Composer(line.command) as composer:
        composer.compose(line.overrides)  # refuses what does not exist
        for override in composer.parse(line.overrides):
            set_key(config, key_of(override.input_line or ""), override.value())
    for key, value in line.free_text.items():
        set_key(config, key, value)
    config["resume"] = _name(RunStore(runs), run)
    typed = schema.parse(line.command, config)
    rules.check(typed)
    _refuse_spent(run, typed)
    words = [*shlex.split(run.record.line), *line.overrides, *(f"{k}={v}" for k, v in line.free_text.items())]
    return Cell(line.overrides, typed.model_dump(mode="json"), typed, shlex.join(words))


def _refuse_spent(run: Run, config: schema.TrainConfig) -> None:
    """Refuses a run that has nothing left to do. One that was stopped in its evaluation still has that."""
    if not run.has_weights:
        return
    saved = find_checkpoint(run.checkpoints)
    trainer = config.trainer
    budget = plan_budget(trainer, config.context, world=trainer.devices, fitting_rows=lambda _: 1)
    limit = budget.spent(saved.step, saved.seconds)
    if limit is not None and (run.record.status == "done" or saved.step > budget.n_steps):
        raise ConfigError(
            f"trainer.{limit}: {run.id} is at step {saved.step} and has reached {getattr(trainer, limit)}; "
            f"give a larger trainer.{limit} to go on"
        )


def _varied(rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The keys whose values differ between rows of overrides."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for override in row:
            values.setdefault(key_of(override), set()).add(override)
    return tuple(key for key, found in values.items() if len(found) > 1)


def _sweeps(line: Line, composer: Composer, first: Composed) -> list[str]:
    """The sweeps of an experiment and of the line, which wins."""
    said = [f"{key}={value}" for key, value in first.sweep_params.items()] + list(line.overrides)
    by_key = {key_of(o.input_line or ""): o.input_line or "" for o in composer.parse(said) if o.is_sweep_override()}
    fixed = {key_of(o.input_line or "") for o in composer.parse(line.overrides) if not o.is_sweep_override()}
    return [text for key, text in by_key.items() if key not in fixed]


def _listed(line: Line, composer: Composer, first: Composed, folder: Path) -> list[list[str]]:
    """The cells of a sweeper that knows them in advance."""
    fixed = [o.input_line or "" for o in composer.parse(line.overrides) if not o.is_sweep_override()]
    rows: list[list[str]] = []

    class Listing:
        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
            rows.extend([*fixed, *map(str, overrides)] for overrides in job_overrides)
            return []

    with contextlib.redirect_stdout(sys.stderr):
        sweep_with(line.sweeper, _sweeps(line, composer, first), Listing(), folder)
    if not rows:
        raise ConfigError("hydra/sweeper: it has no cells")
    return rows


def _segment(config: Any) -> Any:
    perplexity = getattr(getattr(config, "eval", None), "perplexity", "none")
    return getattr(perplexity, "segment", None)


def _without_sweeps(composer: Composer, line: Line) -> Composed:
    """One composition that tells where runs are kept and whether an experiment is a sweep, before that is expanded."""
    overrides = [o.input_line or "" for o in composer.parse(line.overrides) if not o.is_sweep_override()]
    plain = [o for o in overrides if key_of(o) not in SELECTOR_KEYS]
    runs = line.free_text.get("paths.runs") or composer.compose([]).config["paths"]["runs"]
    store = RunStore(Path(runs).expanduser())
    return composer.compose([*_own_task(line.command, store, line.selectors, plain), *plain])


def _own_task(
    command: str, store: RunStore, selectors: Mapping[str, tuple[str, ...]], overrides: Sequence[str]
) -> list[str]:
    """What is evaluated of runs that were trained on a task, unless the line says: that task."""
    chosen = {key_of(override) for override in overrides}
    if command != "eval" or chosen & {"eval", "data", "experiment"}:
        return []
    try:
        records = [_found(store, "run", (run,)).record for run in selectors.get("run", ("last",))]
    except (ConfigError, RecordError):
        return []  # said where all of them are looked up
    implied = [
        {**OBJECTIVES.get(record.config.get("objective", {"name": "causal"})["name"]).implies,
         **SOURCES.get(record.config["data"]["name"]).implies}
        for record in records
    ]  # fmt: skip
    return [f"eval={implied[0]['eval']}"] if all("eval" in one for one in implied) else []


def _with_segment(cell: Cell, segment: int) -> Cell:
    """The cell with `eval.perplexity.segment` set, in its config and in the line that does it again."""
    perplexity = cell.typed.eval.perplexity.model_copy(update={"segment": segment})
    typed = cell.typed.model_copy(update={"eval": cell.typed.eval.model_copy(update={"perplexity": perplexity})})
    line = f"{cell.line} eval.perplexity.segment={segment}"
    return replace(cell, typed=typed, config=typed.model_dump(mode="json"), line=line)


def _has(config: dict[str, Any], key: str) -> bool:
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _found(store: RunStore, key: str, selectors: tuple[str, ...]) -> Run:
    """The one run that the value of `key` names. Raises ConfigError and RecordError that begin with that key."""
    if selectors == ("",):
        raise ConfigError(f"{key}: expected a run id, a unique prefix of one, a path or last, got nothing")
    if len(selectors) != 1:
        raise ConfigError(f"{key}: expected one run, got '[{','.join(selectors)}]'")
    try:
        run = store.resolve(selectors[0])
    except RecordError as error:
        raise RecordError(f"{key}: {error}".replace(f"{key}: run: ", f"{key}: ", 1)) from error
    if key != "resume" and not run.has_weights:
        raise RecordError(f"{key}: {run.id} (ctxlab {run.record.command}, {run.record.status}) has no weights")
    return run


def _name(store: RunStore, run: Run) -> str:
    """What finds a run again: its id, or its whole path where it lies in another folder than the runs of this line."""
    return run.id if (store.root / run.id).resolve() == run.path.resolve() else str(run.path.resolve())
