"""The contract of an attention mechanism: who may see whom, and what that costs. One class in one file a mechanism."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ctxlab.model.attention.bias import Bias
from ctxlab.model.config import ModelConfig
from ctxlab.registry import ComponentConfig, Registry


class Attention(nn.Module):
    """An attention mechanism of one layer. It is tested against dense attention under the mask that `visible` writes out."""

    class Config(ComponentConfig):
        name: str

    paper: ClassVar[str]

    def __init__(self, config: Config, model: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool,
        bias: Bias | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """out_i = sum_j softmax_j(scale q_i . k_j + bias_ij) v_j over the keys j that query i may see.

        q (B,H,T,D), k (B,Hkv,S,D), v (B,Hkv,S,Dv), T <= S: query t stands at position S - T + t. `lengths` (B,) marks keys
        from lengths[b] on as padding. Returns out (B,H,T,Dv) and the log-sum-exp of the scores (B,H,T), fp32.
        """
        raise NotImplementedError

    def visible(self, n_queries: int, n_keys: int, *, causal: bool) -> Tensor:
        """Whether query t may see key j, (T,S) bool: the mechanism's definition, for tests and drawings only."""
        raise NotImplementedError

    def first_needed(self, position: int) -> int:
        """The first key that a query at `position` or later sees; a cache forgets the keys before it."""
        return 0

    @classmethod
    def flops(cls, config: Config, model: ModelConfig, context: int, layer: int) -> float:
        """Floating-point operations of scores and weighted sums, forward, a token of one layer."""
        raise NotImplementedError

    @classmethod
    def cached_tokens(cls, config: Config, length: int, layer: int) -> int:
        """How many tokens' keys and values a layer's cache holds when token number `length` has come, one by one."""
        raise NotImplementedError


ATTENTIONS: Registry[Attention] = Registry("attention", "ctxlab.model.attention")
