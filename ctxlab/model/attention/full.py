"""Full attention: every token sees every earlier one."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ctxlab.model.attention.base import ATTENTIONS, Attention
from ctxlab.model.attention.bias import Bias
from ctxlab.model.attention.blockwise import autocast, blockwise_attention
from ctxlab.model.attention.fused import fused_attention
from ctxlab.model.attention.native import Kernel, takes
from ctxlab.model.attention.one_query import attend_once
from ctxlab.model.config import ModelConfig


@ATTENTIONS.register("full")
class Full(Attention):
    """Vaswani et al. 2017, arXiv:1706.03762, eq. 1, with key-value heads shared by groups of queries (arXiv:2305.13245).

    Without a bias it runs in torch's fused kernel, with one in the blockwise function, on CPU both in the native kernel
    where that is faster: in memory linear in the context. Causal attention needs no `lengths`: padding stands at the right
    end, where no real query looks.
    """

    class Config(Attention.Config):
        name: Literal["full"] = "full"

    streams = True
    paper = "Vaswani et al. 2017, arXiv:1706.03762"

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
        return attend_to_all(
            q, k, v, scale=scale, causal=causal, bias=bias, lengths=lengths, lse_gradient=self.sink is not None,
            kernel=self.config.kernel,
        )  # fmt: skip

    @classmethod
    def flops(
        cls, config: Attention.Config, model: ModelConfig, context: int, layer: int, *, causal: bool = True
    ) -> float:
        """4 H D context: two products of a query with `context` keys, the causal half not taken off (PaLM's convention)."""
        return 4.0 * model.n_heads * model.head_dim * context


def attend_to_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    bias: Bias | None,
    lengths: Tensor | None,
    lse_gradient: bool,
    kernel: Kernel,
) -> tuple[Tensor, Tensor]:
    """Attention to every key, or every earlier one: of one query compiled, fused where there is nothing to add, else
    blockwise."""
    lengths = None if causal else lengths
    q, k, v = autocast(q, k, v)
    once = attend_once(q, k, v, scale=scale, causal=causal, bias=bias, lengths=lengths, kernel=kernel)
    if once is not None:
        return once
    if bias is None and not takes(q, k, v, scale=scale, bias=bias, kernel=kernel):
        return fused_attention(q, k, v, scale=scale, causal=causal, lengths=lengths, lse_gradient=lse_gradient)
    return blockwise_attention(q, k, v, scale=scale, causal=causal, bias=bias, lengths=lengths, kernel=kernel)
