"""Parameters that are kept as they are while the others learn."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctxlab.errors import ConfigError
from ctxlab.train.initial import Initial
from ctxlab.train.loop import freeze
from tests.model.builders import build
from tests.train.builders import dataset, settings, train


@pytest.mark.parametrize("optim", ["muon", "adamw"])
@pytest.mark.parametrize(
    "patterns", [("embedding",), ("blocks.0", "norm"), ("blocks.*.attention.*",), ("blocks",), ("*.weight",)]
)
def test_frozen_parameters_stay_and_all_others_move(tmp_path: Path, optim: str, patterns: tuple[str, ...]) -> None:
    model = build()
    if patterns == ("*.weight",):
        with pytest.raises(ConfigError, match=r"trainer.freeze: nothing is left to train"):
            freeze(model, patterns)
        return
    data = dataset(tmp_path)
    before = train(tmp_path, data, settings(optim=optim, max_steps=1), "one").weights
    after = train(
        tmp_path, data, settings(optim=optim, max_steps=4, freeze=patterns), "some", initial=Initial(before)
    ).weights
    heads = tuple(pattern.split("*")[0].rstrip(".") for pattern in patterns)
    for name, weight in after.items():
        inside = name.startswith(heads) if "*" not in patterns[0] else ".attention." in name
        assert (weight == before[name]).all() == inside, name


def test_a_name_that_there_is_none_of() -> None:
    with pytest.raises(
        ConfigError, match=r"trainer.freeze: no parameter is called 'embeding'; did you mean 'embedding'"
    ):
        freeze(build(), ["embeding"])
