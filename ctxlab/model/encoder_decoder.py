"""The encoder-decoder: an encoder reads the source once, and a decoder that looks at all of it writes the target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ctxlab.errors import IncompatibleError
from ctxlab.model.attention.base import Attention
from ctxlab.model.base import ARCHITECTURES, Segments, Side
from ctxlab.model.blocks import Encoded, Prefix
from ctxlab.model.cache import KVCache
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import Position
from ctxlab.model.recurrence import SegmentMemory
from ctxlab.model.transformer import Stack, Transformer


class SourceEncoder(Stack):
    """The encoder of an encoder-decoder: blocks without a causal mask, a scheme of its own, no head.

    `embedding` is its own, or None where it reads the decoder's.
    """

    def __init__(
        self,
        config: ModelConfig,
        position: Position.Config,
        attention: Attention.Config,
        *,
        vocab_size: int,
        context: int,
    ) -> None:
        super().__init__()
        self.embedding = None if config.share_embeddings else nn.Embedding(vocab_size, config.d_model)
        self._assemble(config, position, attention, context, causal=False)


@ARCHITECTURES.register("encoder_decoder")
class EncoderDecoder(Transformer):
    """The original Transformer (Vaswani et al. 2017, arXiv:1706.03762), T5, and two BERTs with cross-attention.

    It is the decoder, whose blocks also attend to an encoded source, and `encoder` beside it. Both have the same scheme and
    mechanism, each with parameters of its own; the scheme has to tell order without a causal mask. Cross-attention knows no
    positions.

        encoded = model.encode(source, source_lengths)
        model(tokens, encoded=encoded)                         or model(tokens, source=source, source_lengths=...)
        model(tokens, encoded=encoded, cache=cache)            goes on; the source's keys and values are made once

    source_vocab_size: where source and target have vocabularies of their own, which takes share_embeddings=false.
    Rows of a cache and of what is encoded go together: `cache.keep(rows)` with `encoded.keep(rows)`.
    """

    reads_source = True

    def __init__(
        self,
        config: ModelConfig,
        position: Position.Config,
        attention: Attention.Config,
        *,
        vocab_size: int,
        context: int,
        source_vocab_size: int | None = None,
    ) -> None:
        self.source_vocab_size = vocab_size if source_vocab_size is None else source_vocab_size
        if config.share_embeddings and self.source_vocab_size != vocab_size:
            raise IncompatibleError(
                f"model.share_embeddings: the source has {self.source_vocab_size} tokens and the target {vocab_size}, which "
                "one matrix cannot embed; use false"
            )
        super().__init__(config, position, attention, vocab_size=vocab_size, context=context)

    def _add_parts(self, position: Position.Config, attention: Attention.Config) -> None:
        self.encoder = SourceEncoder(
            self.config.of_encoder(),
            position,
            attention,
            vocab_size=self.source_vocab_size,
            context=self.context,
        )

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> Encoded:
        """What cross-attention reads of sources (B,S), right-padded with `lengths` (B,), each of at least one token."""
        embedding = self.embedding if self.encoder.embedding is None else self.encoder.embedding
        frame = self.encoder._frame(source, self._compute_dtype(), lengths=lengths)
        return Encoded(self.encoder._run(embedding, source, frame, recompute=self.recompute), lengths)

    def forward(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """The logits of the token behind each of `tokens`, (B,T,V), from what `hidden` takes."""
        return self.logits(self.hidden(tokens, **inputs))

    def hidden(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        segments: Segments | None = None,
        cache: KVCache | None = None,
        memory: SegmentMemory | None = None,
        prefix: Prefix | None = None,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        encoded: Encoded | None = None,
    ) -> Tensor:
        if segments is not None or memory is not None or prefix is not None:
            raise ValueError(
                "EncoderDecoder: each row has a source; it takes neither a packed batch nor a memory, nor a prefix"
            )
        if (source is None) == (encoded is None):
            raise ValueError("EncoderDecoder: expected a source, or what it was encoded to")
        if encoded is None:
            assert source is not None
            encoded = self.encode(source, source_lengths)
        return self._through(tokens, None, cache, encoded=encoded)

    def _of_tokens(self) -> Iterator[tuple[Tensor, Side]]:
        yield from super()._of_tokens()
        if self.encoder.embedding is not None:
            yield self.encoder.embedding.weight, "source"

    def _n_embedding_parameters(self) -> int:
        own = 0 if self.encoder.embedding is None else self.encoder.embedding.weight.numel()
        return super()._n_embedding_parameters() + own + self.encoder._n_position_table()
