"""The Transformer, whole: embedding, blocks of attention and feed-forward, norm, head.

Shapes: B batch, T new tokens (queries), S keys (T plus what a cache holds), V vocabulary, d d_model. What a block is made
of is in blocks.py; encoder.py and encoder_decoder.py put the same blocks together in other ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ctxlab.errors import IncompatibleError
from ctxlab.model.attention.base import ATTENTIONS, Attention
from ctxlab.model.base import ARCHITECTURES, Model, Segments, Side, pieces_of
from ctxlab.model.blocks import Block, Encoded, Frame, HeadLayer, Norm, Prefix, dropout
from ctxlab.model.cache import KVCache, StreamingCache
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position
from ctxlab.model.recurrence import SegmentMemory
from ctxlab.model.remake import Recompute


class Stack(nn.Module):
    """Tokens in, hidden states out: what a decoder and an encoder have in common. A subclass calls `_assemble` once.

    Raises IncompatibleError there where the scheme and the mechanism go together neither with each other nor with
    the sizes, nor with attention that looks ahead.
    """

    blocks: nn.ModuleList
    position: Position

    def _assemble(
        self,
        config: ModelConfig,
        position: Position.Config,
        attention: Attention.Config,
        context: int,
        *,
        causal: bool,
        crosses: bool = False,
        prefix: bool = False,
    ) -> None:
        mechanism = ATTENTIONS.get(attention.name)
        self.attention_name, self.streams, self.slides = attention.name, mechanism.streams, mechanism.slides
        mechanism.check_position(POSITIONS.get(position.name), position.name)
        mechanism.check_direction(attention, causal=causal and not prefix)
        self.position = POSITIONS.get(position.name)(position, config, context, causal=causal and not prefix)
        self.embedding_norm = Norm(config) if config.embedding_norm else None
        self.dropout = dropout(config)
        self.blocks = nn.ModuleList(
            Block(config, mechanism(attention, config, layer), layer, causal=causal, crosses=crosses)
            for layer in range(config.n_layers)
        )
        self.norm = Norm(config) if config.norm_place == "pre" else None

    def _run(
        self,
        embedding: nn.Embedding,
        tokens: Tensor,
        frame: Frame,
        *,
        cache: KVCache | None = None,
        past: Sequence[Tensor] | None = None,
        inputs: list[Tensor] | None = None,
        recompute: Recompute = "none",
    ) -> Tensor:
        """Every block in its turn, (B,T,d). past: what the blocks' inputs were before; `inputs` takes what they are now."""
        x = self.position.embed(embedding(tokens), frame.positions)  # (B,T,d)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x, x.dtype)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            if inputs is not None:
                inputs.append(x.detach())
            before = None if past is None else past[layer]
            if recompute == "block" and torch.is_grad_enabled():
                x = checkpoint(block, x, self.position, frame, None, before, use_reentrant=False)
            else:
                x = block(x, self.position, frame, None if cache is None else cache.layers[layer], before, recompute)
        return x.to(frame.dtype) if self.norm is None else self.norm(x, frame.dtype)

    def _initialize_blocks(self, config: ModelConfig) -> None:
        """What writes to the residual stream, and the scheme: see `Transformer.initialize`."""
        if config.norm_place == "pre":
            last = [matrix for block in self.blocks for matrix in block.last_matrices]  # type: ignore[union-attr]
            for matrix in last:
                nn.init.normal_(matrix.weight, std=0.02 / len(last) ** 0.5)
        self.position.initialize()

    def _n_position_table(self) -> int:
        return sum(p.numel() for p in self.position.parameters()) if self.position.form == "embedding" else 0

    def _frame(
        self,
        tokens: Tensor,
        dtype: torch.dtype,
        *,
        lengths: Tensor | None = None,
        segments: Segments | None = None,
        cache: KVCache | None = None,
        remembered: int = 0,
        encoded: Encoded | None = None,
        prefix: Prefix | None = None,
    ) -> Frame:
        """lengths: of rows whose padding a query would see."""
        B, T = tokens.shape
        device = tokens.device
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
            keys = self.position.tables(held, dtype) if apart else tables
            return Frame(dtype, positions, None, [tables], [keys], lengths, encoded, prefix)
        if cache is not None:
            raise ValueError("Transformer: a packed batch has no cache")
        pieces = pieces_of(segments, B, T)
        longest = torch.arange(max(size for size, _ in pieces), device=device)
        self.position.require_defined(max(size for size, is_document in pieces if is_document) - 1)
        positions = torch.cat([longest[:size] for size, _ in pieces]).view(B, T)
        made = {size: self.position.tables(longest[:size], dtype) for size, is_document in pieces if is_document}
        tables = [made.get(size) for size, _ in pieces]
        return Frame(dtype, positions, pieces, tables, tables)


@ARCHITECTURES.register("decoder")
class Transformer(Stack, Model):
    """A decoder-only Transformer language model.

    config: sizes and settings; position, attention: the settings of the scheme and the mechanism; context: the length it is
    trained at, of which only schemes with a table of positions take note.
    Raises IncompatibleError when the scheme cannot serve a model of these sizes.

    A causal query never looks at what follows it, which is why padding on the right needs no mask. Packed documents attend
    within themselves, at positions from 0. A memory is what the inputs of every block were in the segments before.

    A prefix LM (`prefix`; Raffel et al. 2020, arXiv:1910.10683, section 3.2.1) attends both ways within the first P tokens of
    a row, and behind them causally: query i sees j <= i or, where i < P, j < P. `hidden` takes P; without it a row has no
    prefix. Over an empty cache the tokens are a prefix whole (`all`) or not at all.
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
        prefix: bool = False,
    ) -> None:
        super().__init__(config, vocab_size=vocab_size, context=context)
        self.prefix = prefix
        self.carried_tokens = ATTENTIONS.get(attention.name).carried_tokens(attention)  # of the training step before
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self._assemble(
            config, position, attention, context, causal=self.causal, crosses=self.reads_source, prefix=prefix
        )
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, vocab_size, bias=False)
        self.head_layer = HeadLayer(config, vocab_size) if config.head_layer else None
        self._add_parts(position, attention)
        self.initialize()

    def _add_parts(self, position: Position.Config, attention: Attention.Config) -> None:
        """What a subclass has besides, made before anything is drawn."""

    def initialize(self) -> None:
        """Draws all parameters.

        Pre-norm: matrices have entries of standard deviation 0.02, those that write to the residual stream 0.02 / sqrt(n)
        for n of them, so that the stream's variance does not grow with depth (Radford et al. 2019, section 2.3).
        Post-norm, where every addition is followed by a norm: uniform within sqrt(6 / (in + out)) (Glorot and Bengio 2010,
        eq. 16), embeddings of standard deviation 1 / sqrt(d_model), as public implementations of the original have it.
        Biases are 0.
        """
        post = self.config.norm_place == "post"
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.d_model**-0.5 if post else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight) if post else nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Stack):
                module._initialize_blocks(self.config)

    def hidden(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        segments: Segments | None = None,
        cache: KVCache | None = None,
        memory: SegmentMemory | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        if prefix is not None:
            self._check_prefix(prefix, alone=segments is None and memory is None, cache=cache)
        if memory is None:
            return self._through(tokens, segments, cache, prefix=prefix)
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
        encoded: Encoded | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        frame = self._frame(
            tokens,
            self._compute_dtype(),
            segments=segments,
            cache=cache,
            remembered=0 if past is None else past[0].shape[1],
            encoded=encoded,
            prefix=prefix,
        )
        return self._run(self.embedding, tokens, frame, cache=cache, past=past, inputs=inputs, recompute=self.recompute)

    def _check_prefix(self, prefix: Prefix, *, alone: bool, cache: KVCache | None) -> None:
        if not self.prefix:
            raise ValueError("Transformer: it was not made to attend both ways within a prefix")
        if not alone or (cache is not None and (cache.length or isinstance(prefix, Tensor))):
            raise ValueError("Transformer: a prefix stands at the beginning of rows, and fills an empty cache whole")

    def logits(self, hidden: Tensor) -> Tensor:
        if self.head_layer is None:
            return super().logits(hidden)
        return F.linear(self.head_layer(hidden), self._head_weight, self.head_layer.bias)

    def losses(self, hidden: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        if self.head_layer is None:
            return super().losses(hidden, targets, smoothing)
        return self._losses(self.head_layer(hidden), self._head_weight, targets, smoothing, self.head_layer.bias)

    @classmethod
    def carrying(cls, config: ModelConfig, attention: Attention.Config) -> str:
        carried = ATTENTIONS.get(attention.name).carried_tokens(attention)
        return f"attention: {attention.name} carries a memory" if carried else ""

    @property
    def carries(self) -> bool:
        return self.carried_tokens > 0

    @property
    def n_positions(self) -> int | None:
        return self.position.n_positions

    def _of_tokens(self) -> Iterator[tuple[Tensor, Side]]:
        yield from super()._of_tokens()
        if self.head_layer is not None:
            yield self.head_layer.bias, "target"

    def new_cache(self) -> KVCache:
        return KVCache(self.config.n_layers)

    def new_streaming_cache(self, *, sinks: int, window: int) -> StreamingCache:
        return StreamingCache(self.config.n_layers, sinks=sinks, window=window)

    def new_memory(self, rows: int) -> SegmentMemory:
        device = self.embedding.weight.device
        return SegmentMemory(self.config.n_layers, rows, self.carried_tokens, self.config.d_model, device)

    def compile_blocks(self) -> None:
        """Has torch compile each block; those of one stack share the code of its first."""
        for module in list(self.modules()):
            if isinstance(module, Block):
                module.compile()

    def _n_embedding_parameters(self) -> int:
        return super()._n_embedding_parameters() + self._n_position_table()
