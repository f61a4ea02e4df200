"""Which objective trains which model on what: every pair is taken or refused, and what a refusal advises is taken."""

from __future__ import annotations

import functools
import importlib.util
import itertools

import pytest

from ctxlab.config import rules
from ctxlab.config.overrides import split
from ctxlab.config.prepare import Cell, prepare
from ctxlab.config.schema import TrainConfig
from ctxlab.data.source import SOURCES
from ctxlab.errors import IncompatibleError
from ctxlab.train.objectives.base import OBJECTIVES

MODELS = {
    "decoder": ["model=nano"],
    "encoder": ["model=nano", "model.architecture=encoder"],
    "encoder_decoder": ["model=chapter_example"],
    "lstm": ["model=lstm_nano"],
    "bert2bert": ["model=bert2bert"],
}
DATA = {
    "text": ["data=text", "data.path=plays.txt"],
    "pairs": ["data=parallel", "data.path=pairs.tsv"],
    "labels": ["data=classification", "data.path=texts.tsv"],
    "questions": ["data=squad", "data.path=squad.json"],
}


def cell(*words: str) -> Cell:
    (found,) = prepare(split("train", list(words))).cells
    return found


def advice(refusal: str) -> list[list[str]]:
    """The words of each thing that a refusal says to use."""
    _, _, said = refusal.partition("; use ")
    return [one.split() for one in said.replace(" or ", ", ").split(", ")] if said else []


@functools.cache
def of_model(*words: str) -> TrainConfig:
    config: TrainConfig = cell(*words).typed
    return config


def refusal(config: TrainConfig, data: str, objective: str) -> str:
    """What is said against an objective on a kind of data; nothing where the three go together."""
    words = [word.partition("=")[2] for word in DATA[data]]
    parts = {
        "data": SOURCES.config({"name": words[0], "path": words[1]}),
        "objective": OBJECTIVES.config({"name": objective}),
    }
    try:
        rules.check(config.model_copy(update=parts))
    except IncompatibleError as error:
        return str(error) if str(error).startswith("objective: ") else ""  # of evaluations another part says it
    return ""


@pytest.mark.parametrize("model", MODELS)
def test_what_a_refusal_of_an_architecture_advises_is_taken(model: str) -> None:
    if model == "bert2bert":
        pytest.importorskip("transformers")
    refused = 0
    for data, objective in itertools.product(DATA, OBJECTIVES.names()):
        said = refusal(of_model(*MODELS[model]), data, objective)
        if " trains " not in said:
            continue
        refused += 1
        assert advice(said), said
        for more in advice(said):
            if "bert2bert" in more[0] and importlib.util.find_spec("transformers") is None:
                continue
            key, _, value = more[0].partition("=")
            if key == "objective":
                assert refusal(of_model(*MODELS[model]), data, value) == "", said
            else:
                kept = [word for word in MODELS[model] if not word.startswith(key)]
                assert refusal(of_model(*kept, *more), data, objective) == "", said
    assert refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            [*DATA["pairs"], *MODELS["decoder"]],
            "objective: seq2seq trains model.architecture=encoder_decoder or bert2bert, not decoder; use "
            "model.architecture=encoder_decoder or model=bert2bert",
        ),
        (
            [*DATA["pairs"], *MODELS["lstm"]],
            "objective: seq2seq trains model.architecture=encoder_decoder or bert2bert, not lstm; use "
            "model=tiny model.architecture=encoder_decoder or model=bert2bert",
        ),
        (
            [*DATA["labels"], *MODELS["encoder_decoder"]],
            "objective: classification trains model.architecture=encoder or decoder, not encoder_decoder; use "
            "model.architecture=encoder or model.architecture=decoder",
        ),
        (
            [*DATA["text"], *MODELS["decoder"], "objective=span_corruption"],
            "objective: span_corruption trains model.architecture=encoder_decoder or bert2bert, not decoder; use "
            "objective=causal, objective=prefix, model.architecture=encoder_decoder or model=bert2bert",
        ),
        (
            [*DATA["pairs"], *MODELS["decoder"], "objective=masked"],
            "objective: masked does not go with data=parallel: it reads text",
        ),
    ],
)
def test_a_refusal_names_what_fits_both_the_model_and_the_data(words: list[str], said: str) -> None:
    assert cell(*words).skipped == said


def test_questions_are_answered_as_the_model_can() -> None:
    """An encoder points, a decoder says, an encoder-decoder writes; what the line says stays."""
    expected = {"encoder": "extractive", "decoder": "causal", "lstm": "causal", "encoder_decoder": "seq2seq"}
    for model, objective in expected.items():
        found = cell(*DATA["questions"], *MODELS[model])
        assert (found.typed.objective.name, found.skipped) == (objective, "")
    swept = prepare(
        split("train", [*DATA["questions"], "-m", "model=nano", "model.architecture=encoder,decoder"])
    ).cells
    assert [one.typed.objective.name for one in swept] == ["extractive", "causal"]
    said = cell(*DATA["questions"], *MODELS["decoder"], "objective=extractive")
    assert said.skipped == (
        "objective: extractive trains model.architecture=encoder, not decoder; use objective=causal or "
        "model.architecture=encoder"
    )
