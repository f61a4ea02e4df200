"""A training builds the native kernel where it can use it."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from ctxlab.model.attention import native
from ctxlab.train.loop import _prepare_attention
from tests.train.builders import settings


@pytest.mark.parametrize(
    ("position", "attention", "device", "built"),
    [
        ("rope", {"name": "full"}, "cpu", True), ("fire", {"name": "sliding_window", "size": 8}, "cpu", True),
        ("nope", {"name": "linear"}, "cpu", False), ("fox", {"name": "full"}, "cpu", True),
        ("transformer_xl", {"name": "recurrent", "size": 8, "memory": 8}, "cpu", False),
        ("cope_ctx", {"name": "full"}, "cpu", False), ("rope", {"name": "full"}, "cuda", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bounded", [True, False])
def test_the_kernel_is_built_for_a_long_training_that_can_use_it(
    monkeypatch: pytest.MonkeyPatch, position: str, attention: dict[str, Any], device: str, built: bool, bounded: bool
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(native, "prepare", lambda kernel, operations, say: asked.append(operations))
    budget: Any = SimpleNamespace(n_tokens=10**12, bounded=bounded, max_seconds=10**6)
    config = settings(position=position, attention=attention)
    console = Console(file=io.StringIO())
    _prepare_attention(config, budget, 256, torch.device(device), "fp32", console)
    assert [operations >= native.PAYS_FROM for operations in asked] == [True] * built
