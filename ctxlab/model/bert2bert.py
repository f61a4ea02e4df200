"""An encoder and a decoder of Hugging Face's BertModel: the few lines that books show, with what they need to work.

Those lines are `Encoder` and `Decoder`; `Bert2Bert` puts them behind the contract of a model, so that they train, translate and
are measured as any other. The library (optional: `pip install 'ctxlab[hf]'`) is imported where a model is built.

Shapes: B batch, T target tokens, S source tokens, V vocabulary, d width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctxlab.errors import ConfigError, IncompatibleError, UndefinedBeyondTraining
from ctxlab.model.attention.full import Full
from ctxlab.model.base import ARCHITECTURES, Model, Segments, Side
from ctxlab.model.bert_weights import read_folder, take, under_our_names
from ctxlab.model.blocks import Encoded
from ctxlab.model.config import BERT_EPS, Bert2BertConfig
from ctxlab.model.count import BERT_TYPES
from ctxlab.model.encoder_decoder import EncoderDecoder
from ctxlab.model.position.learned import Learned
from ctxlab.model.recurrence import SegmentMemory
from ctxlab.model.remake import RecomputeSetting

INSTALL = "model: bert2bert is made of Hugging Face's BertModel; pip install 'ctxlab[hf]'"
_STD = 0.02  # of BERT's own initial weights


class Encoder(nn.Module):
    """A BertModel that reads a source: (B,S) -> (B,S,d). attention_mask (B,S): 1 where there is a token, 0 in the padding."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.bert = _bert(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return _read(self.bert, input_ids, attention_mask)


class Decoder(nn.Module):
    """A BertModel that writes a target with BERT's own head: (B,T), and what `Encoder` made of (B,S) -> logits (B,T,V).

    Its config is made a decoder's, with cross-attention. A BertModel whose config says neither takes encoder_hidden_states and
    reads nothing of them, and every token sees those behind it: it learns to copy its input and never translates.

        logits = decoder(target, encoder(source, mask), mask)
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

        config = copy.deepcopy(config)
        config.is_decoder = config.add_cross_attention = True
        self.bert = _bert(config)
        self.transform = BertPredictionHeadTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))  # the head's matrix is that of the embeddings
        nn.init.normal_(self.transform.dense.weight, std=_STD)
        nn.init.zeros_(self.transform.dense.bias)

    @property
    def embedding(self) -> nn.Embedding:
        """Of tokens, read and written."""
        found: nn.Embedding = self.bert.embeddings.word_embeddings
        return found

    def forward(
        self, input_ids: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None = None
    ) -> Tensor:
        return self.logits(self.hidden(input_ids, encoder_hidden_states, encoder_attention_mask))

    def hidden(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        cache: BertCache | None = None,
    ) -> Tensor:
        """What the head reads, (B,T,d), of tokens behind those that the cache holds."""
        return _read(self.bert, input_ids, None, encoder_hidden_states, encoder_attention_mask, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """(...,d) -> (...,V)."""
        return F.linear(self.transform(hidden), self.embedding.weight, self.bias)


class BertCache:
    """Hugging Face's own cache of a decoder's keys and values, and of the source's, which are made once."""

    def __init__(self) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        self.held: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())

    @property
    def length(self) -> int:
        return int(self.held.get_seq_length())

    @property
    def bytes(self) -> int:
        layers = [*self.held.self_attention_cache.layers, *self.held.cross_attention_cache.layers]
        return sum(part.numel() * part.element_size() for layer in layers for part in (layer.keys, layer.values))

    @property
    def allocated_bytes(self) -> int:
        return self.bytes

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows."""
        if self.length:
            self.held.batch_select_indices(rows)


@ARCHITECTURES.register("bert2bert")
class Bert2Bert(Model):
    """Two BERTs (Devlin et al. 2019, arXiv:1810.04805), the second of which also attends to what the first has read.

    As Rothe et al. 2020, arXiv:1907.12461, put them together (BERT2BERT) and Hugging Face's EncoderDecoderModel does, whose
    logits it has. Each half has embeddings of its own for tokens, positions and the two types of tokens, of which the first is
    used. The head is BERT's: a dense layer, GELU, a norm, the matrix of the decoder's embeddings, a bias. `as_ours` is the
    same function in parts of this package.

    Weights begin as BERT's own do, normal with a standard deviation of 0.02, or are those of a folder (`pretrained`): of one
    BERT in both halves, cross-attention as drawn, or of both halves. Embeddings of tokens and the head's bias come along only
    where it is said that the tokens are the same (`pretrained_tokens`).
    """

    Config = Bert2BertConfig
    why_without = "brings BERT's"
    reads_source = True
    head = None

    def __init__(
        self, config: Bert2BertConfig, *, vocab_size: int, context: int, source_vocab_size: int | None = None
    ) -> None:
        self.check_installed()
        super().__init__(config, vocab_size=vocab_size, context=context)
        self.source_vocab_size = vocab_size if source_vocab_size is None else source_vocab_size
        self.encoder = Encoder(bert_config(config, config.n_encoder_layers, self.source_vocab_size, context))
        self.decoder = Decoder(bert_config(config, config.n_layers, vocab_size, context))

    @property
    def embedding(self) -> nn.Embedding:  # type: ignore[override]
        return self.decoder.embedding

    @classmethod
    def check_installed(cls) -> None:
        try:
            import transformers
            import transformers.models.bert.modeling_bert
        except ImportError as error:
            raise ConfigError(INSTALL + ("" if error.name == "transformers" else f" ({error})")) from error
        if int(transformers.__version__.split(".")[0]) != 5:
            raise ConfigError(f"{INSTALL} (transformers {transformers.__version__} is here, of which 5 is known)")

    @classmethod
    def check_training(
        cls, config: Bert2BertConfig, *, packed: bool, compiled: bool, recompute: RecomputeSetting
    ) -> None:
        if packed:
            raise IncompatibleError("data.packed: each row of two BERTs has a source (model=bert2bert); use false")
        if compiled:
            raise IncompatibleError("trainer.compile: BERT's layers are run as they come (model=bert2bert); use false")
        if recompute not in ("none", "auto"):
            raise IncompatibleError("trainer.recompute: BERT's layers are not run again (model=bert2bert); use none")

    @property
    def n_positions(self) -> int | None:
        return self.context

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> Encoded:
        """What the decoder reads of sources (B,S), right-padded with `lengths` (B,), each of at least one token."""
        self._require_defined(source.shape[1])
        return Encoded(self.encoder(source, _mask(source.shape[1], lengths)).to(self._compute_dtype()), lengths)

    def forward(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """The logits of the token behind each of `tokens`, (B,T,V), from what `hidden` takes."""
        return self.logits(self.hidden(tokens, **inputs))

    def hidden(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        segments: Segments | None = None,
        cache: BertCache | None = None,
        memory: SegmentMemory | None = None,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        encoded: Encoded | None = None,
    ) -> Tensor:
        if segments is not None or memory is not None:
            raise ValueError("Bert2Bert: each row has a source; it takes neither a packed batch nor a memory")
        if (source is None) == (encoded is None):
            raise ValueError("Bert2Bert: expected a source, or what it was encoded to")
        if encoded is None:
            assert source is not None
            encoded = self.encode(source, source_lengths)
        self._require_defined((0 if cache is None else cache.length) + tokens.shape[1])
        mask = _mask(encoded.hidden.shape[1], encoded.lengths)
        return self.decoder.hidden(tokens, encoded.hidden, mask, cache).to(self._compute_dtype())

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden)

    def losses(self, hidden: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        read = self.decoder.transform(hidden).to(hidden.dtype)
        return self._losses(read, self.embedding.weight, targets, smoothing, self.decoder.bias)

    def new_cache(self) -> BertCache:
        return BertCache()

    def new_streaming_cache(self, *, sinks: int, window: int) -> NoReturn:
        raise IncompatibleError(
            "decoding.cache: BERT's positions are part of the keys and values themselves, which a streaming cache cannot move "
            "to other positions (model=bert2bert); use full"
        )

    def compile_blocks(self) -> NoReturn:
        raise IncompatibleError("trainer.compile: BERT's layers are run as they come (model=bert2bert); use false")

    def as_ours(self) -> EncoderDecoder:
        ours: dict[str, Tensor] = under_our_names(self.decoder.bert, crosses=True)
        ours |= {f"encoder.{name}": weight for name, weight in under_our_names(self.encoder.bert).items()}
        ours["head_layer.bias"] = self.decoder.bias
        for end in ("weight", "bias"):
            ours[f"head_layer.dense.{end}"] = getattr(self.decoder.transform.dense, end)
            ours[f"head_layer.norm.{end}"] = getattr(self.decoder.transform.LayerNorm, end)
        with torch.device("meta"):
            made = EncoderDecoder(
                self.config.as_ours(), Learned.Config(), Full.Config(),
                vocab_size=self.vocab_size, context=self.context, source_vocab_size=self.source_vocab_size,
            )  # fmt: skip
        made.load_state_dict({name: weight.detach() for name, weight in ours.items()}, assign=True)
        return made.train(self.training)

    def take_pretrained(self) -> None:
        if self.config.pretrained == "none":
            return
        halves, head = read_folder(Path(self.config.pretrained).expanduser(), self.config, self.context)
        folder = self.config.pretrained
        for mine, theirs, tokens in (
            (self.encoder.bert, halves[0], self.source_vocab_size),
            (self.decoder.bert, halves[1], self.vocab_size),
        ):
            there = len(theirs["embeddings.word_embeddings.weight"])
            if self.config.pretrained_tokens and there != tokens:
                raise ConfigError(
                    f"model.pretrained_tokens: {folder} has {there} tokens and the tokenizer {tokens}; use false"
                )
            take(mine, theirs, self.config.pretrained_tokens, folder)
        for name, weight in head.items():
            if name != "bias" or self.config.pretrained_tokens:
                self.decoder.get_parameter(name).data.copy_(weight)

    def _of_tokens(self) -> Iterator[tuple[Tensor, Side]]:
        yield from super()._of_tokens()
        yield self.decoder.bias, "target"
        yield self.encoder.bert.embeddings.word_embeddings.weight, "source"

    def _of_positions(self) -> Iterator[nn.Parameter]:
        for half in (self.encoder, self.decoder):
            yield half.bert.embeddings.position_embeddings.weight

    def _n_embedding_parameters(self) -> int:
        embeddings = (self.encoder.bert.embeddings, self.decoder.bert.embeddings)
        return sum(p.numel() for part in embeddings for name, p in part.named_parameters() if "LayerNorm" not in name)

    def _require_defined(self, n: int) -> None:
        if n > self.context:
            raise UndefinedBeyondTraining(
                f"position {n - 1}: BERT's positions are defined up to {self.context - 1} only (trained at context "
                f"{self.context})"
            )


def bert_config(config: Bert2BertConfig, n_layers: int, vocab_size: int, context: int) -> Any:
    """Hugging Face's settings of one half. No token is padding to it: what is padded, a mask says."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=config.n_heads,
        intermediate_size=config.d_ff,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        max_position_embeddings=context,
        type_vocab_size=BERT_TYPES,
        layer_norm_eps=BERT_EPS,
        pad_token_id=None,
    )


def _bert(config: Any) -> Any:
    """A BertModel without its pooler, which nothing reads, and without the tables of indices that it keeps beside its weights:
    they are no part of a checkpoint, and `_read` says the same."""
    from transformers.models.bert.modeling_bert import BertModel

    made = BertModel(config, add_pooling_layer=False)
    del made.embeddings.position_ids, made.embeddings.token_type_ids
    return made


def _read(
    bert: Any,
    tokens: Tensor,
    mask: Tensor | None = None,
    source: Tensor | None = None,
    source_mask: Tensor | None = None,
    cache: BertCache | None = None,
) -> Tensor:
    """The states (B,T,d) of tokens (B,T) behind those of the cache, all of the first type."""
    first = 0 if cache is None else cache.length
    positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
    types = torch.zeros_like(tokens)
    held = None if cache is None else cache.held
    # By place, since the last has had two names.
    out = bert(tokens, mask, types, positions, None, source, source_mask, held, use_cache=cache is not None)
    states: Tensor = out.last_hidden_state
    return states


def _mask(size: int, lengths: Tensor | None) -> Tensor | None:
    """1 where rows of these lengths have a token, (B,size)."""
    return None if lengths is None else (torch.arange(size, device=lengths.device) < lengths[:, None]).long()
