"""xPos: rotary positions whose score also decays with the distance, slow pairs less than fast ones."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ctxlab.model.position.base import POSITIONS
from ctxlab.model.position.rope import Rope, rotate

_LARGEST = 60.0  # |exponent of e| of a factor: its products with queries and keys stay normal numbers in fp32 and bf16


@POSITIONS.register("xpos")
class XPos(Rope):
    """RoPE with q times zeta_k^(i/S), k times zeta_k^(-j/S), zeta_k = (2k/D + g) / (1 + g): Sun et al. 2022, arXiv:2212.10554.

    S is `scale_base` (512), g is `gamma` (0.4). A pair's part of the score is multiplied by zeta_k^((i - j)/S) <= 1. The two
    factors alone leave the range of a float, so positions count from the middle of the largest span that does not
    (48k at these settings); from its end on positions are refused. Causal only: ahead of a query the factor would grow.
    """

    class Config(Rope.Config):
        name: Literal["xpos"] = "xpos"  # type: ignore[assignment]
        gamma: float = Field(0.4, gt=0, description="larger: less decay")
        scale_base: float = Field(
            512.0, gt=0, description="tokens over which a pair decays by zeta_k; larger: less decay"
        )

    paper = "Sun et al. 2022, arXiv:2212.10554"
    bidirectional = False

    @property
    def n_positions(self) -> int:
        assert isinstance(self.config, XPos.Config)
        fastest = -math.log(self.config.gamma / (1 + self.config.gamma)) / self.config.scale_base
        return int(2 * _LARGEST / fastest)

    @property
    def why_they_end(self) -> str:
        return "its factors leave fp32's range"

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The turns of queries and of keys, (T,D/2) each, lengthened and shortened."""
        assert isinstance(self.config, XPos.Config)
        turns = super().tables(positions, torch.float64)
        n, gamma = turns.shape[-1], self.config.gamma
        k = torch.arange(n, dtype=torch.float64, device=positions.device)
        zeta = (k / n + gamma) / (1 + gamma)  # (D/2,)
        power = (positions - self.n_positions // 2).to(torch.float64)[:, None] / self.config.scale_base  # (T,1)
        wanted = torch.complex64 if torch.promote_types(dtype, torch.float32) == torch.float32 else torch.complex128
        return (turns * zeta**power).to(wanted), (turns * zeta**-power).to(wanted)

    def query(self, q: Tensor, tables: Any, state: Any) -> Tensor:
        assert isinstance(self.config, XPos.Config)
        return rotate(q, tables[0], self.config.layout)

    def key(self, k: Tensor, tables: Any, state: Any) -> Tensor:
        assert isinstance(self.config, XPos.Config)
        return rotate(k, tables[1], self.config.layout)
