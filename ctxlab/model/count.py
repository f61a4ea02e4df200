"""What a model costs, in closed form: parameters, floating-point operations, cache and activations, without building it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ctxlab.model.attention.base import ATTENTIONS, Attention
from ctxlab.model.config import ModelConfig
from ctxlab.model.loss import chunk_for
from ctxlab.model.position.base import POSITIONS, Position

Precision = Literal["fp32", "bf16"]
_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Parameters:
    """Trained numbers of a model; `embeddings` are those of tokens, of an untied head and of a table of positions."""

    total: int
    embeddings: int

    @property
    def without_embeddings(self) -> int:
        return self.total - self.embeddings


def parameters(
    config: ModelConfig, position: Position.Config, attention: Attention.Config, *, vocab_size: int, context: int
) -> Parameters:
    """Exactly what building the model would allocate. `without_embeddings` is the N of Kaplan et al. 2020, arXiv:2001.08361."""
    norm = config.d_model * (2 if config.norm == "layernorm" and config.bias else 1)
    outputs = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim + config.d_model  # of q, k, v and out
    outputs += config.d_ff * (2 if config.activation == "swiglu" else 1) + config.d_model
    block = _block_matrices(config) + 2 * norm + (outputs if config.bias else 0)
    scheme = POSITIONS.get(position.name)
    positional = scheme.n_parameters(position, config, context)
    vocabulary = vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    embeddings = vocabulary + (positional if scheme.form == "embedding" else 0)
    norms = norm * (2 if config.embedding_norm else 1)
    block += config.n_heads if attention.sink else 0
    return Parameters(total=config.n_layers * block + norms + vocabulary + positional, embeddings=embeddings)


def flops_per_token(config: ModelConfig, attention: Attention.Config, *, vocab_size: int, context: int) -> float:
    """Floating-point operations of training on one token, forward and backward: 6 N + 12 L H D context for full attention.

    Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B, with N the weights that multiply: blocks and output head, the
    lookup of the input embedding, norms, biases and positional tables left out. The half of the scores that causality hides
    is counted, recomputation is not. Norms, activations and softmax are not counted either.
    """
    multiplied = config.n_layers * _block_matrices(config) + vocab_size * config.d_model
    mechanism = ATTENTIONS.get(attention.name)
    mixing = sum(mechanism.flops(attention, config, context, layer) for layer in range(config.n_layers))
    return 6.0 * multiplied + 3.0 * mixing


def kv_cache_bytes(
    config: ModelConfig,
    position: Position.Config,
    attention: Attention.Config,
    *,
    length: int,
    rows: int = 1,
    precision: Precision = "fp32",
) -> int:
    """Bytes of the keys and values of `length` tokens in `rows` sequences: L Hkv (2 D + the scheme's columns) e a token.

    Sums that stand in their place are fp32 and count once.
    """
    columns = POSITIONS.get(position.name).key_columns(position, config)
    mechanism = ATTENTIONS.get(attention.name)
    held = sum(mechanism.cached_tokens(attention, length, layer) for layer in range(config.n_layers))
    sums = config.n_layers * mechanism.sum_bytes(config) * rows
    return config.n_kv_heads * (2 * config.head_dim + columns) * held * rows * _BYTES[precision] + sums


def activation_bytes(
    config: ModelConfig,
    position: Position.Config,
    *,
    vocab_size: int,
    context: int,
    rows: int = 1,
    precision: Precision = "fp32",
    recompute: bool = False,
    loss_chunk: int | None = None,
    carried: int = 0,
) -> int:
    """Bytes that one micro-batch of rows x context tokens needs in a training step, beyond weights, gradients and optimizer.

    What the blocks keep for the backward pass (all of it, or with `recompute` each block's input and one whole block), what
    stands around them, and the largest temporary. Under bf16 the residual stream stays fp32 and everything that a matmul reads is
    bf16, the copies of the weights included. Counted as Korthikanti et al. 2022, arXiv:2205.05198, section 4, count, for the
    operations of this model: attention that keeps no scores, and an activation function that keeps its inputs only. A row of
    a recurrent model has its `carried` tokens of memory (old, read and new) and their norm, keys and values besides.
    """
    tokens = rows * context
    kept = kept_bytes_per_token(config, position, precision)
    stream = 4 * config.d_model  # one fp32 copy of the residual stream
    blocks = config.n_layers * stream + kept if recompute else config.n_layers * kept
    size = _BYTES[precision]
    ends = 2 * stream + 2 * size * config.d_model  # around the blocks: stream, last norm, gradient of the head's input
    backward = (
        3 * size * config.d_ff + 2 * stream
    )  # gradients alive at once in the widest place, the feed-forward layer
    chunk = min(tokens, chunk_for(vocab_size) if loss_chunk is None else loss_chunk)
    logits = chunk * vocab_size * (size + 4) + vocab_size * config.d_model * (4 + size)
    casts = 0 if precision == "fp32" else size * config.n_layers * _block_matrices(config)
    width = 2 * config.head_dim + POSITIONS.get(position.name).key_columns(position, config)
    read = stream + size * (config.d_model + config.n_kv_heads * width) + 4
    memory = 3 * stream * config.n_layers + read * (1 if recompute else config.n_layers)
    return tokens * (blocks + ends + backward) + rows * carried * memory + logits + casts


def kept_bytes_per_token(config: ModelConfig, position: Position.Config, precision: Precision) -> int:
    """Bytes that one block keeps of a token between its forward and its backward pass.

    Two norms: their fp32 inputs, a reciprocal (two statistics for LayerNorm) and their outputs; queries, keys, values and
    output of attention with its log-sum-exp; the feed-forward layer's hidden tensors: gate, up and their product, or one and
    its activation; the dropout masks.
    """
    size = _BYTES[precision]
    columns = POSITIONS.get(position.name).key_columns(position, config)
    width = config.head_dim + columns
    norms = 2 * ((4 + size) * config.d_model + (4 if config.norm == "rmsnorm" else 8))
    attention = size * width * 2 * (config.n_heads + config.n_kv_heads) + 4 * config.n_heads
    feed_forward = size * config.d_ff * (3 if config.activation == "swiglu" else 2)
    masks = 2 * size * config.d_model if config.dropout else 0
    return norms + attention + feed_forward + masks


def _block_matrices(config: ModelConfig) -> int:
    """Weights of a block's linear layers, biases left out."""
    projections = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim * config.d_model
    return projections + config.d_model * config.d_ff * (3 if config.activation == "swiglu" else 2)
