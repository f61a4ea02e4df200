"""What local mechanisms share: full attention under a rule of visibility, with every n-th layer left global."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from pydantic import Field
from torch import Tensor

from ctxlab.fields import OrNone
from ctxlab.model.attention.base import Attention
from ctxlab.model.attention.bias import Bias
from ctxlab.model.attention.blockwise import blockwise_attention, side_of
from ctxlab.model.attention.full import attend_to_all
from ctxlab.model.attention.visible import Visible
from ctxlab.model.config import ModelConfig

_FEWEST = 64  # queries and keys in a tile: smaller ones cost more a score than hidden pairs do


class Local(Attention):
    """Attention within a neighbourhood; layer l (from 0) sees everything where (l + 1) % global_every = 0.

    `size` counts the tokens that belong together: of a window, a chunk, a segment.
    """

    class Config(Attention.Config):
        size: int = Field(ge=1)
        global_every: OrNone | int = Field("none", description="every n-th layer sees everything; none: no layer does")

    def __init__(self, config: Config, model: ModelConfig, layer: int) -> None:
        super().__init__(config, model, layer)
        self.rule = None if is_global(config, layer) else self.neighbourhood(config)

    @staticmethod
    @abstractmethod
    def neighbourhood(config: Any) -> Visible:
        """Who is in the neighbourhood."""

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool,
        bias: Bias | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(self.config, Local.Config)
        if self._hides_nothing(k.shape[2], causal):
            return attend_to_all(
                q, k, v, scale=scale, causal=causal, bias=bias, lengths=lengths, lse_gradient=self.sink is not None,
                kernel=self.config.kernel,
            )  # fmt: skip
        side = max(_FEWEST, min(side_of(q.device), 1 << (self.config.size - 1).bit_length()))
        return blockwise_attention(
            q, k, v, scale=scale, causal=causal, bias=bias, lengths=None if causal else lengths,
            visible=self.rule, blocks=(side, side), kernel=self.config.kernel,
        )  # fmt: skip

    def _hides_nothing(self, n_keys: int, causal: bool) -> bool:
        """Whether every query sees the first key, and the last one too where it may look ahead."""
        return self.rule is None or (self.rule.low(n_keys - 1) == 0 and (causal or self.rule.high(0) >= n_keys))

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        return super().sees(i, j) if self.rule is None else self.rule.sees(i, j)

    def first_needed(self, position: int) -> int:
        return 0 if self.rule is None else self.rule.low(position)

    @classmethod
    def cached_tokens(cls, config: Any, length: int, layer: int) -> int:
        return length if is_global(config, layer) else length - cls.neighbourhood(config).low(length - 1)

    @classmethod
    def flops(cls, config: Any, model: ModelConfig, context: int, layer: int, *, causal: bool = True) -> float:
        """4 H D times the keys that the best-placed query of a long sequence sees, those of a carried memory among them."""
        reach = context + cls.carried_tokens(config)
        rule = cls.neighbourhood(config)
        most = rule.most if causal else rule.high(context) - rule.low(context)
        seen = context if is_global(config, layer) else min(reach, most)
        return 4.0 * model.n_heads * model.head_dim * seen


def is_global(config: Local.Config, layer: int) -> bool:
    return config.global_every != "none" and (layer + 1) % config.global_every == 0
