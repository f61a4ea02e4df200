"""The mirror of a record in Weights & Biases. It may fail; the run goes on, and the record stays what is true."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ctxlab.errors import ConfigError
from ctxlab.records.run import Run
from ctxlab.records.schema import METRICS, WAY_AXES, Measurement

# How the splits of a row are called in W&B.
_SPLITS = {"train": "train", "validation": "val", "test": "test"}
# What a step costs has its own heading; the rest of what depends on the context is how well text is modelled.
_COSTS = (
    "peak_memory_bytes", "part_bytes", "cache_bytes", "step_seconds", "prefill_seconds", "decode_seconds_per_token",
    "tokens_per_second", "flops_per_second", "flops_utilization", "scaling_exponent", "longest_context", "largest_batch",
)  # fmt: skip
_CONFIG_NOISE = ("paths", "sweep", "logger", "resume", "tags", "note", "name")  # how a run is kept, not what it is
# Seconds that W&B may take at either end of an online run. WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT say otherwise.
_TIMEOUTS = {"init_timeout": 30.0, "finish_timeout": 120.0}
# How an error of wandb says that nobody answered, rather than that somebody said no.
_UNREACHABLE = re.compile(r"timed out|deadline exceeded|retrying", re.IGNORECASE)


class WandbSink:
    """One W&B run that mirrors one record, under the record's id.

    Metrics have their x axes under exact names (of two globs that fit the first one wins, and it may not be ours):
    `train/*` and `val/*` against tokens, `eval/*` and `scaling/*` against context. History reaches the disk every
    second, so that a killed run keeps it. Everything, staged files too, stays in the run's own folder.

    Offline nothing is looked up in any network. Online without a key, or with a key that is refused, is a ConfigError;
    a server that cannot be reached is a warning, and the run is mirrored offline.
    """

    def __init__(
        self,
        run: Run,
        *,
        mode: Literal["online", "offline"],
        project: str,
        entity: str | None,
        group: str | None,
        job_type: str,
        warn: Callable[[str], None],
    ) -> None:
        self._record = run.record
        self._warn = warn
        self._lengths: dict[tuple[str, int], dict[str, Measurement]] = {}
        self._defined: set[str] = set()
        self._broken = False
        self._environment = contextlib.ExitStack()
        folder = (run.path / "wandb").resolve()
        self._environment.enter_context(_defaults(_environment(folder, mode)))
        try:
            folder.mkdir(exist_ok=True)
            self._run = self._start(run, mode=mode, project=project, entity=entity, group=group, job_type=job_type)
            self._define("tokens", hidden=True)
            self._define("context", hidden=True)
            self._define("index", hidden=True)
        except BaseException:
            self._environment.close()
            raise

    def metrics(self, row: dict[str, Any]) -> None:
        """One history row of what a logging step measured."""
        prefix = _SPLITS[row["split"]]
        named = {f"{prefix}/{name}": value for name, value in row.items() if name in METRICS}
        for name in named:
            self._define(name, step_metric="tokens", step_sync=False)
        self._log({"tokens": row["tokens"], "seconds": row["seconds"], **named})

    def measure(self, measurements: Sequence[Measurement]) -> None:
        """One history row a context; what has no value is a row of the table that `finish` writes, and no point.

        What has no context is a line of the summary (a baseline, a harness's task), and so is a length that is scored in
        another way than windows that follow one another. Loss by position is a curve of its own, against the index.
        """
        new: dict[tuple[str, int], dict[str, Measurement]] = {}
        for m in measurements:
            if m.context is not None and not set(WAY_AXES) & m.axes.keys():
                new.setdefault((str(m.axes.get("run", "")), m.context), {})[_name(m)] = m
            elif m.value is not None and "from" in m.axes:
                self._define(_name(m), step_metric="index", step_sync=False, summary="none")
                self._log({"index": m.axes["to"], _name(m): m.value})
            elif m.value is not None:
                self._try(functools.partial(self._run.summary.update, {_name(m): m.value}))
        for (whose, context), row in sorted(new.items()):
            self._lengths.setdefault((whose, context), {}).update(row)
            values: dict[str, Any] = {name: m.value for name, m in row.items() if m.value is not None}
            if values:
                for name in values:
                    # No automatic summary: the last context logged is not the one that sums a run up.
                    self._define(name, step_metric="context", step_sync=False, summary="none")
                self._log({"context": context, **values})
            if context == self._record.config.get("context"):
                self._try(functools.partial(self._run.summary.update, values))

    def image(self, name: str, path: Path) -> None:
        """A figure."""
        self._try(lambda: self._run.log({name: self._wandb.Image(str(path))}))

    def finish(self, exit_code: int) -> None:
        """Writes the table of lengths and ends the W&B run with the exit code of the process."""
        try:
            if self._lengths:
                self._try(lambda: self._run.log({"lengths": self._table()}))
            self._try(lambda: self._run.finish(exit_code=exit_code), again=True)
        finally:
            self._environment.close()

    def _start(
        self,
        run: Run,
        *,
        mode: Literal["online", "offline"],
        project: str,
        entity: str | None,
        group: str | None,
        job_type: str,
    ) -> Any:
        import wandb

        self._wandb = wandb
        # Said before init, so that the sign-in is silent too.
        wandb.setup(settings=wandb.Settings(silent=True))
        if mode == "online":
            require_key(wandb)
        timeouts = {name: value for name, value in _TIMEOUTS.items() if f"WANDB_{name.upper()}" not in os.environ}

        def init(mode: Literal["online", "offline"]) -> Any:
            return wandb.init(
                id=self._record.id,
                name=self._record.id,
                resume="allow" if mode == "online" else None,
                mode=mode,
                project=project,
                entity=entity,
                group=group,
                job_type=job_type,
                tags=list(self._record.tags) or None,
                notes=self._record.note or None,
                config=_config(self._record.config),
                dir=str(run.path.resolve()),  # its helper was started in whatever folder the first run was
                reinit="finish_previous",
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    disable_git=True,
                    x_transaction_log_flush_interval=1.0,
                    x_stats_sampling_interval=15.0,
                    **timeouts,
                ),
            )

        try:
            return init(mode)
        except wandb.Error as error:
            if mode != "online":
                raise
            reason = str(error).partition("\n")[0]
            if not _UNREACHABLE.search(str(error)):
                raise ConfigError(f"logger.mode: W&B refused the run ({reason}); use logger.mode=offline") from error
            self._warn(
                f"W&B cannot be reached ({reason}); the run is mirrored offline, "
                f"to be uploaded with: ctxlab sync {self._record.id}"
            )
            wandb.teardown()  # its helper still holds the run's id
            wandb.setup(settings=wandb.Settings(silent=True))
            return init("offline")

    def _define(self, name: str, **how: Any) -> None:
        if name not in self._defined:
            self._defined.add(name)
            self._try(lambda: self._run.define_metric(name, **how))

    def _log(self, values: dict[str, Any]) -> None:
        self._try(lambda: self._run.log(values))

    def _table(self) -> Any:
        names = sorted({name for row in self._lengths.values() for name in row})
        table = self._wandb.Table(columns=["context", *names, "status"])
        for (_, context), row in sorted(self._lengths.items(), key=lambda entry: (entry[0][1], entry[0][0])):
            missing = sorted({f"{m.status}: {m.reason}".removesuffix(": ") for m in row.values() if m.value is None})
            table.add_data(context, *(row[n].value if n in row else None for n in names), "; ".join(missing) or "done")
        return table

    def _try(self, mirror: Callable[[], Any], *, again: bool = False) -> None:
        """A mirror that breaks (its process was killed, say) is said once and left alone from then on."""
        if self._broken and not again:
            return
        try:
            mirror()
        except Exception as error:  # whatever wandb raises, training is not to die of it
            if not self._broken:
                reason = str(error).partition("\n")[0]
                self._warn(f"W&B stopped mirroring ({type(error).__name__}: {reason}); the run's own record goes on")
            self._broken = True


def _name(m: Measurement) -> str:
    """`eval/nats_per_token`, `eval/mqar/accuracy`, `baseline/ngram/...`, `lm_eval/TASK/METRIC`, `sliding/CONTEXT/STRIDE/...`,
    `streaming/CONTEXT/SINKS/...`, each with `bos/` where it comes first, `position/...`, with the run's id before the metric
    where one record measures several runs.
    """
    whose = f"{m.axes['run']}/" if "run" in m.axes else ""
    if m.context is not None and set(WAY_AXES) & m.axes.keys():
        kind = "streaming" if "sinks" in m.axes else "sliding" if "stride" in m.axes else "eval"
        details = [str(m.axes[axis]) for axis in ("stride", "sinks") if axis in m.axes] + ["bos"] * ("bos" in m.axes)
        return f"{kind}/{m.context}/{'/'.join(details)}/{whose}{m.name}"
    for axis in ("part", "of", "change"):  # of what a step costs
        if axis in m.axes:
            return f"scaling/{m.name}/{whose}{str(m.axes[axis]).replace(' ', ',')}"
    if "from" in m.axes:
        return f"position/{whose}{m.name}"
    if "top" in m.axes:
        return f"eval/{m.axes['top']:g}/{whose}{m.name}"
    if "task" in m.axes:
        depth = f"{m.axes['depth']:.0%}/" if "depth" in m.axes else ""
        return f"{_heading(m.name)}/{m.axes['task']}/{depth}{whose}{m.name}"
    if "baseline" in m.axes:
        return f"baseline/{m.axes['baseline']}/{whose}{m.name}"
    if "harness" in m.axes:
        filtered = m.axes["filter"]
        metric = m.axes["metric"] + ("" if filtered == "none" else f"/{filtered}")
        return f"lm_eval/{m.axes['harness']}/{whose}{metric}"
    return f"{_heading(m.name)}/{whose}{m.name}"


def _heading(name: str) -> str:
    return "scaling" if name in _COSTS else "eval"


def _environment(folder: Path, mode: str) -> dict[str, str]:
    """Where wandb keeps the files that are on their way up; and no reports on itself from an offline run.

    (It sends those, offline too, to whatever host it knows: seen as a name look-up at the end of a run.)
    """
    here = {"WANDB_DATA_DIR": str(folder / "data"), "WANDB_CACHE_DIR": str(folder / "cache")}
    return here if mode == "online" else here | {"WANDB_ERROR_REPORTING": "false"}


@contextlib.contextmanager
def _defaults(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while, those left alone that the user has set."""
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def require_key(wandb: Any) -> None:
    """Online needs a key, and wandb would ask for one at the terminal: say so before anything starts."""
    from wandb.sdk.lib import wbauth

    host = wandb.setup().settings.base_url
    try:
        found = wbauth.authenticate_session(host=host, source="ctxlab", prompt=False)
    except wandb.Error as error:
        raise ConfigError(f"logger.mode: {str(error).splitlines()[0]}; use logger.mode=offline") from error
    if found is None:
        raise ConfigError(
            "logger.mode: online needs an API key (WANDB_API_KEY, or `wandb login`); use logger.mode=offline"
        )


def _config(config: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps({k: v for k, v in config.items() if k not in _CONFIG_NOISE}))
    return plain
