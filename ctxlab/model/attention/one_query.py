"""Attention of one query a head to all keys, compiled: one_query.cpp, built with the attention kernel. What decoding calls.

torch's own takes as long to be called as to read the keys of some hundred tokens, and has no kernel for a bias.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ctxlab.model.attention.bias import LOG2_E, Bias, Span, Tile
from ctxlab.model.attention.native import DTYPES, Kernel, loaded, may_read, note


def attend_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    bias: Bias | None,
    lengths: Tensor | None,
    kernel: Kernel,
) -> tuple[Tensor, Tensor] | None:
    """What `blockwise_attention` returns of q (B,H,1,D), the last of k (B,Hkv,S,D) and v (B,Hkv,S,Dv), without a gradient.

    None where that is not what is asked for, or not to be had: several queries, a gradient, another device or dtype, a bias
    that reads scores, no compiled kernel.
    """
    B, H, T, D = q.shape
    if T != 1 or kernel == "torch" or q.dtype not in DTYPES or not may_read(q) or (library := loaded()) is None:
        return None
    Hkv, S, Dv = k.shape[1], k.shape[2], v.shape[3]
    row, rows, heads = None, 0, 0
    if bias is not None:
        if (row := bias_of_last(bias, S, causal, q.device)) is None:
            return None
        rows, heads = (n if size > 1 else 0 for n, size in zip(row.stride()[:2], row.shape[:2]))
    if lengths is not None:
        lengths = lengths.to(torch.int64).contiguous()
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = q.new_empty((B, H, 1, Dv)), q.new_empty((B, H, 1), dtype=torch.float32)
    query = _Query(
        B, H, Hkv, S, D, Dv, q.dtype == torch.bfloat16, scale,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(),
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        None if lengths is None else lengths.data_ptr(), None if row is None else row.data_ptr(), rows, heads,
    )  # fmt: skip
    library.attention_of_one(ctypes.byref(query))
    note(q, "native")
    return out, lse


def bias_of_last(bias: Bias, n_keys: int, causal: bool, device: torch.device) -> Tensor | None:
    """The bias of the last query at all keys, (B or 1, H or 1, S) fp32; None where it reads scores."""
    span = Span(1, n_keys, causal, 1, torch.float32, device, False)
    tiles = bias.open(tuple(bias.tensors), span)
    if tiles.reads_scores:
        return None
    every = slice(None)
    row = tiles.block(Tile(every, every, range(n_keys - 1, n_keys - 2, -1), slice(0, n_keys)))[:, :, 0] / LOG2_E  # type: ignore[union-attr]
    row = row if tiles.constant is None else row + tiles.constant[:, None]
    return row.to(torch.float32).expand(*row.shape[:2], n_keys).contiguous()


class _Query(ctypes.Structure):
    """Field by field the struct Query of one_query.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "H", "Hkv", "S", "D", "Dv", "bf16")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse")),
        *(
            (f"{name}_stride_{axis}", ctypes.c_int64)
            for name, axes in (("q", 2), ("k", 3), ("v", 3))
            for axis in range(axes)
        ),
        ("lengths", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("bias_stride_0", ctypes.c_int64),
        ("bias_stride_1", ctypes.c_int64),
    )
