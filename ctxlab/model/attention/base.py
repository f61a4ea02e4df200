"""The contract of an attention mechanism: who may see whom, and what that costs. One class in one file a mechanism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ctxlab.errors import IncompatibleError
from ctxlab.model.attention.bias import Bias
from ctxlab.model.attention.native import Kernel
from ctxlab.model.config import ModelConfig
from ctxlab.registry import ComponentConfig, Registry

if TYPE_CHECKING:
    from ctxlab.model.position.base import Position


class Attention(nn.Module):
    """An attention mechanism of one layer. It is tested against dense attention under the mask that `visible` writes out."""

    class Config(ComponentConfig):
        name: str
        kernel: Kernel = Field("auto", description="who computes on CPU: torch, the native kernel, or what is faster")
        sink: bool = Field(False, description="a learned logit a head in the denominator of every softmax")

    paper: ClassVar[str]
    softmax: ClassVar[bool] = True
    """Whether keys are weighed by the exponential of their scores."""
    streams: ClassVar[bool] = False
    """Whether it still says who sees whom where a cache has dropped tokens and closed the ranks of the others."""
    slides: ClassVar[bool] = False
    """Whether it does where those that are dropped are always the oldest: who sees whom is a matter of distance alone."""
    keeps_sums: ClassVar[bool] = False
    """Whether a cache holds sums over all tokens (see `recall`) in place of keys and values."""

    @classmethod
    def check_position(cls, position: type[Position], name: str) -> None:
        """Raises IncompatibleError where the scheme called `name` has no meaning under this mechanism."""

    @classmethod
    def check_direction(cls, config: Config, *, causal: bool) -> None:
        """Raises IncompatibleError where the mechanism has no meaning for a model that looks ahead."""
        if not causal and cls.carried_tokens(config):
            raise IncompatibleError(
                f"attention.name: {config.name} attention carries a memory from what was read before, which an encoder, which "
                "reads whole rows, has none of; use full or sliding_window"
            )

    def __init__(self, config: Config, model: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.sink = nn.Parameter(torch.zeros(model.n_heads)) if config.sink else None

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

        q (B,H,T,D), k (B,Hkv,S,D), v (B,Hkv,S,Dv): query t stands at position S - T + t; causal, T <= S. `lengths` (B,),
        each at least 1, marks keys from lengths[b] on as padding. Returns out (B,H,T,Dv) and the log-sum-exp of the scores
        (B,H,T), fp32.

        With a sink (Agarwal et al. 2025, gpt-oss, arXiv:2508.10925; Miller 2023 with a fixed one) the softmax has one more key,
        of score `sink` in every row and without a value: out is multiplied by exp(lse) / (exp(lse) + exp(sink)).
        """
        out, lse = self.mix(q, k, v, scale=scale, causal=causal, bias=bias, lengths=lengths)
        if self.sink is None:
            return out, lse
        with_sink = torch.logaddexp(lse, self.sink.to(lse.dtype)[:, None])  # (B,H,T)
        return (out * torch.exp(lse - with_sink).unsqueeze(-1)).to(out.dtype), with_sink

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        """`attend`, as a block calls it: a hook on this module sees what it is given."""
        return self.attend(q, k, v, **settings)

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
        """`attend` without the sink; lse carries a gradient where there is one."""
        raise NotImplementedError

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether a query at position i may see a key at j, but for causality, (T,S) bool of i (T,1) and j (1,S)."""
        return torch.ones(i.shape[0], j.shape[1], dtype=torch.bool, device=i.device)

    def visible(self, n_queries: int, n_keys: int, *, causal: bool) -> Tensor:
        """Whether query t may see key j, (T,S) bool: the mechanism's definition, for tests and drawings only."""
        i, j = torch.arange(n_keys - n_queries, n_keys)[:, None], torch.arange(n_keys)[None, :]
        return self.sees(i, j) & (j <= i) if causal else self.sees(i, j)

    def first_needed(self, position: int) -> int:
        """The first key that a query at `position` or later sees; a cache forgets the keys before it."""
        return 0

    @classmethod
    def check_training(cls, config: Config, *, contexts: Sequence[int], packed: bool) -> None:
        """Raises IncompatibleError where rows of one of these lengths, or packed ones, cannot be trained on."""

    @classmethod
    def carried_tokens(cls, config: Config) -> int:
        """How many tokens before its own a training step sees, through a memory carried over from the step before."""
        return 0

    @classmethod
    def flops(cls, config: Config, model: ModelConfig, context: int, layer: int, *, causal: bool = True) -> float:
        """Floating-point operations of scores and weighted sums, forward, a token of one layer."""
        raise NotImplementedError

    def recall(self, q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
        """Causal attention of the next T tokens where the past is in `sums`: (out (B,H,T,Dv), the sums after them).

        Of mechanisms that `keeps_sums` in place of keys and values.
        """
        raise NotImplementedError

    @classmethod
    def cached_tokens(cls, config: Config, length: int, layer: int) -> int:
        """How many tokens' keys and values a layer's cache holds when token number `length` has come, one by one."""
        return length

    @classmethod
    def sum_bytes(cls, model: ModelConfig) -> int:
        """Bytes of a layer's sums for one sequence, whatever its length."""
        return 0


ATTENTIONS: Registry[Attention] = Registry("attention", "ctxlab.model.attention")
