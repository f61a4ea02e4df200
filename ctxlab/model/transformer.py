"""The Transformer, whole: embedding, blocks of attention and feed-forward, norm, head.

Shapes: B batch, T new tokens (queries), S keys (T plus what a cache holds), V vocabulary, d d_model, H query heads, Hkv
key-value heads, D head_dim. What a positional scheme does is in position/, who sees whom and how it is computed in
attention/; this file calls their hooks and knows none of them by name.

Under autocast the residual stream stays fp32 and every norm hands its result on in the compute dtype, so that the
projections behind it share one cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ctxlab.errors import IncompatibleError
from ctxlab.model.attention.base import ATTENTIONS, Attention
from ctxlab.model.base import ARCHITECTURES, Model, Segments, pieces_of
from ctxlab.model.cache import KVCache, LayerCache, StreamingCache
from ctxlab.model.config import ModelConfig
from ctxlab.model.elementwise import rms_norm, swiglu
from ctxlab.model.position.base import POSITIONS, Position
from ctxlab.model.recurrence import SegmentMemory
from ctxlab.model.remake import RecomputeSetting, remade


@dataclass(frozen=True)
class Frame:
    """Where the tokens of one forward stand: made once, read by every block."""

    dtype: torch.dtype  # of queries, keys, values and everything a matmul reads
    positions: Tensor  # (T,), or (B,T) when packed
    pieces: list[tuple[int, bool]] | None  # packed: (tokens, scored?) of each piece of the flattened batch
    queries: list[Any]  # the scheme's tables, one entry for the batch or one a piece
    keys: list[
        Any
    ]  # the same for the keys: those of all S positions where a cache holds raw keys, or there is a memory


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


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) with SwiGLU, down(gelu(up(x))) without."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        if config.activation == "swiglu":
            self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, remakes: bool = False) -> Tensor:
        """`remakes`: what the last matrix reads is not kept for the backward pass but made again from what is."""
        up = self.up(x)
        gate = self.gate(x) if self.activation == "swiglu" else None
        inner = self._activated(gate, up)
        if not remakes:
            return self.down(inner)
        with remade(inner, lambda: self._activated(gate, up)):
            return self.down(inner)

    def _activated(self, gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is not None:
            return swiglu(gate, up)
        return F.gelu(up, approximate="tanh" if self.activation == "gelu_tanh" else "none")


class SelfAttention(nn.Module):
    """Projects to queries, keys and values, lets the positional scheme at them, and runs the mechanism."""

    def __init__(self, config: ModelConfig, mechanism: Attention, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.d_model, config.n_heads * config.head_dim, bias=config.bias)
        self.key = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=config.bias)
        self.value = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=config.bias)
        self.out = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=config.bias)
        self.mechanism = mechanism

    def forward(
        self, x: Tensor, position: Position, frame: Frame, cache: LayerCache | None, remembered: int = 0
    ) -> Tensor:
        """Of x (B,T,d), or with `remembered` tokens of memory before it (B,S,d), the new tokens' part: (B,T,d)."""
        q, k, v = (
            project(y).unflatten(-1, (-1, self.head_dim))
            for project, y in ((self.query, x[:, remembered:]), (self.key, x), (self.value, x))
        )
        if frame.pieces is None:  # q (B,T,H,D), k and v (B,T,Hkv,D), or (B,S,Hkv,D)
            mixed = self._attend(x, q, k, v, position, frame.queries[0], frame.keys[0], cache)
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
    ) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B,H,T,D), (B,Hkv,T,D) twice
        state, carry = position.prepare(x, self.layer, None if cache is None else cache.carry)
        raw, q = q, position.query(q, queries, state)
        if cache is None:
            k = position.key(k, keys, state)
        elif self.mechanism.keeps_sums:
            out, sums = self.mechanism.recall(q, position.key(k, keys, state), v, cache.sums)
            cache.sums = sums.detach()
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
        out, _ = self.mechanism.attend(q, k, v, scale=position.scale, causal=True, bias=bias)
        return out.transpose(1, 2).flatten(2)  # (B,T,H*D)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): the norms come first."""

    def __init__(self, config: ModelConfig, mechanism: Attention, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config)
        self.attention = SelfAttention(config, mechanism, layer)
        self.feed_forward_norm = Norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = _dropout(config)

    def forward(
        self,
        x: Tensor,
        position: Position,
        frame: Frame,
        cache: LayerCache | None,
        past: Tensor | None = None,
        remakes: bool = False,
    ) -> Tensor:
        """x (B,T,d) on to the next block; past (B,n,d): what this block's inputs were at the n tokens before.

        `remakes`: backward makes outputs of norms and of the activation function again, which are then not kept.
        """
        seen = x if past is None else torch.cat([past, x], dim=1)  # (B,S,d)
        normed = self.attention_norm(seen, frame.dtype)
        with remade(normed, lambda: self.attention_norm(seen, frame.dtype)) if remakes else nullcontext():
            attended = self.attention(normed, position, frame, cache, 0 if past is None else past.shape[1])
        del normed
        y = x + self.dropout(attended)
        normed = self.feed_forward_norm(y, frame.dtype)
        with remade(normed, lambda: self.feed_forward_norm(y, frame.dtype)) if remakes else nullcontext():
            mapped = self.feed_forward(normed, remakes)
        return y + self.dropout(mapped)


@ARCHITECTURES.register("decoder")
class Transformer(Model):
    """A decoder-only Transformer language model.

    config: sizes and settings; position, attention: the settings of the scheme and the mechanism; context: the length it is
    trained at, of which only schemes with a table of positions take note.
    Raises IncompatibleError when the scheme cannot serve a model of these sizes.

    A causal query never looks at what follows it, which is why padding on the right needs no mask. Packed documents attend
    within themselves, at positions from 0. A memory is what the inputs of every block were in the segments before.
    """

    Config = ModelConfig
    parts = ("position", "attention")

    def __init__(
        self,
        config: ModelConfig,
        position: Position.Config,
        attention: Attention.Config,
        *,
        vocab_size: int,
        context: int,
    ) -> None:
        super().__init__(config, vocab_size=vocab_size, context=context)
        mechanism = ATTENTIONS.get(attention.name)
        self.carried_tokens = mechanism.carried_tokens(attention)  # that a training step sees of the step before
        self.attention_name, self.streams, self.slides = attention.name, mechanism.streams, mechanism.slides
        mechanism.check_position(POSITIONS.get(position.name), position.name)
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.position = POSITIONS.get(position.name)(position, config, context)
        self.embedding_norm = Norm(config) if config.embedding_norm else None
        self.dropout = _dropout(config)
        self.blocks = nn.ModuleList(
            Block(config, mechanism(attention, config, layer), layer) for layer in range(config.n_layers)
        )
        self.norm = Norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, vocab_size, bias=False)
        self.initialize()

    def initialize(self) -> None:
        """Draws all parameters.

        Matrices have entries of standard deviation 0.02, those that write to the residual stream 0.02 / sqrt(2 n_layers), so
        that the stream's variance does not grow with depth (Radford et al. 2019, section 2.3); biases are 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, Block)
            for last in (block.attention.out, block.feed_forward.down):
                nn.init.normal_(last.weight, std=0.02 / (2 * self.config.n_layers) ** 0.5)
        self.position.initialize()

    def hidden(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        segments: Segments | None = None,
        cache: KVCache | None = None,
        memory: SegmentMemory | None = None,
    ) -> Tensor:
        if memory is None:
            return self._through(tokens, segments, cache)
        if segments is not None or cache is not None:
            raise ValueError("Transformer: a memory goes with neither a cache nor a packed batch")
        parts: list[tuple[Tensor, Tensor]] = []
        for rows, past in memory.groups():  # one, but for the rows whose document has just begun
            inputs: list[Tensor] = []
            parts.append((rows, self._through(tokens[rows], None, None, past, inputs)))
            memory.append(rows, inputs)
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return torch.cat([hidden for _, hidden in parts])[order]

    def _through(
        self,
        tokens: Tensor,
        segments: Segments | None,
        cache: KVCache | None,
        past: Sequence[Tensor] | None = None,
        inputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Every block in its turn. past: what the blocks' inputs were before; `inputs` takes what they are now."""
        frame = self._frame(tokens, segments, cache, 0 if past is None else past[0].shape[1])
        x = self.position.embed(self.embedding(tokens), frame.positions)  # (B,T,d)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x, x.dtype)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            if inputs is not None:
                inputs.append(x.detach())
            before = None if past is None else past[layer]
            if self.recompute == "block" and torch.is_grad_enabled():
                x = checkpoint(block, x, self.position, frame, None, before, use_reentrant=False)
            else:
                remakes = self.recompute == "selective" and torch.is_grad_enabled()
                x = block(x, self.position, frame, None if cache is None else cache.layers[layer], before, remakes)
        return self.norm(x, frame.dtype)

    @classmethod
    def check_training(cls, config: ModelConfig, *, packed: bool, compiled: bool, recompute: RecomputeSetting) -> None:
        if compiled and recompute in ("selective", "auto"):
            raise IncompatibleError(
                "trainer.recompute: a compiled block (trainer.compile) is made again whole or not at all; use block or none"
            )

    @classmethod
    def carrying(cls, config: ModelConfig, attention: Attention.Config) -> str:
        carried = ATTENTIONS.get(attention.name).carried_tokens(attention)
        return f"attention: {attention.name} carries a memory" if carried else ""

    @property
    def carries(self) -> bool:
        return self.carried_tokens > 0

    def new_cache(self) -> KVCache:
        return KVCache(self.config.n_layers)

    def new_streaming_cache(self, *, sinks: int, window: int) -> StreamingCache:
        return StreamingCache(self.config.n_layers, sinks=sinks, window=window)

    def new_memory(self, rows: int) -> SegmentMemory:
        device = self.embedding.weight.device
        return SegmentMemory(self.config.n_layers, rows, self.carried_tokens, self.config.d_model, device)

    def compile_blocks(self) -> None:
        """Has torch compile each block; all of them share the code of the first."""
        for block in self.blocks:
            block.compile()

    def _n_embedding_parameters(self) -> int:
        table = sum(p.numel() for p in self.position.parameters()) if self.position.form == "embedding" else 0
        return super()._n_embedding_parameters() + table

    def _frame(self, tokens: Tensor, segments: Segments | None, cache: KVCache | None, remembered: int) -> Frame:
        B, T = tokens.shape
        device = tokens.device
        dtype = self._compute_dtype()
        if segments is None:
            if cache is None:
                self.position.require_defined(remembered + T - 1)
                held = torch.arange(remembered + T, device=device)
                positions = held[remembered:]
            else:
                if cache.raw and self.position.form == "embedding":
                    raise IncompatibleError(
                        f"position: {self.position.config.name} is part of the keys and values themselves, which a "
                        "streaming cache cannot move to other positions"
                    )
                if cache.raw and not (self.streams or (self.slides and not cache.sinks)):
                    raise IncompatibleError(
                        f"decoding.cache: a streaming cache drops tokens and closes ranks, which {self.attention_name} "
                        f"attention cannot follow; use full{', or no sinks' if self.slides else ''}"
                    )
                self.position.require_defined(cache.last_after(T))
                positions, held = cache.advance(T, device)
            tables = self.position.tables(positions, dtype)
            apart = remembered > 0 or (cache is not None and (self.position.caches_raw_keys or cache.raw))
            return Frame(dtype, positions, None, [tables], [self.position.tables(held, dtype) if apart else tables])
        if cache is not None:
            raise ValueError("Transformer: a packed batch has no cache")
        pieces = pieces_of(segments, B, T)
        longest = torch.arange(max(size for size, _ in pieces), device=device)
        self.position.require_defined(max(size for size, is_document in pieces if is_document) - 1)
        positions = torch.cat([longest[:size] for size, _ in pieces]).view(B, T)
        made = {size: self.position.tables(longest[:size], dtype) for size, is_document in pieces if is_document}
        tables = [made.get(size) for size, _ in pieces]
        return Frame(dtype, positions, pieces, tables, tables)


def _dropout(config: ModelConfig) -> nn.Module:
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()
