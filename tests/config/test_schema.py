"""The border: strict types, every error one line with its path, identity, and every shipped YAML read by its schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from ctxlab.config import catalog, rules, schema
from ctxlab.config.compose import Composer
from ctxlab.config.identity import differences, identity, identity_fields
from ctxlab.config.overrides import is_free_text
from ctxlab.errors import ConfigError, IncompatibleError

COMMANDS = ("train", "eval", "generate", "profile", "plan", "show")


def plain(*overrides: str, command: str = "train") -> dict[str, Any]:
    with Composer(command) as composer:
        return composer.compose(overrides).config


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return plain()


def parsed(composed: dict[str, Any], **values: Any) -> Any:
    """The train config with dotted keys (`__` for the dot) set to Python values."""
    config = json.loads(json.dumps(composed))
    for key, value in values.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return schema.parse("train", config)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes_and_reads(command: str) -> None:
    config = schema.parse(command, plain(command=command))
    assert type(config).__name__ == schema.COMMANDS[command].__name__
    assert isinstance(config, schema.COMMANDS[command])


OPTIONS = [
    (group, option.name, command)
    for command in ("train", "eval", "profile", "plan")
    for group in [default.group for default in catalog.defaults(command)]
    for option in catalog.groups().get(group, [])
]


@pytest.mark.parametrize(("group", "option", "command"), OPTIONS)
def test_every_shipped_yaml_is_valid(group: str, option: str, command: str, tmp_path: Path) -> None:
    if group == "experiment" and command != "train":
        pytest.skip("experiments are recorded lines of train")
    # What does not go with the defaults of its own command: linear attention with few schemes, tasks' own parts with text,
    # what reads a source with what has none.
    pairs = ["data=parallel", "model=chapter_example"]
    questions = ["data=squad", "model.architecture=encoder"]
    needs = {
        ("attention", "linear"): ["position=nope"],
        ("tokenizer", "ids"): ["data=task/mqar"],
        ("eval", "task"): ["data=task/mqar"],
        ("model", "vaswani_base"): pairs[:1],
        ("model", "chapter_example"): pairs[:1],
        ("model", "bert2bert"): pairs[:1],
        ("data", "parallel"): pairs[1:],
        ("eval", "translation"): pairs,
        ("eval", "objective"): ["objective=masked", "model.architecture=encoder"],
        ("objective", "seq2seq"): pairs,
        ("data", "squad"): questions[1:],
        ("eval", "qa"): questions,
        ("objective", "extractive"): questions,
        ("eval", "classification"): ["data=classification"],
        ("objective", "classification"): ["data=classification"],
        ("objective", "masked"): ["model.architecture=encoder"],
        ("objective", "span_corruption"): ["model.architecture=encoder_decoder", "tokenizer.sentinels=100"],
    }
    more = (
        needs.get((group, option), [])
        if command == "train" or (group, command) in (("attention", "profile"), ("attention", "plan"))
        else []
    )
    words = [f"{group}={option}", *more]
    config = plain(*words, command=command)
    for owner, fields in (("data", ("path",)), ("tokenizer", ("path", "file"))):
        for field in fields:
            if isinstance(config.get(owner), dict) and config[owner].get(field) == schema.MISSING:
                config[owner][field] = str(tmp_path)
    if (group, option) == ("eval", "lm_eval"):
        assert config["eval"]["lm_eval"].pop("tasks") == schema.MISSING
        config["eval"]["lm_eval"]["tasks"] = ["arc_easy"]
    assert rules.leave_out(config, words) == ""
    typed = schema.parse(command, config)
    rules.check(typed)


@pytest.mark.parametrize("group", sorted(schema.REGISTRIES))
def test_every_name_has_a_yaml_and_the_reverse(group: str) -> None:
    assert [option.name for option in catalog.groups()[group]] == schema.REGISTRIES[group].names()


@pytest.mark.parametrize("group", sorted(schema.REGISTRIES))
def test_every_yaml_states_its_own_name_and_every_setting(group: str) -> None:
    """What a user can set is what the file shows."""
    for option in catalog.groups()[group]:
        values = {entry.key: entry.value for entry in catalog.entries(option.path) if "." not in entry.key}
        assert values["name"] == option.name
        assert set(values) == set(schema.REGISTRIES[group].get(option.name).Config.model_fields), option.path


def test_every_evaluation_has_a_yaml() -> None:
    names = {option.name for option in catalog.groups()["eval"]}
    assert names == {*schema.Evaluations.model_fields, "none"}


def test_choices_in_comments_are_the_schemas(composed: dict[str, Any]) -> None:
    """`auto | fp32 | bf16: ...` beside a value: each of the words is accepted, and no other is."""
    offered = [(entry.key, entry.choices) for entry in catalog.entries(catalog.conf_dir() / "trainer" / "quick.yaml")]
    for key, choices in [
        (f"trainer__{key}", choices) for key, choices in offered if choices and choices != ["true", "false"]
    ]:
        for choice in choices:
            parsed(composed, **{key: choice})
        with pytest.raises(ConfigError, match="expected " + ", ".join(choices[:-1]) + " or " + choices[-1]):
            parsed(composed, **{key: "nonsense"})


def text_fields(model: type[BaseModel], path: str = "") -> list[str]:
    """Dotted paths of fields that take any text."""
    found = []
    for name, field in model.model_fields.items():
        here = f"{path}.{name}" if path else name
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if part in (str, Path):
                found.append(here)
            elif isinstance(part, type) and issubclass(part, BaseModel):
                found += text_fields(part, here)
    return found


def test_every_text_of_a_person_is_free_text() -> None:
    """A text that Hydra parsed would lose its accents and commas. Names and ids are words of its grammar."""
    words = {"name", "experiment", "model.name", "sweep.resume", "sweep.metric", "run", "init", "resume", "logger.name"}
    words |= {
        "eval.lm_eval.tasks",
        "decoding.stop_strings",
        "data.exclude",
        "trainer.freeze",
        "trainer.lora.targets",
    }  # lists: what is odd in one stands in quotes
    fields = {path for model in schema.COMMANDS.values() for path in text_fields(model)}
    for group, registry in schema.REGISTRIES.items():
        for name in registry.names():
            fields |= {f"{group}.{path}" for path in text_fields(registry.get(name).Config)}
        words.add(f"{group}.name")
    assert {path for path in fields - words if not is_free_text(path)} == set()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": 0}, r"^context: expected a number > 0, got 0$"),
        ({"context": True}, r"^context: expected a whole number, got true$"),
        ({"context": "abc"}, r"^context: 'abc' is not a number with a unit$"),
        ({"context": 1000.0}, r"^context: expected a whole number, got 1000.0$"),
        ({"model__n_layers": True}, r"^model.n_layers: expected a whole number, got true$"),
        ({"model__n_layers": "3"}, r"^model.n_layers: expected a whole number, got '3'$"),
        ({"model__n_layers": None}, r"^model.n_layers: expected a whole number, got null$"),
        ({"model__n_layer": 3}, r"^model.n_layer: no such key; did you mean 'n_layers'\?$"),
        ({"model__dropout": 1.0}, r"^model.dropout: expected a number < 1, got 1.0$"),
        (
            {"model__norm": "rmsnrm"},
            r"^model.norm: expected rmsnorm or layernorm, got 'rmsnrm'; did you mean 'rmsnorm'\?$",
        ),
        ({"model__d_model": 65, "model__n_heads": 4}, r"^model: d_model \(65\) must be divisible by n_heads \(4\)"),
        ({"position__theta": "abc"}, r"^position.theta: expected a number, got 'abc'$"),
        ({"position__theta": 0}, r"^position.theta: expected a number > 0, got 0$"),
        ({"position__thet": 1}, r"^position.thet: no such key; did you mean 'theta'\?$"),
        ({"position__name": "rop"}, r"^position.name: no position is called 'rop'; did you mean 'rope'\?$"),
        ({"optim__learning_rate": float("inf")}, r"^optim.learning_rate: expected a finite number, got inf$"),
        ({"optim__betas": [0.9]}, r"^optim.betas.1: a value is needed here$"),
        ({"optim__betas": 0.9}, r"^optim.betas: expected a list, got 0.9; write \[0.9\]$"),
        (
            {"trainer__max_tokens": "lots"},
            r"^trainer.max_tokens: 'lots' is not a number with a unit \(none is allowed too\)$",
        ),
        ({"trainer__max_tokens": "none"}, r"^trainer: set one of max_tokens, max_steps, max_time$"),
        ({"trainer__micro_batch": 0}, r"^trainer.micro_batch: expected a number >= 1 or auto, got 0$"),
        (
            {"trainer__context_schedule": [{"contxt": 8, "share": 0.5}]},
            r"contxt: no such key; did you mean 'context'\?",
        ),
        (
            {"trainer__context_schedule": [{"context": 8, "share": 2}]},
            r"schedule.0.share: expected a number < 1, got 2$",
        ),
        ({"profile__contexts": ["1k", "x"]}, r"^profile.contexts.1: 'x' is not a number with a unit$"),
        ({"profile__memory": "much"}, r"^profile.memory: 'much' is not a number with a unit"),
        ({"eval__perplexity__lengths": [0]}, r"^eval.perplexity.lengths.0: expected a number > 0, got 0$"),
        ({"eval__perplexty": {}}, r"^eval.perplexty: no such key; did you mean 'perplexity'\?$"),
        ({"tags": ["a", "a"]}, r"^tags: 'a' is given twice$"),
        (
            {"name": "a/b"},
            r"^name: expected 1 to 80 characters on one line without '/', got 'a/b' \(auto is allowed too\)$",
        ),
        ({"seed": -1}, r"^seed: expected a number >= 0, got -1$"),
        ({"data__name": "???"}, r"^data.name: a value is needed here$"),
        ({"logger__mode": "on"}, r"^logger.mode: expected auto, offline, online or disabled, got 'on'$"),
        ({"nonsense": 1}, r"^nonsense: no such key"),
    ],
)
def test_refused_values(composed: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(composed, **values)


def test_every_mistake_is_named_at_once(composed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(composed, context=0, seed="x", model__n_layers=0)
    assert {line.split(":")[0] for line in str(caught.value).splitlines()} == {"context", "seed", "model.n_layers"}


def test_units_are_read(composed: dict[str, Any]) -> None:
    config = parsed(composed, context="2k", trainer__max_tokens="5M", profile__memory="16GiB", sweep__timeout="2h")
    assert (config.context, config.trainer.max_tokens) == (2048, 5_000_000)
    assert (config.profile.memory, config.sweep.timeout) == (16 * 2**30, 7200.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": 8192}, r"trainer.batch_tokens: 4096 tokens hold no window of context=8192; set .* to 8192"),
        ({"context": 4096, "trainer__devices": 2}, "trainer.devices: 2 processes cannot share the 1 windows"),
        ({"trainer__max_tokens": "none", "trainer__max_time": "1min"}, "trainer.max_time: a cosine needs to know"),
        (
            {"trainer__context_schedule": [{"context": 512, "share": 0.5}]},
            "context_schedule.0.context: 512 is longer than",
        ),
        ({"eval__perplexity__lengths": [64], "eval__perplexity__segment": 32}, "eval.perplexity.lengths: 64 is longer"),
        (
            {"trainer__update": "backward"},
            "^optim.clip: 1 is a norm of the whole gradient, which trainer.update=backward never holds; use optim.clip=0$",
        ),
        (
            {"trainer__update": "backward", "optim__clip": 0.0, "trainer__devices": 2},
            "^trainer.update: 2 processes add up their gradients behind the backward pass; use step$",
        ),
        (
            {"trainer__offload": "cpu", "trainer__compile": True},
            r"^trainer.offload: torch decides by itself what a compiled block \(trainer.compile\) keeps; use none$",
        ),
        ({"model__head_dim": 33}, "model.head_dim: rope rotates pairs and needs an even number, got 33"),
    ],
)
def test_parts_that_do_not_go_together(composed: dict[str, Any], values: dict[str, Any], message: str) -> None:
    config = parsed(composed, **values)
    with pytest.raises(IncompatibleError, match=message):
        rules.check(config)


def test_free_heads_are_allowed(composed: dict[str, Any]) -> None:
    config = parsed(composed, model__d_model=512, model__n_heads=6, model__n_kv_heads=2, model__head_dim=64)
    rules.check(config)
    assert (config.model.n_heads, config.model.n_kv_heads, config.model.head_dim) == (6, 2, 64)


def test_a_config_reads_back_as_itself(composed: dict[str, Any]) -> None:
    """What the record stores is the config: derived numbers and all."""
    config = parsed(composed, context="1k")
    again = schema.parse("train", config.model_dump(mode="json"))
    assert again == config


def test_identity_ignores_where_and_how_a_run_is_kept(composed: dict[str, Any]) -> None:
    base = identity(parsed(composed))
    same = dict(paths__runs="/elsewhere", note="x", name="y", tags=["z"], logger__mode="disabled", sweep__jobs=3)
    assert identity(parsed(composed, **same)) == base
    assert identity(parsed(composed, trainer__log_every=7)) == base
    for changed in (
        dict(seed=2),
        dict(context=128),
        dict(position__theta=1.0),
        dict(trainer__max_steps=3),
        dict(init="a-b"),
    ):
        assert identity(parsed(composed, **changed)) != base
    assert identity(parsed(composed), fingerprint="data") != base


def test_identity_is_of_the_value_not_of_its_spelling(composed: dict[str, Any]) -> None:
    assert identity(parsed(composed, context="1k")) == identity(parsed(composed, context=1024))


def test_differences_are_named(composed: dict[str, Any]) -> None:
    ours, theirs = identity_fields(parsed(composed)), identity_fields(parsed(composed, model__d_ff=7))
    assert differences(ours, theirs) == [f"model.d_ff is {ours['model']['d_ff']} here, 7 there"]
