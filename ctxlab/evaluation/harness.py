"""Tasks that nobody here wrote: EleutherAI's lm-evaluation-harness asks, a run answers, the record keeps the scores.

The library (optional: `pip install 'ctxlab[lm-eval]'`) is imported inside functions. It brings the tasks' texts, prompts,
few-shot examples and metrics; likelihoods and answers are ours (`harness_model.py`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import numbers
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from pydantic import Field

from ctxlab.data.progress import Progress, silent
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.errors import ConfigError, CtxlabError, UndefinedBeyondTraining
from ctxlab.evaluation.intervals import ratio_interval
from ctxlab.fields import Count, Length, OrAuto, OrNone
from ctxlab.model.base import Model
from ctxlab.records.schema import METRICS, Measurement
from ctxlab.registry import ComponentConfig
from ctxlab.train.precision import Precision

if TYPE_CHECKING:
    from ctxlab.evaluation.harness_model import HarnessModel

INSTALL = "eval.lm_eval: needs lm-eval; pip install 'ctxlab[lm-eval]'"

# The harness's metrics that are ours, with what they are per. Its other names are free: they are `score`, and so are bleu and
# chrf, which come on two scales there. `perplexity` is exp of the mean nats of an answer, however many tokens it has.
_OURS: dict[str, tuple[str, str | None]] = {
    "acc": ("accuracy", None), "acc_norm": ("accuracy", None), "acc_bytes": ("accuracy", None),
    "exact_match": ("accuracy", None), "perplexity": ("perplexity", "answer"),
    "word_perplexity": ("perplexity", "word"), "byte_perplexity": ("perplexity", "byte"),
    "bits_per_byte": ("bits_per_byte", "byte"),
}  # fmt: skip
# Ratios of sums over documents, for which the harness has no standard error: what becomes of nats per unit.
_RATIOS = {
    "word_perplexity": math.exp, "byte_perplexity": math.exp, "bits_per_byte": lambda nats: nats / math.log(2),
}  # fmt: skip
_Z = 1.96  # standard errors to each side of a 95% interval
_RESAMPLES = 1000  # of a bootstrap, where a metric's standard error has no formula
# The harness's own seeds: few-shot examples are those of the numbers that others publish.
_SEED, _OTHER_SEED = 0, 1234
_ONE_PROCESS = "DISABLE_MULTIPROC"  # of the harness's bootstrap


class HarnessConfig(ComponentConfig):
    """Which tasks, on how much of them, with how long a context."""

    tasks: tuple[str, ...] = Field(min_length=1, description="tasks, groups or tags, by the harness's names")
    include_path: OrNone | str = Field("none", description="a folder with task YAMLs of one's own")
    num_fewshot: OrAuto | Annotated[int, Field(ge=0)] = Field(
        "auto", description="solved examples before each item; auto: as many as the task says"
    )
    limit: OrNone | Count = Field("none", description="items of each task, its first ones; none: all")
    max_length: OrAuto | Length = Field("auto", description="tokens of a request; auto: the trained context")
    batch_tokens: int = Field(16_384, ge=1, json_schema_extra={"identity": False})


def check_harness(config: HarnessConfig, progress: Progress = silent) -> None:
    """Raises ConfigError where the library is not installed, and for each task that neither it nor the folder has."""
    if config.include_path != "none":
        _check_folder(Path(config.include_path).expanduser())
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise ConfigError(INSTALL + ("" if error.name == "lm_eval" else f" ({error})")) from error
    if not hasattr(lm_eval.tasks.TaskManager, "load"):
        raise ConfigError(f"{INSTALL} (this is {_version()})")
    advance = progress("eval.lm_eval: looking the tasks up", 1)
    known = _manager(config).all_tasks
    advance(1)
    wrong = [_no_task(name, known, config) for name in config.tasks if name not in known]
    if wrong:
        raise ConfigError("\n".join(wrong))


def _check_folder(folder: Path) -> None:
    """The harness passes over a YAML that it cannot read: its tasks would seem not to exist."""
    if not folder.is_dir():
        raise ConfigError(f"eval.lm_eval.include_path: there is no folder {folder}")
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise ConfigError(f"eval.lm_eval.include_path: {path}{line}: not valid YAML: {error.problem}") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"eval.lm_eval.include_path: {path} cannot be read: {error}") from error


def _no_task(name: str, known: Sequence[str], config: HarnessConfig) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    end = f"; did you mean '{close[0]}'?" if close else "; `lm-eval ls tasks` lists those that there are"
    if config.include_path == "none":
        return f"eval.lm_eval.tasks: the harness has no task '{name}'{end}"
    return f"eval.lm_eval.tasks: neither the harness nor {config.include_path} has a task '{name}'{end}"


def _manager(config: HarnessConfig) -> Any:
    """The harness's list of tasks, with those of the user's folder. That folder alone where it has all that is asked for:
    the harness's own list of 15,000 takes seconds.
    """
    folder = None if config.include_path == "none" else str(Path(config.include_path).expanduser().resolve())
    if folder is not None:
        own = _listed(folder, False)
        if set(config.tasks) <= set(own.all_subtasks):
            return own
    return _listed(folder, True)


@functools.cache
def _listed(folder: str | None, everything: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=everything)


def evaluate_harness(
    model: Model,
    tokenizer: Tokenizer,
    config: HarnessConfig,
    *,
    trained_context: int,
    device: torch.device,
    precision: Precision,
    seed: int,
    progress: Progress = silent,
) -> Iterator[list[Measurement]]:
    """The scores of each task that is asked for, as soon as they are there. `seed` is that of sampled answers.

    What a task lacks (its data cannot be fetched, say) or does wrong is a measurement without a value that says why, and the
    tasks after it are scored; what goes wrong in the model is raised.
    """
    from ctxlab.evaluation.harness_model import HarnessModel

    manager = _manager(config)
    longest = trained_context if config.max_length == "auto" else config.max_length
    was_training = model.training
    model.eval()
    seen: set[tuple[Any, ...]] = set()
    for name in dict.fromkeys(config.tasks):
        lm = HarnessModel(
            model, tokenizer, max_length=longest, device=device, precision=precision,
            batch_tokens=config.batch_tokens, seed=seed, progress=_under(name, progress),
        )  # fmt: skip
        found = _score_task(name, manager, lm, config)
        # A task may be asked for by its own name and by its group's.
        new = [m for m in found if (m.axes["harness"], m.axes.get("metric"), m.axes.get("filter")) not in seen]
        seen |= {(m.axes["harness"], m.axes.get("metric"), m.axes.get("filter")) for m in new}
        yield new
    model.train(was_training)


def _under(name: str, progress: Progress) -> Progress:
    return lambda text, total: progress(f"{name}: {text}", total)


def _score_task(name: str, manager: Any, lm: HarnessModel, config: HarnessConfig) -> list[Measurement]:
    """The rows of a task, or of the tasks of a group or tag and the group's own."""
    from lm_eval.evaluator import evaluate

    advance = lm.progress("reading its data", 1)
    with _alone():
        try:
            loaded = manager.load([name])
        except Exception as error:  # of a YAML, a task's own code, or whatever fetches data
            return [_missing(name, config, *_why(error))]
        advance(1)
        for task in loaded["tasks"].values():
            _set_fewshot(task, config)
        try:
            results = evaluate(
                lm=lm,
                task_dict=loaded,
                limit=None if config.limit == "none" else config.limit,
                bootstrap_iters=_RESAMPLES,
                log_samples=True,
            )
        except UndefinedBeyondTraining as undefined:
            return [_missing(name, config, "undefined", str(undefined))]
        except CtxlabError as refused:
            return [_missing(name, config, "failed", str(refused))]
        except Exception as error:  # of a task's own code, unless it was the model
            if lm.failed:
                raise
            return [_missing(name, config, "failed", _line(error))]
    return harness_measurements(results, config, lm)


def _set_fewshot(task: Any, config: HarnessConfig) -> None:
    """As the harness's own command does: a task that says 0 itself means it, one that says nothing has none.

    A text that is scored whole has nothing before it, though the harness would count examples there.
    """
    own = task.get_config("num_fewshot")
    shots = own or 0 if config.num_fewshot == "auto" else config.num_fewshot
    none = own == 0 or task.OUTPUT_TYPE == "loglikelihood_rolling"
    task.set_config(key="num_fewshot", value=0 if none else shots)
    task.set_fewshot_seed(seed=_OTHER_SEED)


def harness_measurements(results: Any, config: HarnessConfig, lm: HarnessModel) -> list[Measurement]:
    """The harness's results as rows: one for each task, or group, and metric and filter of it."""
    rows = []
    for name, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            rows.append(_row(name, metric, filtered, value, stderr, results, config, lm))
    return rows


def _row(
    name: str,
    metric: str,
    filtered: str,
    value: Any,
    stderr: Any,
    results: Any,
    config: HarnessConfig,
    lm: HarnessModel,
) -> Measurement:
    ours, normaliser = _OURS.get(metric, ("score", None))
    items = results["n-samples"].get(name, {}).get("effective", results["results"][name].get("sample_len"))
    facts: dict[str, Any] = {
        "harness": _version(),
        "task_version": results["versions"].get(name),
        "num_fewshot": results["n-shot"].get(name),
        "higher_is_better": results["higher_is_better"].get(name, {}).get(metric),
        "max_length": lm.max_length,
        "requests": lm.counts.requests,
        "cut_requests": lm.counts.cut,
        "shortened_answers": lm.counts.shortened,
    }
    number = float(value) if isinstance(value, numbers.Real) else None
    low = high = None
    # Items that all score alike show no spread, which is not to say that there is none.
    if number is not None and isinstance(stderr, numbers.Real) and float(stderr) > 0:
        low, high = number - _Z * float(stderr), number + _Z * float(stderr)
        facts |= {"stderr": float(stderr), "interval": f"{_Z} standard errors to each side"}
    elif number is not None and (bounds := _ratio_bounds(metric, filtered, results["samples"].get(name, ()))):
        low, high = bounds
        facts["interval"] = "ratio estimator over documents"
    return Measurement(
        name=ours,
        value=number,
        unit=METRICS[ours].unit,
        low=low,
        high=high,
        protocol=f"lm-evaluation-harness {_version()}",
        normaliser=normaliser,
        n_docs=items,
        status="failed" if number is None else "done",
        reason="" if number is not None else f"the harness gives {type(value).__name__}, not a number",
        axes=_axes(name, config) | {"metric": metric, "filter": filtered},
        facts=facts,
    )


def _ratio_bounds(metric: str, filtered: str, samples: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """The interval of a ratio of sums over documents, each of which has (ln p, words or bytes)."""
    if metric not in _RATIOS:
        return None
    pairs = [sample[metric] for sample in samples if sample["filter"] == filtered and metric in sample]
    if not all(isinstance(pair, tuple) for pair in pairs):  # of a task that means something else by the name
        return None
    bounds = ratio_interval([-ln_p for ln_p, _ in pairs], [units for _, units in pairs])
    return None if bounds is None else (_RATIOS[metric](bounds[0]), _RATIOS[metric](bounds[1]))


def _axes(name: str, config: HarnessConfig) -> dict[str, Any]:
    asked = {"num_fewshot": config.num_fewshot, "limit": config.limit}
    return {"harness": name} | {key: value for key, value in asked.items() if isinstance(value, int)}


def _missing(name: str, config: HarnessConfig, status: str, reason: str) -> Measurement:
    return Measurement(
        name="score", value=None, unit=METRICS["score"].unit, protocol=f"lm-evaluation-harness {_version()}",
        status=status, reason=reason, axes=_axes(name, config),
    )  # fmt: skip


def _why(error: Exception) -> tuple[str, str]:
    """Status and reason of a task that could not be loaded."""
    if isinstance(error, OSError):
        return "no_document", f"its data are not on this machine and could not be fetched ({_line(error)})"
    return "failed", _line(error)


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _version() -> str:
    return importlib.metadata.version("lm-eval")


@contextmanager
def _alone() -> Iterator[None]:
    """Random numbers as the harness's own command seeds them, afterwards as they were; none of its bars and prints.

    Its bootstrap stays in this process, which has threads and perhaps a GPU and is not to be forked.
    """
    import datasets
    import tqdm
    from huggingface_hub.utils import logging as hub

    datasets.disable_progress_bars()
    hub.set_verbosity_error()  # its retries, one line each
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(_SEED)
    np.random.seed(_OTHER_SEED)
    bar, multiprocess = tqdm.std.tqdm.__init__, os.environ.get(_ONE_PROCESS)
    tqdm.std.tqdm.__init__ = functools.partialmethod(bar, disable=True)
    os.environ[_ONE_PROCESS] = "1"
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        tqdm.std.tqdm.__init__ = bar
        os.environ.pop(_ONE_PROCESS)
        if multiprocess is not None:
            os.environ[_ONE_PROCESS] = multiprocess
        random.setstate(before)
        np.random.set_state(numpy_before)
