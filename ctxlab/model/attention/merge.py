"""Exact combination of attention over disjoint sets of keys, by their log-sum-exps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets is the average of the parts weighted by exp(lse).

        lse = ln sum_p exp(lse_p),    out = sum_p exp(lse_p - lse) out_p

    parts: (out (B,H,T,Dv), lse (B,H,T), natural log) of each key set. A part that shows a query no key has lse -inf
    there and counts for nothing; a query without any key gets out 0 and lse -inf.
    The weights are constants to autograd, as lse carries no gradient: gradients reach the outs alone, which is not the
    whole gradient of q and k. Training goes through `fused_attention` or `blockwise_attention`.
    Raises ValueError when there is no part.
    """
    if not parts:
        raise ValueError("merge: expected at least one (out, lse), got none")
    if len(parts) == 1:
        return parts[0]
    dtype = parts[0][0].dtype
    lses = torch.stack([lse.detach() for _, lse in parts])  # (P,B,H,T)
    lse = torch.logsumexp(lses, dim=0)  # (B,H,T)
    weights = torch.softmax(lses, dim=0).masked_fill(lse == -torch.inf, 0.0)  # (P,B,H,T)
    out = sum(weight.unsqueeze(-1) * out for weight, (out, _) in zip(weights, parts))
    assert isinstance(out, Tensor)
    return out.to(dtype), lse
