"""A block's part of a decoding step in a few compiled calls, one between two attentions: decode_step.cpp.

One token a row is read against all weights: on CPU a call of torch takes longer than its arithmetic, and its product of one
row has one core read the matrix. What is compiled is the same sums in another order; positions, caches and mechanisms are
called as ever. It is built with the attention kernel, and used wherever that is there and `attention.kernel` is not `torch`.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ctxlab.model.attention import native
from ctxlab.model.attention.base import Attention
from ctxlab.model.few import Projection

if TYPE_CHECKING:
    from ctxlab.model.blocks import Block, Frame, Norm
    from ctxlab.model.cache import LayerCache

MOST_ROWS = 4
"""Rows of a step, at most: one text, or the beams of one."""

ACTIVATIONS = {"swiglu": 0, "geglu_tanh": 1, "gelu_tanh": 1, "gelu": 2, "relu": 3}


def step_of(block: Block, x: Tensor, frame: Frame, cache: LayerCache | None) -> DecodeStep | None:
    """What computes this block for x (B,T,d), if it is a step of few rows that the compiled one computes; kept in the cache,
    which has no meaning for other weights."""
    if (
        cache is None
        or x.shape[1] != 1
        or x.shape[0] > MOST_ROWS
        or x.dtype != torch.float32
        or block.training
        or not native.may_read(x)
    ):
        return None
    if cache.step is None or cache.step[0] != frame.dtype:
        cache.step = frame.dtype, DecodeStep(block, frame.dtype) if is_plain(block, frame.dtype) else None
    found: DecodeStep | None = cache.step[1]
    return found


def is_plain(block: Block, dtype: torch.dtype) -> bool:
    """Whether a block is of the parts that are compiled, nobody listens to them, and the compiled step is there and wanted."""
    if dtype not in native.DTYPES or block.attention.mechanism.config.kernel == "torch":
        return False
    called = {block, *(part for part in block.modules() if isinstance(part, Attention))}  # as ever, hooks and all
    for part in set(block.modules()) - called:
        other = isinstance(part, nn.Linear) and type(part) is not Projection
        if other or part._forward_hooks or part._forward_pre_hooks:
            return False
    same = all(p.dtype == torch.float32 and p.is_cpu and p.is_contiguous() for p in block.parameters())
    return same and native.loaded() is not None


class DecodeStep:
    """The weights of a block in `dtype`, and what is called with rows of one token each, x (B,1,d) fp32."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        library = native.loaded()
        assert library is not None, "is_plain comes first"
        self._run = library.decode_step
        self.dtype = dtype
        self._kept: list[Tensor] = []
        attention, crossing, mapping = block.attention, block.cross_attention, block.feed_forward

        def before(norm: Norm) -> Norm | None:
            return None if block.post_norm else norm

        def after(norm: Norm) -> Norm | None:
            return norm if block.post_norm else None

        self._begin = self._step(before(block.attention_norm), [attention.query, attention.key, attention.value])
        mix, behind = attention.out, after(block.attention_norm)
        self._cross = None
        if crossing is not None and block.cross_attention_norm is not None:
            self._cross = self._step(before(block.cross_attention_norm), [crossing.query], mix, behind)
            mix, behind = crossing.out, after(block.cross_attention_norm)
        self._end = end = self._step(before(block.feed_forward_norm), [], mix, behind)
        if hasattr(mapping, "gate"):
            end.gate = self._matrix(mapping.gate)
        end.up, end.down = self._matrix(mapping.up), self._matrix(mapping.down)
        end.activation = ACTIVATIONS[mapping.activation]
        if block.post_norm:
            end.last = self._norm(block.feed_forward_norm)

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What self-attention reads, (B,1,d), and its queries, keys and values."""
        read = x.new_empty(x.shape, dtype=self.dtype)
        self._begin.read = read.data_ptr()
        q, k, v = self._products(self._begin, x)
        return read, q, k, v

    def cross(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream behind self-attention, whose heads said `mixed` (B,1,H*Dv), and the queries of the source."""
        assert self._cross is not None
        to = x.new_empty(x.shape)
        self._cross.to = to.data_ptr()
        (queries,) = self._products(self._cross, x, mixed)
        return to, queries

    def end(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What the block says, behind the attention whose heads said `mixed`."""
        to = x.new_empty(x.shape)
        self._end.to = to.data_ptr()
        self._products(self._end, x, mixed)
        return to

    def _products(self, step: _Step, x: Tensor, mixed: Tensor | None = None) -> list[Tensor]:
        x = x.contiguous()
        step.R, step.x = x.shape[0], x.data_ptr()
        if mixed is not None:
            mixed = mixed.to(self.dtype).contiguous()
            step.mixed = mixed.data_ptr()
        outs = [torch.empty((x.shape[0], 1, step.products[i].n_out), dtype=self.dtype) for i in range(step.n_products)]
        for i, out in enumerate(outs):
            step.outs[i] = out.data_ptr()
        self._run(ctypes.byref(step))
        return outs

    def _step(
        self, before: Norm | None, products: list[nn.Linear], mix: nn.Linear | None = None, after: Norm | None = None
    ) -> _Step:
        step = _Step(bf16=self.dtype == torch.bfloat16, n_products=len(products))
        step.d = products[0].in_features if products else mix.out_features  # type: ignore[union-attr]
        for i, projection in enumerate(products):
            step.products[i] = self._matrix(projection)
        if mix is not None:
            step.mix = self._matrix(mix)
        if before is not None:
            step.before = self._norm(before)
        if after is not None:
            step.after = self._norm(after)
        return step

    def _matrix(self, projection: nn.Linear) -> _Matrix:
        return _Matrix(
            self._pointer(projection.weight, self.dtype),
            self._pointer(projection.bias, self.dtype),
            *projection.weight.shape,
        )

    def _norm(self, norm: Norm) -> _Norm:
        return _Norm(
            self._pointer(norm.weight, torch.float32), self._pointer(norm.bias, torch.float32), norm.eps, norm.centred
        )

    def _pointer(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        if tensor is None:
            return None
        kept = tensor.detach().to(dtype)
        self._kept.append(kept)
        return kept.data_ptr()


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n_out", ctypes.c_int64),
        ("n_in", ctypes.c_int64),
    )


class _Norm(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        ("centred", ctypes.c_int64),
    )


class _Step(ctypes.Structure):
    """Field by field the struct Step of decode_step.cpp."""

    _fields_ = (
        ("R", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("bf16", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("mixed", ctypes.c_void_p),
        ("mix", _Matrix),
        ("after", _Norm),
        ("before", _Norm),
        ("read", ctypes.c_void_p),
        ("n_products", ctypes.c_int64),
        ("products", _Matrix * 3),
        ("outs", ctypes.c_void_p * 3),
        ("gate", _Matrix),
        ("up", _Matrix),
        ("down", _Matrix),
        ("activation", ctypes.c_int64),
        ("last", _Norm),
    )
