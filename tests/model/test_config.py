"""ModelConfig: derived sizes and refusals."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ctxlab.model.config import ModelConfig

SIZES = {"d_model": 64, "n_layers": 2, "n_heads": 4}


def test_auto_sizes_are_resolved_to_numbers() -> None:
    config = ModelConfig(**SIZES, n_kv_heads="auto", head_dim="auto", d_ff="auto")
    assert (config.n_kv_heads, config.head_dim, config.d_ff) == (4, 16, 128)
    assert config.model_dump()["head_dim"] == 16


@pytest.mark.parametrize(
    ("d_model", "activation", "d_ff"),
    [(384, "swiglu", 1024), (256, "swiglu", 640), (768, "swiglu", 2048), (768, "gelu", 3072), (512, "gelu_tanh", 2048)],
)
def test_feed_forward_width(d_model: int, activation: str, d_ff: int) -> None:
    assert ModelConfig(d_model=d_model, n_layers=1, n_heads=1, activation=activation).d_ff == d_ff


def test_head_dim_is_free_of_d_model() -> None:
    config = ModelConfig(d_model=512, n_layers=1, n_heads=6, head_dim=64)
    assert config.head_dim == 64


def test_resolved_config_reads_back_equal() -> None:
    config = ModelConfig(**SIZES, activation="gelu", n_kv_heads=2)
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d_model": 65}, r"d_model \(65\) must be divisible by n_heads \(4\), or head_dim given as a number"),
        ({"n_kv_heads": 3}, r"n_heads \(4\) must be divisible by n_kv_heads \(3\)"),
        ({"n_layers": True}, "n_layers\n.*valid integer"),
        ({"n_heads": 0}, "n_heads\n.*greater than 0"),
        ({"d_model": "64"}, "d_model\n.*valid integer"),
        ({"dropout": 1.0}, "dropout\n.*less than 1"),
        ({"activation": "tanh"}, "activation\n.*'swiglu', 'geglu_tanh', 'gelu', 'gelu_tanh' or 'relu'"),
        ({"d_modle": 64}, "d_modle\n.*not permitted"),
    ],
)
def test_refusals(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**SIZES | wrong)  # type: ignore[arg-type]
