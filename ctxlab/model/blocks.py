"""What a Transformer is made of: norm, feed-forward layer, self-attention, cross-attention, and the block of them.

Shapes: B batch, T new tokens (queries), S keys (T plus what a cache holds, or a source's), d d_model, H query heads, Hkv
key-value heads, D head_dim. What a positional scheme does is in position/, who sees whom and how it is computed in
attention/; this file calls their hooks and knows none of them by name.

Under autocast the residual stream stays fp32 and every part reads it in the compute dtype, so that the projections of
one part share one cast.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ctxlab.errors import IncompatibleError
from ctxlab.model.attention.base import Attention
from ctxlab.model.attention.full import Full
from ctxlab.model.attention.native import Kernel
from ctxlab.model.cache import LayerCache
from ctxlab.model.config import ModelConfig
from ctxlab.model.decode_step import DecodeStep, step_of
from ctxlab.model.elementwise import gated, rms_norm, row_scale, scaled
from ctxlab.model.few import Projection
from ctxlab.model.offload import is_away
from ctxlab.model.position.base import Position
from ctxlab.model.remake import Recompute, remade


@dataclass(frozen=True)
class Encoded:
    """What an encoder has made of B sources: hidden (B,S,d), and lengths (B,) where some of them are padded."""

    hidden: Tensor
    lengths: Tensor | None = None

    def keep(self, rows: Tensor) -> Encoded:
        """These rows (n,) int64 of it, in this order; one may be there several times, or not at all."""
        return Encoded(self.hidden[rows], None if self.lengths is None else self.lengths[rows])


Prefix = Tensor | Literal["all"]
"""How many of a row's first tokens see all of one another, (B,) int64; or all tokens of a forward do."""


@dataclass(frozen=True)
class Frame:
    """Where the tokens of one forward stand: made once, read by every block."""

    dtype: torch.dtype  # of queries, keys, values and everything a matmul reads
    positions: Tensor  # (T,), or (B,T) when packed
    pieces: list[tuple[int, bool]] | None  # packed: (tokens, scored?) of each piece of the flattened batch
    queries: list[Any]  # the scheme's tables, one entry for the batch or one a piece
    keys: list[Any]  # the same for the keys: of all S positions where a cache holds raw keys, or there is a memory
    lengths: Tensor | None = None  # (B,) tokens before the padding, where a query would see that
    encoded: Encoded | None = None  # what cross-attention reads
    prefix: Prefix | None = None


class Norm(nn.Module):
    """RMSNorm or LayerNorm over d, computed in fp32, handed on in the dtype asked for."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.centred = config.norm == "layernorm"
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.bias = nn.Parameter(torch.zeros(config.d_model)) if self.centred and config.bias else None

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.centred:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps).to(dtype)
        return rms_norm(x, self.weight, self.eps, dtype)

    def of(self, x: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        """What makes the norm of x, as often as it is called, of RMSNorm from one pass over x for its statistics."""
        if self.centred:
            return lambda: self(x, dtype)
        r = row_scale(x, self.eps)
        return lambda: scaled(x, self.weight, r, dtype)


class FeedForward(nn.Module):
    """down(f(up(x))), or with a gate down(f(gate(x)) * up(x)); f is SiLU, GELU, its tanh approximation, or ReLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        if config.gated:
            self.gate = Projection(config.d_model, config.d_ff, bias=config.bias)
        self.up = Projection(config.d_model, config.d_ff, bias=config.bias)
        self.down = Projection(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, remakes: bool = False) -> Tensor:
        """`remakes`: what the last matrix reads is not kept for the backward pass but made again from what is.

        ReLU's own gradient needs that tensor, and not the one that it is made from.
        """
        gate = self.gate(x) if hasattr(self, "gate") else None
        up = self.up(x)
        hidden = self._hidden(gate, up)
        remakes = remakes and self.activation != "relu"
        with remade(hidden, lambda: self._hidden(gate, up)) if remakes else nullcontext():
            return self.down(hidden)

    def _hidden(self, gate: Tensor | None, up: Tensor) -> Tensor:
        return activated(up, self.activation) if gate is None else gated(gate, up, self.activation)  # type: ignore[arg-type]


def activated(x: Tensor, activation: str) -> Tensor:
    """f(x) of an activation without a gate."""
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class SelfAttention(nn.Module):
    """Projects to queries, keys and values, lets the positional scheme at them, and runs the mechanism."""

    def __init__(self, config: ModelConfig, mechanism: Attention, layer: int, *, causal: bool) -> None:
        super().__init__()
        self.layer, self.causal = layer, causal
        self.head_dim = config.head_dim
        self.query = Projection(config.d_model, config.n_heads * config.head_dim, bias=config.bias)
        self.key = Projection(config.d_model, config.n_kv_heads * config.head_dim, bias=config.bias)
        self.value = Projection(config.d_model, config.n_kv_heads * config.head_dim, bias=config.bias)
        self.out = Projection(config.n_heads * config.head_dim, config.d_model, bias=config.bias)
        self.mechanism = mechanism

    def forward(
        self, x: Tensor, position: Position, frame: Frame, cache: LayerCache | None, remembered: int = 0
    ) -> Tensor:
        """Of x (B,T,d), or with `remembered` tokens of memory before it (B,S,d), the new tokens' part: (B,T,d)."""
        q, k, v = (
            project(y).view(*y.shape[:2], -1, self.head_dim)
            for project, y in ((self.query, x[:, remembered:]), (self.key, x), (self.value, x))
        )
        if frame.pieces is None:  # q (B,T,H,D), k and v (B,T,Hkv,D), or (B,S,Hkv,D)
            mixed = self.attend(x, q, k, v, position, frame, cache)
        else:  # documents side by side: each attends within itself
            sizes = [size for size, _ in frame.pieces]
            parts = (t.flatten(0, 1).unsqueeze(0).split(sizes, dim=1) for t in (x, q, k, v))  # B*T tokens, cut
            mixed = torch.cat(
                [
                    self._attend(one_x, one_q, one_k, one_v, position, queries, keys, None)
                    if is_document
                    else one_q.new_zeros(1, size, self.out.in_features)
                    for (size, is_document), one_x, one_q, one_k, one_v, queries, keys in zip(
                        frame.pieces, *parts, frame.queries, frame.keys
                    )
                ],
                dim=1,
            ).view(*x.shape[:2], -1)
        return self.out(mixed)  # (B,T,d)

    def attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Position, frame: Frame, cache: LayerCache | None
    ) -> Tensor:
        """Of a frame that is not packed: what the heads say, (B,T,H*D), of q (B,T,H,D) and k, v (B,S,Hkv,D) projected from x."""
        return self._attend(x, q, k, v, position, frame.queries[0], frame.keys[0], cache, frame.lengths, frame.prefix)

    def _attend(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Position,
        queries: Any,
        keys: Any,
        cache: LayerCache | None,
        lengths: Tensor | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B,H,T,D), (B,Hkv,T,D) twice
        state, carry = position.prepare(x, self.layer, None if cache is None else cache.carry)
        raw, q = q, position.query(q, queries, state)
        if cache is None:
            k = position.key(k, keys, state)
        elif self.mechanism.keeps_sums:
            k = position.key(k, keys, state)
            out, sums = self.mechanism.recall(q, k, v, cache.sums)
            cache.sums = sums.detach()
            if prefix is not None:
                out, _ = self.mechanism(q, k, v, scale=position.scale, causal=False)
            return out.transpose(1, 2).flatten(2)
        else:
            if cache.raw and carry is not None:
                raise IncompatibleError(
                    f"position: {position.config.name} carries sums over all tokens, of which a streaming cache drops most"
                )
            cache.carry = carry
            if position.caches_raw_keys or cache.raw:
                k, v = cache.append(k, v)
                k = position.key(k, keys, state)
            else:
                first = self.mechanism.first_needed(cache.seen)
                k, v = cache.append(position.key(k, keys, state), v, first=first)  # (B,Hkv,S,D) twice
        bias = position.bias(raw, k.shape[2], state)
        causal = self.causal and prefix != "all"
        if isinstance(prefix, Tensor):
            out = self._with_prefix(q, k, v, prefix, scale=position.scale, bias=bias)
        else:
            out, _ = self.mechanism(q, k, v, scale=position.scale, causal=causal, bias=bias, lengths=lengths)
        return out.transpose(1, 2).flatten(2)  # (B,T,H*D)

    def _with_prefix(self, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, **settings: Any) -> Tensor:
        """Query i of a row sees the keys j <= i, and with i < P all j < P, P = prefix (B,): (B,H,T,Dv).

        A query behind the prefix sees what causality shows it, one in it what it would if the row ended there: no row of a
        softmax is of both kinds, so each of two attentions that any kernel knows gives some rows, whole.
        """
        behind, _ = self.mechanism(q, k, v, causal=True, lengths=None, **settings)
        within, _ = self.mechanism(q, k, v, causal=False, lengths=prefix, **settings)
        inside = torch.arange(q.shape[2], device=q.device) < prefix[:, None]  # (B,T)
        return torch.where(inside[:, None, :, None], within, behind)


class CrossAttention(nn.Module):
    """Every token attends to all of an encoded source, wherever it stands: no position enters, and no mechanism but
    the full one.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j, q from the tokens, k and v from the source: Vaswani et al. 2017,
    arXiv:1706.03762, section 3.2.3.
    """

    def __init__(self, config: ModelConfig, kernel: Kernel) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query = Projection(config.d_model, config.n_heads * config.head_dim, bias=config.bias)
        self.key = Projection(config.d_model, config.n_kv_heads * config.head_dim, bias=config.bias)
        self.value = Projection(config.d_model, config.n_kv_heads * config.head_dim, bias=config.bias)
        self.out = Projection(config.n_heads * config.head_dim, config.d_model, bias=config.bias)
        self.mechanism = Full(Full.Config(kernel=kernel), config, 0)

    def forward(self, x: Tensor, encoded: Encoded, cache: LayerCache | None) -> Tensor:
        """x (B,T,d), encoded.hidden (B,S,d) -> (B,T,d)."""
        return self.out(self.attend(self.query(x), encoded, cache))

    def attend(self, queries: Tensor, encoded: Encoded, cache: LayerCache | None) -> Tensor:
        """What the heads say to queries (B,T,H*D), as wide. A cache keeps the source's keys and values, made once."""
        if cache is None:
            k, v = self.project(encoded)
        else:
            if cache.source is None:
                k, v = self.project(encoded)
                cache.source = k.detach(), v.detach()
            k, v = cache.source
        q = self._heads(queries)  # (B,H,T,D)
        out, _ = self.mechanism(q, k, v, scale=self.head_dim**-0.5, causal=False, lengths=encoded.lengths)
        return out.transpose(1, 2).flatten(2)

    def project(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Keys and values of the source, (B,Hkv,S,D) twice."""
        return self._heads(self.key(encoded.hidden)), self._heads(self.value(encoded.hidden))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    """Attention, cross-attention in a decoder that reads a source, and the feed-forward layer; each adds to what it read.

    Pre-norm: x + f(norm(x)). Post-norm, as in the original (Vaswani et al. 2017, section 3.1): norm(x + f(x)).
    """

    def __init__(self, config: ModelConfig, mechanism: Attention, layer: int, *, causal: bool, crosses: bool) -> None:
        super().__init__()
        self.post_norm = config.norm_place == "post"
        self.attention_norm = Norm(config)
        self.attention = SelfAttention(config, mechanism, layer, causal=causal)
        self.cross_attention_norm = Norm(config) if crosses else None
        self.cross_attention = CrossAttention(config, mechanism.config.kernel) if crosses else None
        self.feed_forward_norm = Norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = dropout(config)

    def forward(
        self,
        x: Tensor,
        position: Position,
        frame: Frame,
        cache: LayerCache | None,
        past: Tensor | None = None,
        recompute: Recompute = "block",
    ) -> Tensor:
        """x (B,T,d) on to the next block; past (B,n,d): what this block's inputs were at the n tokens before.

        `recompute`: what backward makes again is left to the caller where it is the block, whole. Else it is outputs of norms
        and of the activation function, and where selective what they and the feed-forward layer are made from. torch.compile
        chooses for itself what to keep, and what is kept elsewhere (offload.py) needs no making.
        """
        if (step := step_of(self, x, frame, cache)) is not None and cache is not None:
            return self._decoded(step, x, position, frame, cache)
        remakes = (
            recompute != "block" and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_away()
        )
        seen = x if past is None else torch.cat([past, x], dim=1)  # (B,S,d)
        read, kept = self._read(self.attention_norm, seen, frame, remakes)
        with kept:
            attended = self.attention(read, position, frame, cache, 0 if past is None else past.shape[1])
        x = self._add(self.attention_norm, x, attended)
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            assert frame.encoded is not None
            read, kept = self._read(self.cross_attention_norm, x, frame, remakes)
            with kept:
                crossed = self.cross_attention(read, frame.encoded, cache)
            x = self._add(self.cross_attention_norm, x, crossed)
        if recompute == "selective" and torch.is_grad_enabled():
            mapped = checkpoint(self._mapped, x, frame, False, use_reentrant=False)
        else:
            mapped = self._mapped(x, frame, remakes)
        return self._add(self.feed_forward_norm, x, mapped)

    def _decoded(self, step: DecodeStep, x: Tensor, position: Position, frame: Frame, cache: LayerCache) -> Tensor:
        """`forward` of one token a row: all but attention compiled."""
        attention = self.attention
        read, *projected = step.begin(x)
        q, k, v = (y.view(x.shape[0], 1, -1, attention.head_dim) for y in projected)
        mixed = attention.attend(read, q, k, v, position, frame, cache)
        if self.cross_attention is not None:
            assert frame.encoded is not None
            x, queries = step.cross(x, mixed)
            mixed = self.cross_attention.attend(queries, frame.encoded, cache)
        return step.end(x, mixed)

    def _mapped(self, x: Tensor, frame: Frame, remakes: bool) -> Tensor:
        """What the feed-forward layer says to the residual stream x."""
        read, kept = self._read(self.feed_forward_norm, x, frame, remakes)
        with kept:
            return self.feed_forward(read, remakes)

    @property
    def last_matrices(self) -> list[nn.Linear]:
        """Those that write to the residual stream."""
        crossing = [] if self.cross_attention is None else [self.cross_attention.out]
        return [self.attention.out, *crossing, self.feed_forward.down]

    def _read(self, norm: Norm, x: Tensor, frame: Frame, remakes: bool) -> tuple[Tensor, AbstractContextManager[None]]:
        """What a part reads of the residual stream, and what to read it in: there it is not kept for the backward pass."""
        if self.post_norm:
            return x.to(frame.dtype), nullcontext()
        if not remakes:
            return norm(x, frame.dtype), nullcontext()
        made = norm.of(x, frame.dtype)
        once = made()
        return once, remade(once, made)

    def _add(self, norm: Norm, x: Tensor, new: Tensor) -> Tensor:
        x = x + (self.dropout(new) if self.training else new)
        return norm(x, x.dtype) if self.post_norm else x


class HeadLayer(nn.Module):
    """norm(f(W h + b)) before the output matrix and a bias on its logits: the head of BERT (Devlin et al. 2019,
    arXiv:1810.04805; google-research/bert, run_pretraining.py)."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.dense = Projection(config.d_model, config.d_model, bias=config.bias)
        self.norm = Norm(config)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """(...,d) -> what the output matrix reads, (...,d)."""
        return self.norm(activated(self.dense(hidden), self.activation), hidden.dtype)


def dropout(config: ModelConfig) -> nn.Module:
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()
