"""Compiled blocks train as the others do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ctxlab.errors import ConfigError
from tests.train.builders import dataset, settings, train


def test_without_a_compiler_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr(config.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    with pytest.raises(ConfigError, match=r"^trainer.compile: there is no C\+\+ compiler here \(g\+\+\); use "):
        train(tmp_path, dataset(tmp_path), settings(compile=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiled_blocks_take_the_same_steps(tmp_path: Path, recompute: str) -> None:
    data = dataset(tmp_path)
    plain = train(tmp_path, data, settings(max_steps=4, micro_batch=4), "plain")
    torch._dynamo.reset()
    compiled = train(
        tmp_path,
        data,
        settings(max_steps=4, micro_batch=4, compile=True, recompute=recompute, validate_every=2),
        "compiled",
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name in ("loss", "gradient_norm"):
        expected = [row[name] for row in plain.rows.of("train")]
        assert [row[name] for row in compiled.rows.of("train")] == pytest.approx(expected, rel=1e-5)
    assert compiled.weights.keys() == plain.weights.keys()  # names that know nothing of it
