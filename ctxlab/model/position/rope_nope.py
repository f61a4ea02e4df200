"""RoPE in most layers, no position at all in every n-th: global layers that compare content at any distance."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ctxlab.model.position.base import POSITIONS
from ctxlab.model.position.rope import Rope, rotate


@POSITIONS.register("rope_nope")
class RopeNoPE(Rope):
    """Layer l (from 0) has no position where (l + 1) % every = 0 and is RoPE elsewhere: iRoPE (Llama 4), SmolLM3.

    Yang et al. 2025, arXiv:2501.18795. In the layers without position, query i may be multiplied by
    1 + query_scale ln(1 + floor((i + 1) / scale_span)), which keeps attention sharp at lengths beyond the trained one (Llama 4
    has 0.1 and 8192). With attention=sliding_window attention.global_every=N the global layers are those without position
    (SWAN-GPT, arXiv:2504.08719).
    """

    class Config(Rope.Config):
        name: Literal["rope_nope"] = "rope_nope"  # type: ignore[assignment]
        every: int = Field(4, ge=1, description="every n-th layer has no position")
        query_scale: float = Field(0.0, ge=0, description="of queries in those layers; 0: they are left as they are")
        scale_span: int = Field(8192, ge=1, description="tokens after which the scale has its first step")

    paper = "Yang et al. 2025, arXiv:2501.18795"
    shared_across_layers = False
    bidirectional = False

    def prepare(self, x: Tensor, layer: int, carry: Any) -> tuple[bool, None]:
        """Whether the layer rotates."""
        assert isinstance(self.config, RopeNoPE.Config)
        return (layer + 1) % self.config.every != 0, None

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The turns (T,D/2) of layers that rotate, the scale (T,1) of queries in those that do not."""
        assert isinstance(self.config, RopeNoPE.Config)
        steps = ((positions + 1) // self.config.scale_span).to(torch.float64)
        scale = 1 + self.config.query_scale * torch.log1p(steps)[:, None]
        return super().tables(positions, dtype), scale.to(torch.promote_types(dtype, torch.float32))

    def query(self, q: Tensor, tables: Any, state: Any) -> Tensor:
        assert isinstance(self.config, RopeNoPE.Config)
        if state:
            return rotate(q, tables[0], self.config.layout)
        return (q * tables[1]).to(q.dtype) if self.config.query_scale else q

    def key(self, k: Tensor, tables: Any, state: Any) -> Tensor:
        assert isinstance(self.config, RopeNoPE.Config)
        return rotate(k, tables[0], self.config.layout) if state else k
