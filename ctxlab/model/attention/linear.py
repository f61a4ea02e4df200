"""Linear attention: a kernel in place of the exponential, so that the past is one matrix whatever its length."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ctxlab.errors import IncompatibleError
from ctxlab.model.attention.base import ATTENTIONS, Attention
from ctxlab.model.attention.bias import Bias
from ctxlab.model.attention.blockwise import autocast, check
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import Position

_CHUNK = 64  # tokens whose pairs are weighed one by one; what lies before them is in the running sums


@ATTENTIONS.register("linear")
class Linear(Attention):
    """out_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j), phi(x) = elu(x) + 1: Katharopoulos et al. 2020.

    arXiv:2006.16236, eqs. 7 and 9 to 12. No softmax and no scale: time and memory are linear in the context, and what can be
    told apart is bounded by head_dim. It stands here as the contrast. Sums are fp32, and a cache holds nothing but
    them: sum_j phi(k_j) (v_j, 1) of each key-value head, D x (D + 1) numbers at any length. Positions may only be added to
    the embeddings: a rotation or a bias inside the product would no longer be one.
    """

    class Config(Attention.Config):
        name: Literal["linear"] = "linear"
        kernel: Literal["auto", "torch"] = Field("auto", description="torch either way: there is no softmax")
        sink: Literal[False] = Field(False, description="there is no softmax to put one into")

    paper = "Katharopoulos et al. 2020, arXiv:2006.16236"
    softmax = False
    keeps_sums = True

    @classmethod
    def check_position(cls, position: type[Position], name: str) -> None:
        if position.form not in ("none", "embedding"):
            raise IncompatibleError(
                f"attention.name: linear attention has no scores that {name} could turn or add to; "
                "use nope, sinusoidal or learned"
            )

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
        q, k, v = autocast(q, k, v)
        check(q, k, v, causal)
        assert bias is None, "check_position comes first"
        with torch.autocast(q.device.type, enabled=False):
            fq, fk, wide = _features(q, k, v)
            if lengths is not None:
                seen = torch.arange(k.shape[2], device=k.device) < lengths[:, None]
                fk = fk * seen[:, None, :, None]
            group = q.shape[1] // k.shape[1]
            fk, wide = (x.repeat_interleave(group, 1) if group > 1 else x for x in (fk, wide))
            total = _causal(fq, fk, wide, None) if causal else fq @ (fk.mT @ wide)  # (B,H,T,Dv+1)
            weight = total[..., -1:]
            out = total[..., :-1] / weight.masked_fill(weight == 0, 1.0)
            return out.to(q.dtype), weight.squeeze(-1).log()

    def recall(self, q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = autocast(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            fq, fk, wide = _features(q, k, v)
            if sums is None:
                sums = fk.new_zeros(*fk.shape[:2], fk.shape[3], wide.shape[3])
            group = q.shape[1] // k.shape[1]
            each = [x.repeat_interleave(group, 1) if group > 1 else x for x in (fk, wide, sums)]
            total = _causal(fq, *each)
            return (total[..., :-1] / total[..., -1:]).to(q.dtype), sums + fk.mT @ wide

    @classmethod
    def cached_tokens(cls, config: Any, length: int, layer: int) -> int:
        return 0

    @classmethod
    def sum_bytes(cls, model: ModelConfig) -> int:
        return 4 * model.n_kv_heads * model.head_dim * (model.head_dim + 1)

    @classmethod
    def flops(cls, config: Any, model: ModelConfig, context: int, layer: int, *, causal: bool = True) -> float:
        """4 H D (D + chunk): a token into the sums and a query out of them, and, causal, the pairs within a chunk."""
        pairs = min(_CHUNK, context) if causal else 0
        return 4.0 * model.n_heads * model.head_dim * (model.head_dim + pairs)


def _features(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """phi of queries and keys, and values with a column of ones, whose sum is the denominator; fp32 or wider."""
    high = torch.promote_types(q.dtype, torch.float32)
    return F.elu(q.to(high)) + 1, F.elu(k.to(high)) + 1, F.pad(v.to(high), (0, 1), value=1.0)


def _causal(fq: Tensor, fk: Tensor, v: Tensor, sums: Tensor | None) -> Tensor:
    """sum_{j <= i} fq_i . fk_j v_j for the last T of S tokens: fq (B,H,T,D), fk (B,H,S,D), v (B,H,S,E) -> (B,H,T,E).

    `sums` (B,H,D,E) are those over tokens before all of these.
    """
    T, S = fq.shape[2], fk.shape[2]
    before = fk[:, :, : S - T].mT @ v[:, :, : S - T]  # (B,H,D,E)
    if sums is not None:
        before = before + sums
    n = -(-T // _CHUNK)
    q, k, w = (
        F.pad(x, (0, 0, 0, n * _CHUNK - T)).unflatten(2, (n, _CHUNK)) for x in (fq, fk[:, :, S - T :], v[:, :, S - T :])
    )  # (B,H,n,C,D or E)
    sums = (k.mT @ w).cumsum(2)  # of each chunk and those before it, (B,H,n,D,E)
    past = torch.cat([torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1]], dim=2) + before.unsqueeze(2)
    out = (q @ k.mT).tril() @ w + q @ past
    return out.flatten(2, 3)[:, :, :T]
