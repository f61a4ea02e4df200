"""What a model costs, in closed form: parameters, floating-point operations, cache and activations, without building it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.config import LSTMConfig, ModelConfig, SizesConfig
from ctxlab.model.loss import chunk_for
from ctxlab.model.position.base import POSITIONS, Position
from ctxlab.model.remake import POLICIES, Recompute, RecomputeSetting

# A positional scheme's or a mechanism's settings, `none` for a model that has none.
Part = Any
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


def parameters(config: SizesConfig, position: Part, attention: Part, *, vocab_size: int, context: int) -> Parameters:
    """Exactly what building the model would allocate. `without_embeddings` is the N of Kaplan et al. 2020, arXiv:2001.08361.

    An LSTM's layer has 4 h (its input's width + h) weights and torch's two biases of 4 h.
    """
    if isinstance(config, LSTMConfig):
        embeddings = vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
        biases = 8 * config.n_layers * config.d_hidden
        return Parameters(total=_recurrent_matrices(config) + biases + embeddings, embeddings=embeddings)
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


def flops_per_token(config: SizesConfig, attention: Part, *, vocab_size: int, context: int) -> float:
    """Floating-point operations of training on one token, forward and backward: 6 N + 12 L H D context for full attention.

    Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B, with N the weights that multiply: blocks and output head, the
    lookup of the input embedding, norms, biases and positional tables left out. The half of the scores that causality hides
    is counted, recomputation is not. Norms, activations and softmax are not counted either. An LSTM has 6 N at any context.
    """
    if isinstance(config, LSTMConfig):
        return 6.0 * (_recurrent_matrices(config) + vocab_size * config.d_model)
    multiplied = config.n_layers * _block_matrices(config) + vocab_size * config.d_model
    mechanism = ATTENTIONS.get(attention.name)
    mixing = sum(mechanism.flops(attention, config, context, layer) for layer in range(config.n_layers))
    return 6.0 * multiplied + 3.0 * mixing


def kv_cache_bytes(
    config: SizesConfig,
    position: Part,
    attention: Part,
    *,
    length: int,
    rows: int = 1,
    precision: Precision = "fp32",
) -> int:
    """Bytes of the keys and values of `length` tokens in `rows` sequences: L Hkv (2 D + the scheme's columns) e a token.

    Sums that stand in their place are fp32 and count once, as do an LSTM's two states of each layer.
    """
    if isinstance(config, LSTMConfig):
        return 2 * config.n_layers * config.d_hidden * rows * _BYTES["fp32"]
    columns = POSITIONS.get(position.name).key_columns(position, config)
    mechanism = ATTENTIONS.get(attention.name)
    held = sum(mechanism.cached_tokens(attention, length, layer) for layer in range(config.n_layers))
    sums = config.n_layers * mechanism.sum_bytes(config) * rows
    return config.n_kv_heads * (2 * config.head_dim + columns) * held * rows * _BYTES[precision] + sums


def activation_bytes(
    config: SizesConfig,
    position: Part,
    attention: Part,
    *,
    vocab_size: int,
    context: int,
    rows: int = 1,
    precision: Precision = "fp32",
    recompute: Recompute = "none",
    loss_chunk: int | None = None,
) -> int:
    """Bytes that one micro-batch of rows x context tokens needs in a training step, beyond weights, gradients and optimizer.

    What the blocks keep for the backward pass (all of it; without the outputs of norms and of the activation function where
    `recompute` is selective; each block's input and one whole block where it is block), what stands around them, and the
    largest temporary. Under bf16 the residual stream stays fp32 and everything that a matmul reads is bf16, the copies of the
    weights included. Counted as Korthikanti et al. 2022, arXiv:2205.05198, section 4, count, for the operations of this model:
    attention that keeps no scores, and an activation function that keeps its inputs only. A row of a model with recurrent
    attention has its tokens of memory (old, read and new) and their norm, keys and values besides.
    An LSTM: `_recurrent_activations`.
    """
    tokens = rows * context
    chunk = min(tokens, chunk_for(vocab_size) if loss_chunk is None else loss_chunk)
    size = _BYTES[precision]
    logits = chunk * vocab_size * (size + 4) + vocab_size * config.d_model * (4 + size)
    if isinstance(config, LSTMConfig):
        return tokens * _recurrent_activations(config, precision) + logits
    carried = ATTENTIONS.get(attention.name).carried_tokens(attention)
    kept = kept_bytes_per_token(config, position, precision)
    stream = 4 * config.d_model  # one fp32 copy of the residual stream
    blocks = config.n_layers * kept
    if recompute == "block":
        blocks = config.n_layers * stream + kept
    elif recompute == "selective":
        blocks -= config.n_layers * size * (2 * config.d_model + config.d_ff)
    ends = 2 * stream + 2 * size * config.d_model  # around the blocks: stream, last norm, gradient of the head's input
    backward = (
        3 * size * config.d_ff + 2 * stream
    )  # gradients alive at once in the widest place, the feed-forward layer
    casts = 0 if precision == "fp32" else size * config.n_layers * _block_matrices(config)
    width = 2 * config.head_dim + POSITIONS.get(position.name).key_columns(position, config)
    read = stream + size * (config.d_model + config.n_kv_heads * width) + 4
    memory = 3 * stream * config.n_layers + read * (1 if recompute == "block" else config.n_layers)
    return tokens * (blocks + ends + backward) + rows * carried * memory + logits + casts


def chosen_recompute(
    setting: RecomputeSetting,
    config: SizesConfig,
    position: Part,
    attention: Part,
    *,
    vocab_size: int,
    context: int,
    precision: Precision,
    loss_chunk: int | None,
    memory: float,
) -> Recompute:
    """What `auto` becomes: the cheapest policy with which one row's activations fit `memory` bytes, else the most frugal."""
    if setting != "auto":
        return setting
    needed = {
        policy: activation_bytes(
            config,
            position,
            attention,
            vocab_size=vocab_size,
            context=context,
            precision=precision,
            recompute=policy,
            loss_chunk=loss_chunk,
        )
        for policy in POLICIES
    }
    return next((policy for policy in POLICIES if needed[policy] <= memory), min(POLICIES, key=lambda p: needed[p]))


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


def _recurrent_matrices(config: LSTMConfig) -> int:
    """Weights of an LSTM's layers and of the matrix that leads to the head, biases left out."""
    d, h = config.d_model, config.d_hidden
    return 4 * h * (d + h) + (config.n_layers - 1) * 8 * h * h + (0 if d == h else d * h)


def _recurrent_activations(config: LSTMConfig, precision: Precision) -> int:
    """Bytes a token of an LSTM's training step.

    Each layer keeps its four gates, its cell state and its output for the backward pass. There the layer at work has the
    gradients of its gates, of three states and, twice, of its output. Around the layers: the embedded token and what the head
    reads, each with its gradient, and under bf16 a copy for the matrix before the head. Dropout keeps the embedding's mask, and
    between layers a mask and what it leaves. Layers are fp32. (oneDNN sets 15 h numbers a token aside for a layer and touches
    less than half of them.)
    """
    d, h, size = config.d_model, config.d_hidden, _BYTES[precision]
    layers = 4 * h * (6 * config.n_layers + 9)
    ends = 2 * 4 * d + 2 * size * d + (size * h if precision == "bf16" and d != h else 0)
    masks = 4 * (d + 2 * (config.n_layers - 1) * h) if config.dropout else 0
    return layers + ends + masks
