"""Small models for tests: any scheme, weights large enough that positions and attention matter."""

from __future__ import annotations

from typing import Any

import torch

from ctxlab.model.attention.base import ATTENTIONS, Attention
from ctxlab.model.base import ARCHITECTURES
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position
from ctxlab.model.transformer import Transformer

VOCAB = 61


def small(**settings: Any) -> ModelConfig:
    """32 wide, 2 layers, 4 heads of 8 in 2 groups, unless told otherwise."""
    return ModelConfig(**{"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48} | settings)


def build(
    position: str | Position.Config = "rope",
    *,
    context: int = 64,
    vocab_size: int = VOCAB,
    seed: int = 0,
    attention: str | Attention.Config = "full",
    prefix: bool = False,
    **settings: Any,
) -> Transformer:
    """A model in eval mode, every matrix drawn with standard deviation 0.25 (at 0.02 attention is nearly uniform)."""
    torch.manual_seed(seed)
    if isinstance(position, str):
        position = POSITIONS.get(position).Config(name=position)
    mechanism = ATTENTIONS.get(attention).Config(name=attention) if isinstance(attention, str) else attention
    config = small(**settings)
    architecture: Any = ARCHITECTURES.get(config.architecture)
    more = {"prefix": True} if prefix else {}
    model: Transformer = architecture(config, position, mechanism, vocab_size=vocab_size, context=context, **more)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.endswith("offset"):  # an offset a layer and head is no matrix
                parameter.normal_(std=0.25)
    return model.eval()


def tokens(rows: int, length: int, *, vocab_size: int = VOCAB, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
