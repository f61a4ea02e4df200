"""`ctxlab eval`: recorded runs, evaluated again, side by side. The record is a new one whose parent is the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ctxlab.cli.main import DONE
from ctxlab.cli.mirror import Recording, recording
from ctxlab.cli.scoring import measure_cost, memory_source, prepare_data, score, step_point, training_corpora
from ctxlab.data.source import SOURCES
from ctxlab.evaluation.perplexity import auto_lengths
from ctxlab.evaluation.reach import TokenNats, relative_effective_context
from ctxlab.model.attention import native
from ctxlab.model.base import architecture_of, read_parts
from ctxlab.records.provenance import collect
from ctxlab.records.schema import DocumentSums
from ctxlab.records.store import Run
from ctxlab.report.query import as_json
from ctxlab.report.tables import show_evaluation
from ctxlab.train.checkpoint import open_run
from ctxlab.train.objectives.base import OBJECTIVES
from ctxlab.train.optim.base import OPTIMIZERS
from ctxlab.train.precision import Precision, precision_of_runs, resolve_device
from ctxlab.train.settings import TrainerConfig

if TYPE_CHECKING:
    import torch

    from ctxlab.cli.invocation import Invocation
    from ctxlab.config.schema import EvalConfig, Evaluations


def run(config: EvalConfig, run: Run, invocation: Invocation) -> int:
    """Evaluates each run of the config and prints the table: of one run, or of all side by side."""
    device = resolve_device(config.trainer.accelerator)
    parents = [invocation.store.open(run_id) for run_id in config.run]
    precision = precision_of_runs(config.trainer.precision, device, [p.record.provenance.precision for p in parents])
    evaluations = same_lengths(config.eval, parents)
    for parent in parents:  # before anything is scored
        config.profile.generates(architecture_of(parent.record.config["model"]))
    with recording(run, config.logger, job_type="eval") as opened:
        facts = {}
        nats = {parent.id: TokenNats() for parent in parents} if len(parents) > 1 else {}
        first: tuple[str, Sequence[DocumentSums]] | None = None
        for parent in parents:
            facts[parent.id], sums = _evaluate(
                config, evaluations, parent, nats.get(parent.id), first, run, opened, invocation, device, precision
            )
            first = first or (parent.id, sums)
        if all(found == facts[parents[0].id] for found in facts.values()):  # the same text and tokenizer
            opened.sink.measure(relative_effective_context(nats, split="test"))
        run.update(
            provenance=collect(
                seed=config.seed,
                data=facts if len(parents) > 1 else facts[parents[0].id],
                precision=precision,
                device=device.type,
                memory_source=memory_source(device),
                resolved={"attention_kernel": native.ran()} if native.ran() else {},
                plugins=run.record.plugins,
            )
        )
        run.finish("done")
    if invocation.as_json:
        print(as_json([run]))
    elif not invocation.is_child:
        show_evaluation(run, parents, invocation.stdout_console)
    return DONE


def _evaluate(
    config: EvalConfig,
    evaluations: Evaluations,
    parent: Run,
    keep: TokenNats | None,
    against: tuple[str, Sequence[DocumentSums]] | None,
    run: Run,
    opened: Recording,
    invocation: Invocation,
    device: torch.device,
    precision: Precision,
) -> tuple[dict[str, Any], Sequence[DocumentSums]]:
    """Scores one run, of several if there is something to `keep`, into the record; returns what that says of its text, and
    its sums by document."""
    axes = {} if keep is None else {"run": parent.id}
    recorded = parent.record.config
    attention = None if config.attention == "none" else config.attention.model_dump(mode="json")
    loaded = open_run(parent, checkpoint=config.checkpoint, device=device, attention=attention)
    data = SOURCES.config(recorded["data"]) if config.data == "none" else config.data
    dataset = prepare_data(data, loaded.tokenizers, config.paths.cache, invocation.stderr_console)
    sums = score(
        loaded.model, dataset, evaluations,
        context=loaded.context, device=device, precision=precision, seed=config.seed,
        run=run, sink=opened.sink, console=invocation.stderr_console, axes=axes, keep=keep, against=against,
        objective_config=OBJECTIVES.config(recorded.get("objective", {"name": "causal"})),
        learned=training_corpora(parent, invocation.store), facts=parent.record.provenance.data,
    )  # fmt: skip
    parts = read_parts(recorded if attention is None else {**recorded, "attention": attention})
    trained = SimpleNamespace(
        **parts._asdict(),
        optim=OPTIMIZERS.config(recorded["optim"]),
        trainer=TrainerConfig.model_validate_json(json.dumps(recorded["trainer"])),
        context=loaded.context,
    )
    point = step_point(
        trained, vocab_size=loaded.tokenizer.vocab_size, source_vocab_size=loaded.tokenizers.source.vocab_size,
        precision=precision, device=device,
    )  # fmt: skip
    measure_cost(
        config.profile, point, evaluations, sink=opened.sink, console=invocation.stderr_console, axes=axes
    )  # fmt: skip
    return dataset.facts, sums


def same_lengths(evaluations: Evaluations, parents: list[Run]) -> Evaluations:
    """Several runs are scored at the same lengths, over segments of the same length: those that any of them asks for."""
    if len(parents) == 1:
        return evaluations
    lengths = tuple(sorted({n for parent in parents for n in auto_lengths(parent.record.config["context"])}))
    parts = {name: getattr(evaluations, name) for name in type(evaluations).model_fields}
    return evaluations.model_copy(
        update={
            name: part.model_copy(update={"lengths": lengths})
            for name, part in parts.items()
            if getattr(part, "lengths", None) == "auto"
        }
    )
