"""What `train` and `eval` share: text for a run, its perplexity at many lengths, the cost of each length, the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.text import Text

from ctxlab.cli.console import progress_bar
from ctxlab.data.corpora.base import Corpus
from ctxlab.data.labelled.classification import Classification
from ctxlab.data.labelled.questions import QuestionDataset, prepare_questions
from ctxlab.data.labelled.squad import Squad
from ctxlab.data.labelled.texts import LabelDataset, prepare_texts
from ctxlab.data.pairs.dataset import PairDataset, prepare_pairs
from ctxlab.data.pairs.parallel import Parallel
from ctxlab.data.prepare import TextDataset, prepare
from ctxlab.data.source import SOURCES, Source
from ctxlab.data.tasks.base import Task, TextTask, haystack_corpus
from ctxlab.data.tasks.dataset import TaskDataset, prepare_task
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.sides import Tokenizers
from ctxlab.errors import IncompatibleError, RecordError
from ctxlab.evaluation.classification import ClassificationConfig, evaluate_classification
from ctxlab.evaluation.harness import HarnessConfig, evaluate_harness
from ctxlab.evaluation.ngram import BASELINE, NGramConfig, evaluate_ngram
from ctxlab.evaluation.objective import HeldOutConfig, evaluate_objective
from ctxlab.evaluation.perplexity import (
    DocumentScores,
    PerplexityConfig,
    asked_segments,
    auto_lengths,
    compared,
    evaluate_perplexity,
)
from ctxlab.evaluation.qa import QAConfig, evaluate_qa
from ctxlab.evaluation.reach import TokenNats
from ctxlab.evaluation.tasks import asked_tasks, evaluate_task
from ctxlab.evaluation.translation import TranslationConfig, evaluate_translation
from ctxlab.model.base import Model, architecture_of
from ctxlab.model.offload import require_elsewhere
from ctxlab.profiling.measure import MeasureConfig, Point, measure_generation, measure_step
from ctxlab.profiling.trace import count_weights
from ctxlab.records.schema import DocumentSums, Measurement, TaskItem
from ctxlab.records.sinks import Sink
from ctxlab.records.store import Run, RunStore
from ctxlab.report.task_tables import save_task_maps
from ctxlab.train.loop import Dataset
from ctxlab.train.lora import TASK_HEAD
from ctxlab.train.memory import peak_memory_bytes, total_memory_bytes
from ctxlab.train.objectives.base import OBJECTIVES, Objective
from ctxlab.train.objectives.causal import Causal
from ctxlab.train.objectives.windows import Denoising
from ctxlab.train.precision import Precision

if TYPE_CHECKING:
    from ctxlab.config.schema import Evaluations


_CAUSAL = Causal.Config()


def prepare_data(
    data: Source.Config, tokenizers: Tokenizer.Config | Tokenizers, cache: str, console: Console
) -> Dataset:
    """What a run reads and its tokens, from the cache or made now with a bar on `console`; or a task with what it speaks."""
    folder = None if cache == "auto" else Path(cache).expanduser()
    with progress_bar(console) as start:
        if isinstance(data, Parallel.Config):
            return prepare_pairs(data, tokenizers, cache=folder, progress=start)
        if isinstance(data, Squad.Config):
            return prepare_questions(data, tokenizers, cache=folder, progress=start)
        if isinstance(data, Classification.Config):
            return prepare_texts(data, tokenizers, cache=folder, progress=start)
        tokenizer = tokenizers.target if isinstance(tokenizers, Tokenizers) else tokenizers
        if isinstance(data, Task.Config):
            return prepare_task(data, tokenizer, cache=folder, progress=start)
        return prepare(data, tokenizer, cache=folder, progress=start)


def training_corpora(run: Run, store: RunStore) -> tuple[Corpus.Config, ...]:
    """The corpora whose text the weights of a run have seen: its own, and those of the runs that it started from.

    A task that hides things in a text counts as that text. Runs that are gone cannot be asked.
    """
    found: list[Corpus.Config] = []
    while True:
        data = SOURCES.config(run.record.config["data"])
        if isinstance(data, TextTask.Config):
            data = haystack_corpus(data.haystack).config
        if isinstance(data, Corpus.Config):
            found.append(data)
        parent = run.record.config.get("init", "none")
        if parent == "none":
            return tuple(found)
        try:
            run = store.open(parent)
        except RecordError:
            return tuple(found)


def score(
    model: Model,
    dataset: Dataset,
    evaluations: Evaluations,
    *,
    context: int,
    device: torch.device,
    precision: Precision,
    seed: int,
    run: Run,
    sink: Sink,
    console: Console,
    axes: Mapping[str, str] = MappingProxyType({}),
    keep: TokenNats | None = None,
    against: tuple[str, Sequence[DocumentSums]] | None = None,
    objective_config: Objective.Config = _CAUSAL,
    learned: tuple[Corpus.Config, ...] = (),
    facts: Mapping[str, Any] = MappingProxyType({}),
    untuned: Model | None = None,
) -> Sequence[DocumentSums]:
    """Every evaluation of the config, into the record. `axes` tell several runs of one evaluation apart.

    `keep` takes the nats of single targets, for what can only be said of several runs. `against` is the run that this one is
    compared with in pairs, and its sums by document; returned are this one's. `learned` are the corpora that the model was
    trained on (`training_corpora`), `facts` those of the data it was trained on last, `untuned` is the model as it was before.
    """
    documents: dict[int, DocumentScores] = {}
    sums: Sequence[DocumentSums] = ()
    if model.task_head is not None and not isinstance(dataset, QuestionDataset | LabelDataset):
        raise IncompatibleError(
            f"data: objective={objective_config.name} chooses among labels or places and models no text; leave data out"
        )
    if isinstance(dataset, PairDataset):
        if isinstance(evaluations.translation, TranslationConfig):
            with progress_bar(console) as start:
                rows, items = evaluate_translation(
                    model, dataset, evaluations.translation, device=device, precision=precision, progress=start
                )
            sink.measure(along(rows, axes))
            run.write_items([item.model_copy(update={"axes": dict(axes)}) for item in items])
        return sums
    objective = OBJECTIVES.get(objective_config.name)(objective_config)
    if isinstance(dataset, QuestionDataset | LabelDataset):
        rows, items = score_labelled(
            model, dataset, objective, evaluations, context=context, device=device, precision=precision, console=console,
            learned=facts, untuned=untuned,
        )  # fmt: skip
        sink.measure(along(rows, axes))
        run.write_items([item.model_copy(update={"axes": {**axes, **item.axes}}) for item in items])
        return sums
    if isinstance(objective, Denoising):
        if isinstance(evaluations.objective, HeldOutConfig) and isinstance(dataset, TextDataset):
            with progress_bar(console) as start:
                rows = evaluate_objective(
                    model, dataset, objective, evaluations.objective,
                    context=context, device=device, precision=precision, progress=start,
                )  # fmt: skip
            sink.measure(along(rows, axes))
        if not objective.continues:
            return sums
    score_tasks(
        model, dataset, evaluations,
        context=context, device=device, precision=precision, run=run, sink=sink, console=console, axes=axes,
        learned=learned,
    )  # fmt: skip
    if isinstance(evaluations.lm_eval, HarnessConfig):
        with progress_bar(console) as start:
            for found in evaluate_harness(
                model, dataset.tokenizer, evaluations.lm_eval,
                trained_context=context, device=device, precision=precision, seed=seed, progress=start,
            ):  # fmt: skip
                sink.measure(along(found, axes))
    if isinstance(dataset, TaskDataset):
        return sums  # no text to be modelled
    if isinstance(evaluations.perplexity, PerplexityConfig):
        with progress_bar(console) as start:
            measurements, documents, sums = evaluate_perplexity(
                model, dataset, evaluations.perplexity,
                trained_context=context, device=device, precision=precision, progress=start, keep=keep,
            )  # fmt: skip
        if against is not None:
            measurements = compared(measurements, sums, *against)
        sink.measure(along(measurements, axes))
        run.add_documents(*(row.model_copy(update={"axes": {**axes, **row.axes}}) for row in sums))
    if isinstance(evaluations.ngram, NGramConfig):
        cut = evaluations.perplexity if isinstance(evaluations.perplexity, PerplexityConfig) else PerplexityConfig()
        _, segments = asked_segments(cut, dataset, context)
        if segments is None:
            return sums
        with progress_bar(console) as start:
            advance = start("counting n-grams", segments.n * segments.length)
            rows, counted = evaluate_ngram(
                dataset, evaluations.ngram, segments,
                against=documents.get(context), context=context, advance=advance,
            )  # fmt: skip
        sink.measure(along(rows, axes))
        run.write_documents({context: counted}, axes={**axes, "baseline": BASELINE})
    return sums


def score_labelled(
    model: Model,
    dataset: QuestionDataset | LabelDataset,
    objective: Objective,
    evaluations: Evaluations,
    *,
    console: Console,
    untuned: Model | None,
    **how: Any,
) -> tuple[list[Measurement], list[TaskItem]]:
    """What the evaluation that goes with the data has found; nothing where none is asked for.

    Raises IncompatibleError where the objective of the model reads no such data.
    """
    kind: type[Source] = Squad if isinstance(dataset, QuestionDataset) else Classification
    if reason := objective.why_not(kind):
        raise IncompatibleError(
            f"data: objective={objective.config.name} does not go with data={dataset.facts['corpus']}: {reason}"
        )
    with progress_bar(console) as start:
        if isinstance(dataset, LabelDataset):
            if isinstance(evaluations.classification, ClassificationConfig):
                return evaluate_classification(
                    model, dataset, objective, evaluations.classification, progress=start, **how
                )
        elif isinstance(evaluations.qa, QAConfig):
            return evaluate_qa(model, dataset, objective, evaluations.qa, untuned=untuned, progress=start, **how)
    return [], []


def score_tasks(
    model: Model,
    dataset: TextDataset | TaskDataset,
    evaluations: Evaluations,
    *,
    context: int,
    device: torch.device,
    precision: Precision,
    run: Run,
    sink: Sink,
    console: Console,
    axes: Mapping[str, str],
    learned: tuple[Corpus.Config, ...],
) -> None:
    """Every task of the config, into the record, with a picture where depths were asked."""
    named = {name: getattr(evaluations, name) for name in ("needle", "passkey", "ruler")}
    asked = asked_tasks(
        dataset,
        own=None if evaluations.task == "none" else evaluations.task,
        named={name: config for name, config in named.items() if config != "none"},
        learned=learned,
    )
    for task, config in asked:
        with progress_bar(console) as start:
            rows, items = evaluate_task(
                model, task, config, trained_context=context, device=device, precision=precision, progress=start
            )
        sink.measure(along(rows, axes))
        run.write_items([item.model_copy(update={"axes": dict(axes)}) for item in items])
    picture = save_task_maps([run], run.path / "answers_by_depth.png")
    if picture is not None:
        sink.image("answers_by_depth", picture)


def measure_cost(
    config: MeasureConfig,
    point: Point,
    evaluations: Evaluations | None,
    *,
    sink: Sink,
    console: Console,
    axes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Memory and time of one training step at each context, each in processes of its own, into the record.

    Raises IncompatibleError where generation is asked of a model that writes no text.
    """
    contexts = cost_contexts(config, point.context, evaluations)
    if not contexts:
        return
    architecture = architecture_of(point.model)
    generates = config.generates(architecture)
    if config.generation == "auto" and not generates:
        console.print(Text(f"generation is not measured: {architecture} writes no text", style="dim"), soft_wrap=True)
    limited = replace(point, memory_limit=None if config.memory == "none" else config.memory)
    with progress_bar(console) as start:
        advance = start("measuring memory and time of a step", (3 if generates else 2) * len(contexts))
        rows = measure_step(limited, contexts, timeout=config.timeout, advance=lambda _: advance(1))
        if generates:
            rows += measure_generation(limited, contexts, timeout=config.timeout, advance=lambda _: advance(1))
    sink.measure(along(rows, axes))


def along(measurements: Sequence[Measurement], axes: Mapping[str, str]) -> list[Measurement]:
    """The measurements with further axes."""
    return [m.model_copy(update={"axes": {**m.axes, **axes}}) for m in measurements]


def cost_contexts(config: MeasureConfig, context: int, evaluations: Evaluations | None) -> tuple[int, ...]:
    """The contexts whose cost is measured: those given, or the lengths of the evaluation."""
    if config.contexts == "none":
        return ()
    if config.contexts != "auto":
        return tuple(sorted(set(config.contexts)))
    perplexity = evaluations.perplexity if evaluations is not None else "none"
    if isinstance(perplexity, PerplexityConfig) and perplexity.lengths != "auto":
        return tuple(sorted(set(perplexity.lengths)))
    return auto_lengths(context)


def step_point(
    config: Any,
    *,
    vocab_size: int,
    precision: Precision,
    device: torch.device,
    memory: int | None = None,
    source_vocab_size: int | None = None,
    counted: bool = False,
) -> Point:
    """The training step that a config describes, without the head of a task; `memory` is what the device has, where it need not
    be asked.

    counted: the weights that are trained, where these are not all, which raises ConfigError where what is frozen has no such
    name; under recompute=auto they always are.
    """
    trainer = config.trainer
    require_elsewhere(trainer.offload, device)
    point = Point(
        model=config.model.model_dump(mode="json"),
        position=_plain(config.position),
        attention=_plain(config.attention),
        optim=config.optim.model_dump(mode="json"),
        vocab_size=vocab_size,
        source_vocab_size=source_vocab_size,
        context=config.context,
        precision=precision,
        device=device.type,
        recompute=trainer.recompute,
        offload=trainer.offload,
        update=trainer.update,
        loss_chunk=None if trainer.loss_chunk == "auto" else trainer.loss_chunk,
        freeze=tuple(name for name in trainer.freeze if not name.startswith(TASK_HEAD.rstrip("."))),
        memory=memory or total_memory_bytes(device),
        micro_batch=trainer.micro_batch,
        step_tokens=trainer.batch_tokens // trainer.devices,
    )
    if not (counted or trainer.recompute == "auto") or (not point.freeze):
        return point
    return replace(point, counted=count_weights(replace(point, recompute="none")))


def step_facts(point: Point, context: int) -> dict[str, Any]:
    """What settings became, for the record: the policy at this context, and the weights that are trained where they are fewer."""
    facts: dict[str, Any] = {"recompute": point.at(context).recompute}
    return facts if point.counted is None else {**facts, "trained_parameters": point.counted[1]}


def _plain(part: Any) -> Any:
    """A part's settings as they go to another process; `none` stays the word."""
    return part if part == "none" else part.model_dump(mode="json")


def memory_source(device: torch.device) -> str:
    return peak_memory_bytes(device)[1]
