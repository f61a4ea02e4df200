"""Cross-entropy from hidden states, a chunk of tokens at a time: the logits of a batch never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # a target that is not scored
_LOGITS = 2**21  # numbers in one chunk's logits: what stays in cache


def chunk_for(vocab_size: int) -> int:
    """Tokens whose logits exist at once, by default: about 2M numbers, at least 64 tokens to keep the products efficient."""
    return max(64, _LOGITS // vocab_size)


def token_nats(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """nats_t = ln sum_v exp(h_t . w_v) - h_t . w_target, 0 where the target is -100.

    hidden (N,d), weight (V,d), targets (N,) int64 -> (N,) fp32. Products run in the dtype of `hidden`, everything behind them
    in fp32. The gradient is found together with the value, from the same logits, as if all nats were to be summed: then
    backward only multiplies. If it turns out that tokens weigh differently, the logits are computed again.
    No double backward.
    """
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        result: Tensor = _TokenNats.apply(hidden, weight, targets, chunk, keep)
        return result


class _TokenNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, keep: bool) -> Tensor:
        nats, dhidden, dweight = _sweep(hidden, weight, targets, chunk, None, keep)
        if keep:
            ctx.save_for_backward(hidden, weight, targets, dhidden, dweight)
            ctx.chunk = chunk
        return nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, targets, dhidden, dweight = ctx.saved_tensors
        if grad.stride() == (0,):  # one number for all tokens: the gradient of a sum
            return dhidden * grad[0].to(dhidden.dtype), (dweight * grad[0]).to(weight.dtype), None, None, None
        with torch.autocast(hidden.device.type, enabled=False):
            _, dhidden, dweight = _sweep(hidden, weight, targets, ctx.chunk, grad, True)
        return dhidden, dweight.to(weight.dtype), None, None, None


def _sweep(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, scales: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """nats of every token and, if `keep`, the gradients of sum_t scales_t nats_t (scales 1 when None)."""
    N, dtype = hidden.shape[0], hidden.dtype
    high = torch.promote_types(dtype, torch.float32)
    matrix = weight.detach().to(dtype)
    hidden = hidden.detach()
    nats = torch.empty(N, dtype=high, device=hidden.device)
    dhidden = torch.empty_like(hidden) if keep else hidden.new_empty(0)
    dweight = torch.zeros(weight.shape if keep else (0,), dtype=high, device=weight.device)
    rooms = [torch.empty(min(chunk, N), weight.shape[0], dtype=d, device=hidden.device) for d in (dtype, high)]
    for start in range(0, N, chunk):
        h = hidden[start : start + chunk]  # (n,d)
        n = h.shape[0]
        target = targets[start : start + chunk]
        scored = target != IGNORED
        column = torch.where(scored, target, 0)[:, None]
        logits, p = rooms[0][:n], rooms[1][:n]  # (n,V)
        torch.mm(h, matrix.T, out=logits)
        # A softmax row's largest entry is at least 1/V: its logarithm is safe where that of the target's may not be.
        top = logits.amax(-1, keepdim=True).to(high)
        torch.softmax(p.copy_(logits), -1, out=p)
        lse = top - p.amax(-1, keepdim=True).log()  # (n,1)
        nats[start : start + n] = (lse - logits.gather(1, column))[:, 0].masked_fill(~scored, 0.0)
        if not keep:
            continue
        dlogits = logits.copy_(p.scatter_add_(1, column, p.new_full((1, 1), -1.0).expand(n, 1)))
        row = (scored if scales is None else scales[start : start + n] * scored)[:, None].to(high)  # (n,1)
        torch.mul(dlogits @ matrix, row, out=dhidden[start : start + n])
        dweight += dlogits.T @ (h * row).to(dtype)
    return nats, dhidden, dweight
