"""Which valid parts do not go together: every rule across components, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from ctxlab.config import catalog
from ctxlab.config.overrides import key_of
from ctxlab.config.schema import (
    AttentionConfig,
    CommandConfig,
    EvalConfig,
    GenerateConfig,
    PlanConfig,
    ProfileConfig,
    ShowConfig,
    TrainConfig,
)
from ctxlab.data.pairs.parallel import Parallel
from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import Task, TokenTask
from ctxlab.data.tokenizers.sides import are_apart
from ctxlab.errors import ConfigError, IncompatibleError
from ctxlab.evaluation.tasks import TaskEvaluation, ruler_names
from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.base import ARCHITECTURES, architecture_of
from ctxlab.model.config import ModelConfig, SizesConfig
from ctxlab.model.position.base import POSITIONS, Position
from ctxlab.registry import nearest
from ctxlab.train.compiling import check_compiled
from ctxlab.train.objectives.base import OBJECTIVES, objectives_of
from ctxlab.train.objectives.windows import Denoising
from ctxlab.units import format_length

PARTS = ("position", "attention")  # that a model may be composed from, besides its sizes


def leave_out(config: dict[str, Any], overrides: Sequence[str]) -> str:
    """Makes the parts that a model is not composed from `none`; says why, where one of the overrides has chosen such a part."""
    sizes = config.get("model")
    if not isinstance(sizes, dict) or architecture_of(sizes) not in ARCHITECTURES.names():
        return ""
    architecture = ARCHITECTURES.get(architecture_of(sizes))
    refused = ""
    for group in PARTS:
        if group in architecture.parts or group not in config:
            continue
        config[group] = "none"
        given = next((override for override in overrides if key_of(override).partition(".")[0] == group), None)
        if given is not None and not refused:
            refused = f"{group}: model={sizes['name']} has none (it {architecture.why_without}); leave {given} out"
    return refused


def check(config: CommandConfig) -> None:
    """Raises IncompatibleError, one line, for the first rule that a config breaks.

    What no other value would make right is a plain ConfigError: it refuses a sweep whole instead of skipping a cell.
    """
    if isinstance(config, TrainConfig | EvalConfig | ProfileConfig) and config.profile.contexts == ():
        raise ConfigError("profile.contexts: expected at least one context, or none, got []")
    if isinstance(config, PlanConfig) and config.plan.contexts == ():
        raise ConfigError("plan.contexts: expected at least one context, or auto, got []")
    if isinstance(config, GenerateConfig):
        given = [
            name for name in ("prompt", "prompt_file", "prompts_file") if getattr(config, name) not in ("", "none")
        ]
        if len(given) > 1:
            raise ConfigError(f"{given[1]}: is given beside {given[0]}; give one of them")
    if isinstance(config, AttentionConfig) and config.text and config.text_file != "none":
        raise ConfigError("text_file: is given beside text; give one of them")
    if isinstance(config, TrainConfig | ProfileConfig | PlanConfig):
        ARCHITECTURES.get(config.model.architecture).check_installed()
        ARCHITECTURES.get(config.model.architecture).check_training(
            config.model,
            packed=isinstance(config, TrainConfig) and config.data.packs,
            compiled=False,
            recompute=config.trainer.recompute,
        )
        _update(config)
        if config.trainer.compile is True:
            check_compiled(config.model, config.trainer)
    if isinstance(config, TrainConfig | ProfileConfig):
        config.profile.generates(config.model.architecture)
    if isinstance(config, ProfileConfig | PlanConfig) and config.trainer.lora.r != "none":
        raise IncompatibleError(
            f"trainer.lora.r: the step with adapters is not measured or predicted, got {config.trainer.lora.r}; use none"
        )
    if isinstance(config, TrainConfig | ProfileConfig | PlanConfig | ShowConfig):
        _scheme(config)
    if isinstance(config, TrainConfig | EvalConfig):
        _lengths(config)
    if isinstance(config, TrainConfig):
        _objective(config)
        _separate(config)
    if isinstance(config, TrainConfig | EvalConfig):
        _tasks(config)
    if isinstance(config, TrainConfig):
        if config.attention != "none":
            contexts = [config.context, *(stage.context for stage in config.trainer.context_schedule)]
            mechanism = ATTENTIONS.get(config.attention.name)
            mechanism.check_training(config.attention, contexts=contexts, packed=config.data.packs)
        _budget(config)
        _curriculum(config)
        if config.trainer.lora.r != "none" and config.init == "none":
            raise IncompatibleError("trainer.lora.r: adapters are trained on the weights of another run; add init=RUN")
        if config.checkpoint != "last" and config.init == "none":
            raise IncompatibleError("checkpoint: says which weights of another run to start from; add init=RUN")


def _update(config: TrainConfig | ProfileConfig | PlanConfig) -> None:
    """What is updated within the backward pass has never seen the whole gradient."""
    if config.trainer.update == "step":
        return
    if config.optim.clip > 0:
        raise IncompatibleError(
            f"optim.clip: {config.optim.clip:g} is a norm of the whole gradient, which trainer.update=backward never holds; "
            "use optim.clip=0"
        )
    if config.trainer.devices > 1:
        raise IncompatibleError(
            f"trainer.update: {config.trainer.devices} processes add up their gradients behind the backward pass; use step"
        )


def _objective(config: TrainConfig) -> None:
    """An objective trains some architectures, on some kinds of data."""
    objective, architecture = OBJECTIVES.get(config.objective.name), config.model.architecture
    data = SOURCES.get(config.data.name)
    reason = objective.why_not(data)
    if architecture not in objective.architectures:
        instead = [f"objective={name}" for name in objectives_of(architecture, data)]
        if not reason and config.init == "none":  # the weights of another run are of its architecture
            instead += [_model_of(architecture, config.model) for architecture in objective.architectures]
        if instead or not reason:
            raise IncompatibleError(
                f"objective: {config.objective.name} trains model.architecture={' or '.join(objective.architectures)}, not "
                f"{architecture}{f'; use {_either(instead)}' if instead else ''}"
            )
    if reason:
        raise IncompatibleError(
            f"objective: {config.objective.name} does not go with data={config.data.name}: {reason}"
        )
    denoising = issubclass(objective, Denoising)
    asked = [part for part, settings in config.eval if settings != "none" and part != "objective"]
    if issubclass(objective, Denoising) and asked and not objective.continues:
        raise IncompatibleError(
            f"eval.{asked[0]}: objective={config.objective.name} trains no model of what comes next; use eval=objective"
        )
    if not denoising and config.eval.objective != "none":
        raise IncompatibleError(f"eval.objective: {config.objective.name} is scored by perplexity; use eval=perplexity")
    if denoising and config.data.packs:
        raise IncompatibleError(f"data.packed: {config.objective.name} makes its rows of one document each; use false")
    if objective.prefix:
        _prefix(config)
    if SOURCES.get(config.data.name).scored_by and config.trainer.context_schedule:
        raise IncompatibleError(
            f"trainer.context_schedule: the examples of {config.data.name} are as long as they are; leave the schedule out"
        )


def _model_of(architecture: str, instead_of: SizesConfig) -> str:
    """What chooses a model of an architecture: the same sizes where they leave it open, else an option that has it."""
    if architecture not in get_args(ModelConfig.model_fields["architecture"].annotation):
        return f"model={architecture}"
    chosen = f"model.architecture={architecture}"
    if isinstance(instead_of, ModelConfig):
        return chosen
    return f"{next(f'model={default.option}' for default in catalog.defaults('train') if default.group == 'model')} {chosen}"


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _prefix(config: TrainConfig) -> None:
    """A prefix is read both ways, as an encoder reads."""
    if isinstance(config.position, Position.Config) and not POSITIONS.get(config.position.name).bidirectional:
        fitting = [name for name in POSITIONS.names() if POSITIONS.get(name).bidirectional]
        raise IncompatibleError(
            f"position.name: {config.position.name} tells no order without a causal mask, and objective="
            f"{config.objective.name} has none within the prefix; use {_either(fitting)}"
        )
    if config.attention != "none" and ATTENTIONS.get(config.attention.name).carried_tokens(config.attention):
        raise IncompatibleError(
            f"attention.name: {config.attention.name} attention carries a memory from row to row, and a row of objective="
            f"{config.objective.name} begins with its prefix; use full or sliding_window"
        )


def _separate(config: TrainConfig) -> None:
    """Tokens of their own are for sources that somebody else's matrix does not have to embed."""
    if not are_apart(config.tokenizer.model_dump()):
        return
    if not isinstance(config.data, Parallel.Config):
        raise IncompatibleError(
            f"tokenizer.separate: {config.data.name} has no sources and targets; use data=parallel data.path=FILE, or false"
        )
    if not ARCHITECTURES.get(config.model.architecture).reads_source:
        raise IncompatibleError(
            f"tokenizer.separate: {config.model.architecture} reads source and target as one text; use false"
        )
    if isinstance(config.model, ModelConfig) and config.model.share_embeddings:
        raise IncompatibleError(
            "model.share_embeddings: source and target have tokens of their own (tokenizer.separate=true), which one matrix "
            "cannot embed; use false"
        )


def _tasks(config: TrainConfig | EvalConfig) -> None:
    """Tasks in numbers and text do not mix; what is modelled as text has to be text."""
    for part, settings in config.eval:
        if isinstance(settings, TaskEvaluation) and settings.lengths == ():
            raise ConfigError(f"eval.{part}.lengths: expected at least one length, or auto, got []")
    names = config.eval.ruler.tasks if config.eval.ruler != "none" else "auto"
    for name in () if names == "auto" else names:
        if name not in ruler_names():
            raise ConfigError(f"eval.ruler.tasks: RULER has no task '{name}'{nearest(name, ruler_names())}")
    data = config.data
    if data == "none":
        return
    kind = SOURCES.get(data.name)
    is_task, in_numbers = issubclass(kind, Task), issubclass(kind, TokenTask)
    asked = [part for part, settings in config.eval if settings != "none"]
    for part in asked:
        if kind.scored_by and part != kind.scored_by:
            raise IncompatibleError(
                f"eval.{part}: data={data.name} is scored by {kind.scored_by}; use eval={kind.scored_by}"
            )
        goes_with = [name for name in SOURCES.names() if SOURCES.get(name).scored_by == part]
        if goes_with and data.name not in goes_with:
            raise IncompatibleError(
                f"eval.{part}: data={data.name} has nothing for it; use data={goes_with[0]} data.path=FILE"
            )
    if kind.scored_by:
        return
    if isinstance(config, TrainConfig):
        if in_numbers != (config.tokenizer.name == "ids"):
            right = "ids" if in_numbers else "unigram, bpe, byte or file"
            raise IncompatibleError(f"tokenizer: data={data.name} goes with {right}, not with {config.tokenizer.name}")
        carrying = ARCHITECTURES.get(config.model.architecture).carrying(config.model, config.attention)
        if is_task and carrying:
            raise IncompatibleError(
                f"{carrying} from window to window of a text, and the examples of {data.name} stand alone"
            )
    if is_task and (config.eval.perplexity != "none" or config.eval.ngram != "none"):
        raise IncompatibleError(f"eval: perplexity and ngram are of text, and {data.name} has none; use eval=task")
    if config.eval.task != "none" and not is_task:
        raise IncompatibleError(f"eval.task: data={data.name} is text and no task; use eval=needle, passkey or ruler")
    if in_numbers and config.eval.task != "none":
        config.eval.task.check_numbers(data.name)
    if in_numbers and any(part != "none" for part in (config.eval.needle, config.eval.passkey, config.eval.ruler)):
        raise IncompatibleError(
            f"eval: needles and RULER ask in words, and {data.name} speaks in numbers; use eval=task"
        )


def _scheme(config: TrainConfig | ProfileConfig | PlanConfig | ShowConfig) -> None:
    if not isinstance(config.position, Position.Config):
        if isinstance(config, ShowConfig):
            raise ConfigError(f"model: {config.model.name} has no positional scheme that could be drawn")
        return
    assert isinstance(config.model, ModelConfig)
    scheme = POSITIONS.get(config.position.name)
    architecture = ARCHITECTURES.get(config.model.architecture)
    causal = architecture.causal and not architecture.reads_source  # all of it
    scheme.check(config.position, config.model, causal=causal)
    if not isinstance(config, ShowConfig) and config.attention != "none":
        mechanism = ATTENTIONS.get(config.attention.name)
        mechanism.check_position(scheme, config.position.name)
        mechanism.check_direction(config.attention, causal=causal)
        if config.attention.kernel == "native" and scheme.form == "blockwise" and not scheme.compilable:
            raise IncompatibleError(
                f"attention.kernel: native cannot compute the bias of position={config.position.name}; use auto or torch"
            )


def _budget(config: TrainConfig) -> None:
    trainer = config.trainer
    if config.context > trainer.batch_tokens:
        raise IncompatibleError(
            f"trainer.batch_tokens: {trainer.batch_tokens} tokens hold no window of context={config.context}; "
            f"set trainer.batch_tokens to {config.context} or more"
        )
    if SOURCES.get(config.data.name).scored_by:
        _schedule(config)
        return
    rows = trainer.batch_tokens // config.context
    if trainer.devices > rows or rows % trainer.devices:
        sharing = [n for n in range(1, rows + 1) if rows % n == 0]
        nearest = min(sharing, key=lambda n: (abs(n - trainer.devices), n))
        raise IncompatibleError(
            f"trainer.devices: {trainer.devices} processes cannot share the {rows} windows of a step evenly "
            f"(batch_tokens {trainer.batch_tokens} / context {config.context}); the nearest valid value is {nearest}"
        )
    _schedule(config)


def _schedule(config: TrainConfig) -> None:
    trainer = config.trainer
    only_time = trainer.max_tokens == trainer.max_steps == "none"
    if only_time and config.optim.schedule == "cosine":
        raise IncompatibleError(
            "trainer.max_time: a cosine needs to know its last step; use optim.schedule=wsd or constant, "
            "or give trainer.max_tokens too"
        )


def _curriculum(config: TrainConfig) -> None:
    for index, stage in enumerate(config.trainer.context_schedule):
        if stage.context > config.context:
            raise IncompatibleError(
                f"trainer.context_schedule.{index}.context: {format_length(stage.context)} is longer than "
                f"context={format_length(config.context)}, which the schedule ends at"
            )


def _lengths(config: TrainConfig | EvalConfig) -> None:
    perplexity = config.eval.perplexity
    if perplexity == "none":
        return
    for size in perplexity.streaming:
        if size <= perplexity.sinks:
            raise ConfigError(
                f"eval.perplexity.streaming: a cache of {size} has no token beside its {perplexity.sinks} sinks; the "
                f"nearest valid value is {perplexity.sinks + 1}"
            )
    if perplexity.lengths == "auto":
        return
    if not perplexity.lengths:
        raise ConfigError("eval.perplexity.lengths: expected at least one length, or auto, got []")
    if perplexity.segment == "auto":
        return
    longest = max(perplexity.lengths)
    if longest > perplexity.segment:
        raise IncompatibleError(
            f"eval.perplexity.lengths: {longest} is longer than eval.perplexity.segment={perplexity.segment}"
        )
