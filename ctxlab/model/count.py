"""What a model costs, in closed form: parameters, floating-point operations, cache and activations, without building it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.config import Bert2BertConfig, LSTMConfig, ModelConfig, SizesConfig
from ctxlab.model.position.base import POSITIONS, Position
from ctxlab.model.remake import POLICIES, Recompute, RecomputeSetting

# A positional scheme's or a mechanism's settings, `none` for a model that has none.
Part = Any
Precision = Literal["fp32", "bf16"]
BERT_TYPES = 2  # of tokens, each with an embedding, in both of two BERTs
JUDGED_SHARE = (
    0.9  # of memory, that a step may need by closed form: the process and what kernels set aside need the rest
)
_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
# Tensors of the feed-forward width that backward needs, and those of them that it can make from the others.
_HIDDEN = {"swiglu": 3, "geglu_tanh": 3, "gelu": 2, "gelu_tanh": 2, "relu": 1}
_REMADE = {"swiglu": 1, "geglu_tanh": 1, "gelu": 1, "gelu_tanh": 1, "relu": 0}


@dataclass(frozen=True)
class Parameters:
    """Trained numbers of a model; `embeddings` are those of tokens, of an untied head and of a table of positions."""

    total: int
    embeddings: int

    @property
    def without_embeddings(self) -> int:
        return self.total - self.embeddings


def parameters(
    config: SizesConfig,
    position: Part,
    attention: Part,
    *,
    vocab_size: int,
    context: int,
    source_vocab_size: int | None = None,
) -> Parameters:
    """Exactly what building the model would allocate. `without_embeddings` is the N of Kaplan et al. 2020, arXiv:2001.08361.

    An LSTM's layer has 4 h (its input's width + h) weights and torch's two biases of 4 h. Two BERTs have what our
    encoder-decoder of their sizes has, and the embeddings of two types of tokens each.
    """
    if isinstance(config, LSTMConfig):
        embeddings = vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
        biases = 8 * config.n_layers * config.d_hidden
        return Parameters(total=_recurrent_matrices(config) + biases + embeddings, embeddings=embeddings)
    if isinstance(config, Bert2BertConfig):
        ours = parameters(
            *_as_ours(config), vocab_size=vocab_size, context=context, source_vocab_size=source_vocab_size
        )
        types = 2 * BERT_TYPES * config.d_model
        return Parameters(total=ours.total + types, embeddings=ours.embeddings + types)
    norm = config.d_model * (2 if config.norm == "layernorm" and config.bias else 1)
    outputs = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim + config.d_model  # of q, k, v and out
    up_and_down = config.d_ff * (2 if config.gated else 1) + config.d_model
    total = 0
    embeddings = vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    if config.architecture == "encoder_decoder" and not config.share_embeddings:
        embeddings += (vocab_size if source_vocab_size is None else source_vocab_size) * config.d_model
    scheme = POSITIONS.get(position.name)
    for stack in _stacks(config):
        block = _block_matrices(config, stack.crosses) + stack.norms * norm
        block += (outputs * (2 if stack.crosses else 1) + up_and_down) if config.bias else 0
        block += config.n_heads if attention.sink else 0
        around = norm * (config.embedding_norm + (config.norm_place == "pre"))
        positional = scheme.n_parameters(position, stack.config, context)
        if scheme.form == "embedding":
            embeddings += positional
            positional = 0
        total += stack.config.n_layers * block + around + positional
    if config.head_layer:
        total += config.d_model**2 + norm + vocab_size + (config.d_model if config.bias else 0)
    return Parameters(total=total + embeddings, embeddings=embeddings)


def flops_per_token(
    config: SizesConfig, attention: Part, *, vocab_size: int, context: int, source: int | None = None
) -> float:
    """Floating-point operations of training on one token, forward and backward: 6 N + 12 L H D context for full attention.

    Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B, with N the weights that multiply: blocks and output head, the
    lookup of the input embedding, norms, biases and positional tables left out. The half of the scores that causality hides
    is counted, recomputation is not. Norms, activations and softmax are not counted either. An LSTM has 6 N at any context.

    Of an encoder-decoder: of one target token, of `context` of them, with its share of a source of `source` tokens (None: as
    many), whose encoder and whose keys and values in every cross-attention are computed once.
    """
    if isinstance(config, LSTMConfig):
        return 6.0 * (_recurrent_matrices(config) + vocab_size * config.d_model)
    if isinstance(config, Bert2BertConfig):
        config, _, attention = _as_ours(config)
    mechanism = ATTENTIONS.get(attention.name)
    source = context if source is None else source
    total = 6.0 * (vocab_size * config.d_model + (config.d_model**2 if config.head_layer else 0))
    for stack in _stacks(config):
        layers, length = range(stack.config.n_layers), source if stack.is_source else context
        mixing = sum(mechanism.flops(attention, config, length, layer, causal=stack.causal) for layer in layers)
        own = 6.0 * len(layers) * _block_matrices(config, stack.crosses) + 3.0 * mixing
        total += own * length / context
        if stack.crosses:
            keys = 6.0 * len(layers) * 2 * config.n_kv_heads * config.head_dim * config.d_model
            total += keys * (source / context - 1) + 12.0 * len(layers) * config.n_heads * config.head_dim * source
    return total


def kv_cache_bytes(
    config: SizesConfig,
    position: Part,
    attention: Part,
    *,
    length: int,
    rows: int = 1,
    precision: Precision = "fp32",
    source: int | None = None,
) -> int:
    """Bytes of the keys and values of `length` tokens in `rows` sequences: L Hkv (2 D + the scheme's columns) e a token.

    Sums that stand in their place are fp32 and count once, as do an LSTM's two states of each layer. An encoder-decoder
    also holds L Hkv 2 D e for each of `source` tokens (None: `length` of them), without columns. An encoder holds nothing.
    """
    if isinstance(config, LSTMConfig):
        return 2 * config.n_layers * config.d_hidden * rows * _BYTES["fp32"]
    if isinstance(config, Bert2BertConfig):
        config, position, attention = _as_ours(config)
    if config.architecture == "encoder":
        return 0
    columns = POSITIONS.get(position.name).key_columns(position, config)
    mechanism = ATTENTIONS.get(attention.name)
    held = sum(mechanism.cached_tokens(attention, length, layer) for layer in range(config.n_layers))
    sums = config.n_layers * mechanism.sum_bytes(config) * rows
    numbers = config.n_kv_heads * (2 * config.head_dim + columns) * held
    if config.architecture == "encoder_decoder":
        numbers += config.n_layers * _cross_keys(config) * (length if source is None else source)
    return numbers * rows * _BYTES[precision] + sums


def activation_bytes(
    config: SizesConfig,
    position: Part,
    attention: Part,
    *,
    vocab_size: int,
    context: int,
    rows: int = 1,
    precision: Precision = "fp32",
    recompute: Recompute | None = "none",
    loss_chunk: int,
    source: int | None = None,
) -> int:
    """Bytes that one micro-batch of rows x context tokens needs in a training step, beyond weights, gradients and optimizer.

    What the blocks keep for the backward pass under `recompute` (None: nothing is made again), what one of them holds besides
    where it, or its feed-forward layer, is there once more, whole; what stands around them, and the largest temporary.
    Under bf16 the residual stream stays fp32 and everything that a matmul reads is bf16, the copies of the weights included.
    Counted as Korthikanti et al. 2022, arXiv:2205.05198, section 4, count, for the operations of this model:
    attention that keeps no scores, and an activation function that keeps its inputs only. A row of a model with recurrent
    attention has its tokens of memory (old, read and new), their keys and values besides, and what is kept of their norm.
    An encoder-decoder has `source` tokens a row besides (None: `context` of them). An LSTM: `_recurrent_activations`. Two
    BERTs, nothing of which is made again: as ours of their sizes. The logits of `loss_chunk` tokens exist at once.
    """
    tokens = rows * context
    chunk = min(tokens, loss_chunk)
    size = _BYTES[precision]
    logits = chunk * vocab_size * (size + 4) + vocab_size * config.d_model * (4 + size)
    if isinstance(config, LSTMConfig):
        return tokens * _recurrent_activations(config, precision) + logits
    if isinstance(config, Bert2BertConfig):
        (config, position, attention), recompute = _as_ours(config), None
    carried = ATTENTIONS.get(attention.name).carried_tokens(attention)
    stream = 4 * config.d_model  # one fp32 copy of the residual stream
    ends = 2 * stream + 2 * size * config.d_model  # around the blocks: stream, last norm, gradient of the head's input
    # Gradients alive at once in the widest place, the feed-forward layer.
    backward = 3 * size * config.d_ff + 2 * stream
    kept, widest, casts = 0, 0, 0
    for stack in _stacks(config):
        length = rows * (source if stack.is_source and source is not None else context)
        read = rows * (context if source is None else source) * _cross_keys(config) * size if stack.crosses else 0
        block = length * kept_bytes_per_token(config, position, precision, crosses=stack.crosses, recompute=recompute)
        block += 0 if recompute == "block" else read
        kept += stack.config.n_layers * block + length * ends
        again = 0
        if recompute == "block":
            again = length * kept_bytes_per_token(config, position, precision, crosses=stack.crosses, recompute=None)
            again += read
        elif recompute == "selective":
            again = length * size * (config.d_ff * (_HIDDEN[config.activation] - _REMADE[config.activation]))
            again += length * size * config.d_model
        widest = max(widest, length * backward + again)
        casts += 0 if precision == "fp32" else size * stack.config.n_layers * _block_matrices(config, stack.crosses)
    if config.head_layer:
        kept += tokens * (3 * size * config.d_model + 8)
    width = 2 * config.head_dim + POSITIONS.get(position.name).key_columns(position, config)
    whole = recompute in (None, "block") or config.norm_place == "post"
    keys = stream + size * ((config.d_model if whole else 0) + config.n_kv_heads * width) + 4
    memory = 3 * stream * config.n_layers + keys * (1 if recompute == "block" else config.n_layers)
    return kept + widest + rows * carried * memory + logits + casts


def standing_bytes(weights: int, trained: int, states: int) -> int:
    """Bytes that stand between two steps, all fp32: every weight, and of those that are trained a gradient and `states` numbers
    of the optimizer."""
    return 4 * (weights + trained * (1 + states))


def rows_at_once(micro_batch: int | Literal["auto"], step_tokens: int, context: int) -> int:
    """Rows of a micro-batch that memory has to hold: as many as are asked for and a step has, one where their number adapts."""
    return 1 if micro_batch == "auto" else max(1, min(micro_batch, step_tokens // context))


def chosen_recompute(
    setting: RecomputeSetting,
    config: SizesConfig,
    position: Part,
    attention: Part,
    *,
    vocab_size: int,
    context: int,
    rows: int,
    precision: Precision,
    loss_chunk: int,
    standing: int,
    memory: float,
) -> Recompute:
    """What `auto` becomes: the cheapest policy with which `standing` bytes and the activations of `rows` x context tokens fit
    JUDGED_SHARE of `memory` bytes; where none does, the most frugal."""
    if setting != "auto":
        return setting
    needed = {
        policy: activation_bytes(
            config,
            position,
            attention,
            vocab_size=vocab_size,
            context=context,
            rows=rows,
            precision=precision,
            recompute=policy,
            loss_chunk=loss_chunk,
        )
        for policy in POLICIES
    }
    free = JUDGED_SHARE * memory - standing
    return next((policy for policy in POLICIES if needed[policy] <= free), min(POLICIES, key=lambda p: needed[p]))


def kept_bytes_per_token(
    config: ModelConfig,
    position: Position.Config,
    precision: Precision,
    *,
    crosses: bool = False,
    recompute: Recompute | None = "none",
) -> int:
    """Bytes that one block keeps of a token between its forward and its backward pass; None: where nothing is made again.

    Its norms: their fp32 inputs and a reciprocal (two statistics for LayerNorm); queries, keys, values and output of attention
    with its log-sum-exp, of cross-attention without keys and values, which are the source's; the feed-forward layer's hidden
    tensors: gate and up, or one, ReLU's behind it; the dropout masks. What is read of the norms' outputs and the product of gate
    and up, or what GELU makes, come on top where nothing is made again, outputs of norms behind an addition always.
    Selective, of the feed-forward layer with the norm before it only what goes in is kept; of a block that is made again, too.
    """
    size = _BYTES[precision]
    if recompute == "block":
        return 4 * config.d_model
    columns = POSITIONS.get(position.name).key_columns(position, config)
    width = config.head_dim + columns
    parts = 3 if crosses else 2
    statistics = 4 if config.norm == "rmsnorm" else 8
    outputs = size * config.d_model if recompute is None or config.norm_place == "post" else 0
    norms = parts * (4 * config.d_model + outputs + statistics)
    attention = size * width * 2 * (config.n_heads + config.n_kv_heads) + 4 * config.n_heads
    if crosses:
        attention += size * config.head_dim * 2 * config.n_heads + 4 * config.n_heads
    hidden = _HIDDEN[config.activation] - (0 if recompute is None else _REMADE[config.activation])
    feed_forward = size * config.d_ff * hidden
    if recompute == "selective":
        feed_forward = -statistics if config.norm_place == "pre" else (4 - size) * config.d_model
    masks = parts * size * config.d_model if config.dropout else 0
    return norms + attention + feed_forward + masks


class _Stack(NamedTuple):
    """Blocks of one kind."""

    config: ModelConfig
    causal: bool
    crosses: bool  # whether they attend to a source
    is_source: bool

    @property
    def norms(self) -> int:
        """Of a block."""
        return 3 if self.crosses else 2


def _as_ours(config: Bert2BertConfig) -> tuple[ModelConfig, Part, Part]:
    """Two BERTs are settings of ours, and are counted as those."""
    return config.as_ours(), POSITIONS.get("learned").Config(name="learned"), ATTENTIONS.get("full").Config(name="full")


def _stacks(config: ModelConfig) -> list[_Stack]:
    """The decoder, the encoder, or both."""
    if config.architecture == "encoder_decoder":
        return [_Stack(config, True, True, False), _Stack(config.of_encoder(), False, False, True)]
    return [_Stack(config, config.architecture == "decoder", False, False)]


def _block_matrices(config: ModelConfig, crosses: bool = False) -> int:
    """Weights of a block's linear layers, biases left out."""
    projections = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim * config.d_model
    return projections * (2 if crosses else 1) + config.d_model * config.d_ff * (3 if config.gated else 2)


def _cross_keys(config: ModelConfig) -> int:
    """Numbers of a source token's key and value in one layer."""
    return 2 * config.n_kv_heads * config.head_dim


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
