"""Cross-entropy from hidden states, a chunk of tokens at a time: the logits of a batch never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # a target that is not scored
_LOGITS = 2**21  # numbers in one chunk's logits on a CPU: what stays in cache
_WIDE_LOGITS = 2**26  # on other devices: enough for the whole chip, where smaller ones are mostly launches
_MOST = 4096  # tokens there: products of more are no quicker


def chunk_for(vocab_size: int, device: str, asked: int | None = None) -> int:
    """Tokens whose logits exist at once: as many as are asked for, or by the kind of device.

    About 2M numbers on a CPU and 64M, but of no more than 4,096 tokens, elsewhere; at least 64 tokens to keep the products
    efficient.
    """
    if asked is not None:
        return asked
    return max(64, _LOGITS // vocab_size if device == "cpu" else min(_WIDE_LOGITS // vocab_size, _MOST))


def token_nats(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """nats_t = ln sum_v exp(h_t . w_v) - h_t . w_target, 0 where the target is -100.

    hidden (N,d), weight (V,d), targets (N,) int64 -> (N,) fp32. Products run in the dtype of `hidden`, everything behind them
    in fp32. The gradient is found together with the value, from the same logits, as if all nats were to be summed: then
    backward only multiplies. If it turns out that tokens weigh differently, the logits are computed again.
    No double backward.
    """
    return smoothed_nats(hidden, weight, targets, chunk, 0.0)[0]


def smoothed_nats(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """(loss, nats) of every token: loss = (1 - e) nats + e mean_v(-ln p_v) with e = smoothing, nats as in `token_nats`.

    Label smoothing: Szegedy et al. 2016, arXiv:1512.00567, section 7, over all V tokens, the target too. Only the loss has a
    gradient; with e = 0 the two are one.
    """
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, nats = _TokenNats.apply(hidden, weight, targets, chunk, smoothing, keep)
    return loss, nats if smoothing else loss.detach()


class _TokenNats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, smoothing: float, keep: bool
    ) -> tuple[Tensor, Tensor]:
        loss, nats, dhidden, dweight = _sweep(hidden, weight, targets, chunk, smoothing, None, keep)
        if keep:
            ctx.save_for_backward(hidden, weight, targets, dhidden, dweight)
            ctx.chunk, ctx.smoothing = chunk, smoothing
        ctx.mark_non_differentiable(nats)
        return loss, nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden, weight, targets, dhidden, dweight = ctx.saved_tensors
        if _is_one_number(grad):  # the gradient of a sum
            dhidden, dweight = dhidden * grad[0].to(dhidden.dtype), dweight * grad[0]
        else:
            with torch.autocast(hidden.device.type, enabled=False):
                _, _, dhidden, dweight = _sweep(hidden, weight, targets, ctx.chunk, ctx.smoothing, grad, True)
        return dhidden, dweight.to(weight.dtype), None, None, None, None


def _is_one_number(grad: Tensor) -> bool:
    """Whether all tokens have the same: a sum's says so by its stride, a mean's does not. On a GPU, looking would wait."""
    if not len(grad):
        return False
    return grad.stride() == (0,) or (type(grad) is Tensor and grad.is_cpu and bool((grad == grad[0]).all()))


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int,
    smoothing: float,
    scales: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of every token, its nats where the loss is another number, and, if `keep`, the gradients of
    sum_t scales_t loss_t (scales 1 when None)."""
    N, V, dtype = hidden.shape[0], weight.shape[0], hidden.dtype
    high = torch.promote_types(dtype, torch.float32)
    matrix = weight.detach().to(dtype)
    hidden = hidden.detach()
    nats = torch.empty(N, dtype=high, device=hidden.device)
    loss = torch.empty_like(nats) if smoothing else nats.new_empty(0)
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
        if smoothing:
            mean = logits.sum(-1, keepdim=True, dtype=high) / V
            mixed = lse - (1 - smoothing) * logits.gather(1, column) - smoothing * mean
            loss[start : start + n] = mixed[:, 0].masked_fill(~scored, 0.0)
        if not keep:
            continue
        p.scatter_add_(1, column, p.new_full((1, 1), smoothing - 1.0).expand(n, 1))
        dlogits = logits.copy_(p.sub_(smoothing / V) if smoothing else p)
        row = (scored if scales is None else scales[start : start + n] * scored)[:, None].to(high)  # (n,1)
        torch.mul(dlogits @ matrix, row, out=dhidden[start : start + n])
        dweight += dlogits.T @ (h * row).to(dtype)
    return (loss, nats, dhidden, dweight) if smoothing else (nats, loss, dhidden, dweight)
