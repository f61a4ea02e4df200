"""What a resolved config may be: one typed, frozen model a command, put together from the components' own `Config`s.

Hydra's output goes through JSON, strictly: `true` is no number and "3" is no 3, a list is a tuple and a string a path.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SerializeAsAny, ValidationError, create_model

from ctxlab.config.explain import explain_invalid
from ctxlab.data.source import SOURCES, Source
from ctxlab.data.tokenizers.base import TOKENIZERS, Tokenizer
from ctxlab.errors import ConfigError
from ctxlab.evaluation.classification import ClassificationConfig
from ctxlab.evaluation.harness import HarnessConfig
from ctxlab.evaluation.ngram import NGramConfig
from ctxlab.evaluation.objective import HeldOutConfig
from ctxlab.evaluation.perplexity import PerplexityConfig
from ctxlab.evaluation.qa import QAConfig
from ctxlab.evaluation.tasks import NeedleGrid, OwnTask, PasskeyGrid, Ruler
from ctxlab.evaluation.translation import TranslationConfig
from ctxlab.fields import Bytes, Length, OrAuto, OrNone, Seconds
from ctxlab.model.attention.base import ATTENTIONS, Attention
from ctxlab.model.base import ARCHITECTURES, architecture_of
from ctxlab.model.config import SizesConfig
from ctxlab.model.generation import DecodingConfig
from ctxlab.model.position.base import POSITIONS, Position
from ctxlab.profiling.measure import MeasureConfig
from ctxlab.profiling.plan import PlanSettings
from ctxlab.records.schema import known_metric
from ctxlab.records.sinks import LoggerConfig
from ctxlab.registry import ComponentConfig, Registry, nearest
from ctxlab.train.objectives.base import OBJECTIVES, Objective
from ctxlab.train.objectives.causal import Causal
from ctxlab.train.optim.base import OPTIMIZERS, Optimizer
from ctxlab.train.settings import TrainerConfig

T = TypeVar("T")
MISSING = "???"  # OmegaConf's word for a value that is still to be given

# Left out of a cell's identity: what changes where or how a run is kept, not what it computes.
_NOT_IDENTITY: dict[str, Any] = {"identity": False}

# Groups whose `name` picks a class; everything else in a config has one type.
REGISTRIES: dict[str, Registry[Any]] = {
    "position": POSITIONS,
    "attention": ATTENTIONS,
    "data": SOURCES,
    "tokenizer": TOKENIZERS,
    "objective": OBJECTIVES,
    "optim": OPTIMIZERS,
}


def _one_line(value: str) -> str:
    if not 0 < len(value) <= _LONGEST_NAME or "/" in value or not value.isprintable():
        raise ValueError(f"expected 1 to {_LONGEST_NAME} characters on one line without '/', got {value!r}")
    return value


def _no_repeats(value: tuple[T, ...]) -> tuple[T, ...]:
    repeated = sorted(str(entry) for entry in value if value.count(entry) > 1)
    if repeated:
        raise ValueError(f"'{repeated[0]}' is given twice")
    return value


_LONGEST_NAME = 80
Name = Annotated[str, AfterValidator(_one_line)]
Checkpoint = Literal["last", "best", "average"]
# Layers or heads, counted from 1.
Chosen = Literal["all"] | Annotated[tuple[int, ...], AfterValidator(_no_repeats), Field(min_length=1)]
# A seed feeds torch and a keyed permutation: 63 bits.
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _one_or_several(value: Any) -> Any:
    # Past a validator of ours pydantic reads Python, no longer JSON, and strictly: a tuple is a tuple.
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Paths(ComponentConfig):
    """Where runs and downloaded text are kept."""

    runs: str = Field("runs", min_length=1, description="folder of the run records; CTXLAB_RUNS sets it too")
    cache: OrAuto | str = Field(
        "auto", description="folder of corpora, tokens and what is compiled; auto: the user's cache folder"
    )


class SweepConfig(ComponentConfig):
    """How the cells of a sweep are run."""

    jobs: int = Field(1, ge=1, description="cells that run side by side")
    memory: OrNone | Bytes = Field("none", description="limit of one cell, all its processes together")
    timeout: OrNone | Seconds = Field("none", description="limit of one cell")
    resume: str = Field("none", description="id of a sweep to go on with")
    metric: Annotated[str, AfterValidator(known_metric)] = Field(
        "bits_per_byte", description="the measurement that the comparison is about"
    )


class Evaluations(ComponentConfig):
    """The evaluations of a command: `eval=perplexity` brings `eval.perplexity.*`."""

    perplexity: OrNone | PerplexityConfig = "none"
    ngram: OrNone | NGramConfig = "none"
    task: OrNone | OwnTask = "none"
    needle: OrNone | NeedleGrid = "none"
    passkey: OrNone | PasskeyGrid = "none"
    ruler: OrNone | Ruler = "none"
    lm_eval: OrNone | HarnessConfig = "none"
    translation: OrNone | TranslationConfig = "none"
    qa: OrNone | QAConfig = "none"
    classification: OrNone | ClassificationConfig = "none"
    objective: OrNone | HeldOutConfig = "none"


class CommandConfig(ComponentConfig):
    """What every command's config has."""

    seed: Seed = 1
    paths: Paths = Field(Paths(), json_schema_extra=_NOT_IDENTITY)


class RecordedConfig(CommandConfig):
    """What every command that writes a record has."""

    name: OrAuto | Name = Field("auto", json_schema_extra=_NOT_IDENTITY)
    tags: Annotated[tuple[Name, ...], AfterValidator(_no_repeats)] = Field((), json_schema_extra=_NOT_IDENTITY)
    note: str = Field("", json_schema_extra=_NOT_IDENTITY)
    experiment: OrNone | str = Field("none", json_schema_extra=_NOT_IDENTITY)
    logger: LoggerConfig = Field(LoggerConfig(), json_schema_extra=_NOT_IDENTITY)
    sweep: SweepConfig = Field(SweepConfig(), json_schema_extra=_NOT_IDENTITY)


class TrainConfig(RecordedConfig):
    """`ctxlab train`: a model, a context, text, an optimizer and a budget, then the evaluation of the result."""

    context: Length
    model: SizesConfig
    position: OrNone | SerializeAsAny[Position.Config]
    attention: OrNone | SerializeAsAny[Attention.Config]
    data: SerializeAsAny[Source.Config]
    tokenizer: SerializeAsAny[Tokenizer.Config]
    objective: SerializeAsAny[Objective.Config] = Causal.Config()
    optim: SerializeAsAny[Optimizer.Config]
    trainer: TrainerConfig
    eval: Evaluations = Evaluations()
    profile: MeasureConfig = MeasureConfig()
    init: str = Field("none", description="id of a run whose weights to start from")
    checkpoint: Checkpoint = Field("last", description="which weights of it")
    resume: str = Field("none", description="id of the run that goes on", json_schema_extra=_NOT_IDENTITY)


class EvaluationTrainer(ComponentConfig):
    """The machine of an evaluation."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"


class EvalConfig(RecordedConfig):
    """`ctxlab eval`: recorded runs, evaluated again. What is `none` is as in the run."""

    run: Annotated[tuple[str, ...], BeforeValidator(_one_or_several), AfterValidator(_no_repeats), Field(min_length=1)]
    checkpoint: Checkpoint = "last"
    attention: OrNone | SerializeAsAny[Attention.Config] = "none"
    data: OrNone | SerializeAsAny[Source.Config] = "none"
    trainer: EvaluationTrainer = EvaluationTrainer()
    eval: Evaluations = Evaluations()
    profile: MeasureConfig = MeasureConfig()


class GenerateConfig(CommandConfig):
    """`ctxlab generate`: text that goes on from a prompt."""

    run: str
    checkpoint: Checkpoint = "last"
    prompt: str = ""
    prompt_file: OrNone | str = "none"
    prompts_file: OrNone | str = "none"
    batch: int = Field(32, ge=1)
    decoding: DecodingConfig = DecodingConfig()
    trainer: EvaluationTrainer = EvaluationTrainer()


class AttentionConfig(CommandConfig):
    """`ctxlab attention`: what the heads of a run attend to in a text."""

    run: str
    checkpoint: Checkpoint = "last"
    text: str = ""
    text_file: OrNone | str = "none"
    target: OrNone | str = "none"
    kind: Literal["all", "self", "encoder", "cross"] = "all"
    layers: Chosen = "all"
    heads: Chosen = "all"
    words: bool = False
    cells: int = Field(96, ge=8, le=1024)
    induction: int = Field(64, ge=0)
    file: OrAuto | OrNone | str = "auto"
    decoding: DecodingConfig = DecodingConfig(temperature=0.0)
    trainer: EvaluationTrainer = EvaluationTrainer(precision="fp32")


class StepConfig(RecordedConfig):
    """A training step without text: what is measured or predicted of one."""

    context: Length
    vocab_size: int = Field(2048, ge=2)
    model: SizesConfig
    position: OrNone | SerializeAsAny[Position.Config]
    attention: OrNone | SerializeAsAny[Attention.Config]
    optim: SerializeAsAny[Optimizer.Config]
    trainer: TrainerConfig


class ProfileConfig(StepConfig):
    """`ctxlab profile`: memory and time of a training step at many contexts, without text."""

    profile: MeasureConfig = MeasureConfig()


class PlanConfig(StepConfig):
    """`ctxlab plan`: memory of a training step, predicted, and what fits."""

    plan: PlanSettings = PlanSettings()


class ShowConfig(CommandConfig):
    """`ctxlab show`: a positional scheme, drawn by distance."""

    context: Length
    distances: Annotated[Length, Field(ge=2)] = 256
    file: OrAuto | OrNone | str = "auto"
    run: str = "none"
    model: SizesConfig
    position: OrNone | SerializeAsAny[Position.Config]


COMMANDS: dict[str, type[CommandConfig]] = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "generate": GenerateConfig,
    "attention": AttentionConfig,
    "profile": ProfileConfig,
    "plan": PlanConfig,
    "show": ShowConfig,
}


def parse(command: str, config: dict[str, Any]) -> Any:
    """The typed config of a command.

    Raises ConfigError whose message has one line for each wrong value.
    """
    base = COMMANDS[command]
    lines = list(_not_values(config))
    if lines:
        raise ConfigError("\n".join(lines))
    typed = _with_components(base, config)
    try:
        return typed.model_validate_json(json.dumps(config))
    except ValidationError as error:
        raise ConfigError("\n".join(explain_invalid(error, config, _fields(typed)))) from error


def _with_components(base: type[CommandConfig], config: dict[str, Any]) -> type[CommandConfig]:
    """`base` with each component's field narrowed to the Config of the class that its `name` picks."""
    chosen: dict[str, type[ComponentConfig]] = {}
    for group, registry in REGISTRIES.items():
        if group not in base.model_fields or not isinstance(config.get(group), dict):
            continue
        name = config[group].get("name", "???")
        if not isinstance(name, str) or name not in registry.names():
            raise ConfigError(f"{group}.name: no {group} is called '{name}'{nearest(str(name), registry.names())}")
        chosen[group] = registry.get(name).Config
    if "model" in base.model_fields and isinstance(config.get("model"), dict):
        chosen["model"] = _sizes(config["model"])
    return _narrowed(base, tuple(chosen.items()))


def _sizes(model: dict[str, Any]) -> type[ComponentConfig]:
    """The Config of the architecture that `model:` names; one line where its settings are those of another."""
    name = architecture_of(model)
    if name not in ARCHITECTURES.names():
        raise ConfigError(
            f"model.architecture: no architecture is called '{name}'{nearest(name, ARCHITECTURES.names())}"
        )
    settings: type[ComponentConfig] = ARCHITECTURES.get(name).Config
    foreign = [key for key in model if key not in settings.model_fields]
    others = {key for other in ARCHITECTURES.names() for key in ARCHITECTURES.get(other).Config.model_fields}
    if foreign and others.issuperset(foreign):
        raise ConfigError(
            f"model.architecture: {name} has no {', '.join(foreign)}; an architecture is chosen with its sizes, by model=NAME"
        )
    return settings


@functools.cache
def _narrowed(base: type[CommandConfig], chosen: tuple[tuple[str, type[ComponentConfig]], ...]) -> type[CommandConfig]:
    """One class for one choice of components, so that equal configs are equal."""
    fields: dict[str, Any] = {group: (config, base.model_fields[group]) for group, config in chosen}
    return create_model(base.__name__, __base__=base, __module__=base.__module__, **fields)


def _not_values(node: Any, path: str = "") -> Iterator[str]:
    """What no field takes, whatever its type: a value that is still to be given, infinities and NaN, broken text."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _not_values(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _not_values(value, f"{path}.{index}")
    elif isinstance(node, float) and not math.isfinite(node):
        yield f"{path}: expected a finite number, got {node}"
    elif node == MISSING:
        yield f"{path}: a value is needed here"
    elif isinstance(node, str) and not _is_unicode(node):
        yield f"{path}: expected UTF-8 text, got {node!r}"


def _is_unicode(text: str) -> bool:
    """Whether a text can be written down: bytes of the command line that were none stand in it as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _fields(model: type[BaseModel], path: str = "") -> dict[str, list[str]]:
    """Dotted path -> names of the fields there (`*` for the entries of a list), for the nearest valid name."""
    found = {path: list(model.model_fields)}
    for name, field in model.model_fields.items():
        here = f"{path}.{name}" if path else name
        for candidate, suffix in _models_in(field.annotation):
            found |= _fields(candidate, here + suffix)
    return found


def _models_in(annotation: Any, suffix: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, suffix
    for argument in get_args(annotation):
        yield from _models_in(argument, ".*" if get_origin(annotation) is tuple else suffix)
