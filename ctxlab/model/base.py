"""The contract of a model: what training, scoring and decoding ask of it, whatever it is made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ctxlab.errors import IncompatibleError
from ctxlab.model.attention.base import ATTENTIONS, Attention
from ctxlab.model.attention.native import fewest_queries
from ctxlab.model.config import SizesConfig
from ctxlab.model.few import linear
from ctxlab.model.heads import TaskHead
from ctxlab.model.kernels import kernels_of
from ctxlab.model.loss import chunk_for, smoothed_nats
from ctxlab.model.position.base import POSITIONS, Position
from ctxlab.model.recurrence import SegmentMemory
from ctxlab.model.remake import Recompute, RecomputeSetting
from ctxlab.registry import Registry

Segments = Sequence[Sequence[int]]
Side = Literal["source", "target"]
"""Whose tokens: those of a source, or those of all else that is read and written."""


class Cache(Protocol):
    """What a model keeps of the tokens that it has read, so that reading goes on behind them."""

    @property
    def length(self) -> int:
        """Tokens held, or read where what is held has one size."""

    @property
    def bytes(self) -> int:
        """Bytes of what is held."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes set aside for it: those held, and room for more."""

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows (n,) int64 of those held, in this order; one may be there several times, or not at all."""


class Model(nn.Module):
    """A language model: it reads tokens and says what follows each.

    A batch is tokens (B,T), right-padded; the values at padded places are to be ignored. Where a model is `causal`, what
    stands at a place depends on nothing behind it, so padding needs no mask and `lengths` (B,) changes nothing; elsewhere they
    have to be given. `segments` packs documents side by
    side: the lengths of each row's documents, none of which knows of another (what a row has beyond them is padding).
    `cache` continues the sequences that it holds; in any number of chunks, the logits are those of one forward. `memory`
    goes on from the rows of the step before: it is read, and holds what this one leaves afterwards.

    A subclass has `embedding`, and `head` where the output matrix is not the embedding's.
    """

    Config: ClassVar[type[Any]]
    parts: ClassVar[tuple[str, ...]] = ()
    """Which of `position` and `attention` it is composed from besides its sizes; the others are `none` for it."""
    why_without: ClassVar[str] = ""
    """Why it does without the others: what it does instead."""
    causal: ClassVar[bool] = True
    """Whether what it says of a place depends on nothing behind it, so that it can be asked what follows."""
    reads_source: ClassVar[bool] = False
    """Whether it reads a source beside its tokens: `hidden` takes source and source_lengths, or what `encode` made of them."""

    prefix = False
    """Whether it attends both ways within a prefix: `hidden` takes the prefix' length, of each row (B,) int64, or `all`."""

    embedding: nn.Embedding
    head: nn.Linear | None

    def __init__(self, config: SizesConfig, *, vocab_size: int, context: int) -> None:
        super().__init__()
        self.config: Any = config
        self.vocab_size = vocab_size
        self.context = context
        self.recompute: Recompute = "none"  # what backward computes again instead of keeping it
        self.task_head: TaskHead | None = None  # what is trained in place of the head, where a task is fine-tuned
        self.loss_chunk: int | None = None  # tokens whose logits exist at once in `nats`; None: by the device

    @classmethod
    def check_installed(cls) -> None:
        """Imports what it is made of besides torch. Raises ConfigError, one line, where that is not there."""

    @classmethod
    def check_training(cls, config: Any, *, packed: bool, compiled: bool, recompute: RecomputeSetting) -> None:
        """Raises IncompatibleError where a model of these settings cannot be trained in this way."""
        if compiled and recompute in ("selective", "auto"):
            raise IncompatibleError(
                "trainer.recompute: a compiled block (trainer.compile) is made again whole or not at all; use block or none"
            )

    @classmethod
    def carrying(cls, config: Any, attention: Any) -> str:
        """Which setting carries something from a training step to the next, as `attention: NAME carries a memory`; or nothing."""
        return ""

    @property
    def carries(self) -> bool:
        """Whether a training step sees what the step before has left (`new_memory`)."""
        return False

    @property
    def n_positions(self) -> int | None:
        """How many tokens a row, and a source, may have; None where any number."""
        return None

    @property
    def token_rows(self) -> dict[str, Side]:
        """The parameters that have a row for each token, by name, and on which side the token is."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return {names[id(parameter)]: side for parameter, side in self._of_tokens()}

    @property
    def position_rows(self) -> list[str]:
        """Names of the parameters that have a row for each position up to the context."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return [names[id(parameter)] for parameter in self._of_positions()]

    def _of_tokens(self) -> Iterator[tuple[Tensor, Side]]:
        """Every parameter whose first dimension is a vocabulary."""
        yield self.embedding.weight, "target"
        if self.head is not None:
            yield self.head.weight, "target"

    def _of_positions(self) -> Iterator[nn.Parameter]:
        """Every parameter whose first dimension is the context."""
        for module in self.modules():
            if isinstance(module, Position) and module.table is not None:
                yield module.table

    def take_pretrained(self) -> None:
        """Takes the weights that the settings name, where a training begins with no others. Raises ConfigError, one line."""

    def as_ours(self) -> Model:
        """The model of this package's own parts that computes the same, sharing the weights: one that can be looked into."""
        return self

    def new_cache(self) -> Cache:
        """What `hidden` continues, of any length; empty."""
        raise NotImplementedError

    def new_streaming_cache(self, *, sinks: int, window: int) -> Cache:
        """One of constant size, which drops all but the first `sinks` and the last `window` tokens; empty."""
        raise NotImplementedError

    def new_memory(self, rows: int) -> SegmentMemory:
        """What `hidden` carries on from one training step to the next; empty."""
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        segments: Segments | None = None,
        cache: Any = None,
    ) -> Tensor:
        """The logits of the token behind each of `tokens`, (B,T,V)."""
        return self.logits(self.hidden(tokens, lengths=lengths, segments=segments, cache=cache))

    def hidden(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        segments: Segments | None = None,
        cache: Any = None,
        memory: SegmentMemory | None = None,
    ) -> Tensor:
        """What the head reads, (B,T,d), in the compute dtype.

        Raises UndefinedBeyondTraining when the model has no meaning for one of the positions.
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., V)."""
        return linear(hidden, self._head_weight)

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Nats of each target given `hidden`, (B,T) fp32, 0 where the target is -100.

        The logits of `loss_chunk` tokens exist at once, never those of all.
        """
        return self.losses(hidden, targets, 0.0)[0]

    def losses(self, hidden: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        """What is minimised of each target, its nats under label smoothing, and its plain nats: (B,T) fp32 twice."""
        return self._losses(hidden, self._head_weight, targets, smoothing)

    def _losses(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if bias is not None:  # one more column of the matrix
            weight = torch.cat([weight, bias[:, None]], dim=1)
            hidden = torch.cat([hidden, hidden.new_ones(*hidden.shape[:-1], 1)], dim=-1)
        size = chunk_for(self.vocab_size, kernels_of(hidden.device), self.loss_chunk)
        found = smoothed_nats(hidden.flatten(0, 1), weight, targets.flatten(), size, smoothing)
        return found[0].view(targets.shape), found[1].view(targets.shape)

    def n_parameters(self, embeddings: bool = True) -> int:
        """Trained numbers; without `embeddings`, those of tokens, of an untied head and of a table of positions left out."""
        total = sum(p.numel() for p in self.parameters())
        return total if embeddings else total - self._n_embedding_parameters()

    def compile_blocks(self) -> None:
        """Has torch compile what is repeated in the model."""
        raise NotImplementedError

    def _n_embedding_parameters(self) -> int:
        return self.embedding.weight.numel() + (0 if self.head is None else self.head.weight.numel())

    @property
    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def _compute_dtype(self) -> torch.dtype:
        """What matmuls run in here and now: autocast's dtype, or that of the weights."""
        weight = self.embedding.weight
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype


ARCHITECTURES: Registry[Model] = Registry("architecture", "ctxlab.model")


class Parts(NamedTuple):
    """The typed settings of a model: its sizes, and what it is composed from, `none` where it is not."""

    model: SizesConfig
    position: Position.Config | Literal["none"]
    attention: Attention.Config | Literal["none"]


def architecture_of(sizes: Mapping[str, Any]) -> str:
    """The architecture that plain settings of `model:` name, a decoder where they name none."""
    return str(sizes.get("architecture", "decoder"))


def read_parts(config: Mapping[str, Any]) -> Parts:
    """The typed settings of a model out of a recorded config."""
    sizes = config["model"]
    return Parts(
        ARCHITECTURES.get(architecture_of(sizes)).Config.model_validate_json(json.dumps(sizes)),
        "none" if config["position"] == "none" else POSITIONS.config(config["position"]),
        "none" if config["attention"] == "none" else ATTENTIONS.config(config["attention"]),
    )


def build_model(
    parts: Parts, *, vocab_size: int, context: int, source_vocab_size: int | None = None, prefix: bool = False
) -> Model:
    """The model of these settings, with fresh weights from torch's current random state.

    source_vocab_size: of sources, where they have tokens of their own. prefix: of a decoder, whether it attends both ways
    within a prefix. Raises IncompatibleError when the parts do not go together.
    """
    architecture: Any = ARCHITECTURES.get(parts.model.architecture)
    chosen = (getattr(parts, part) for part in architecture.parts)
    more: dict[str, Any] = {"prefix": True} if prefix else {}
    if source_vocab_size is not None and source_vocab_size != vocab_size:
        if not architecture.reads_source:
            raise IncompatibleError(
                f"model.architecture: {parts.model.architecture} reads sources with the tokens of its own text, of which there "
                f"are {vocab_size}, not {source_vocab_size}; use encoder_decoder, or one tokenizer"
            )
        more["source_vocab_size"] = source_vocab_size
    model: Model = architecture(parts.model, *chosen, vocab_size=vocab_size, context=context, **more)
    return model


def native_from(parts: Parts, precision: str) -> int | None:
    """How many tokens a row needs on a CPU for the native attention kernel to run under `attention.kernel=auto`, nothing cached;
    None where nothing of the model runs in it, however long a row is."""
    if parts.attention == "none" or parts.attention.kernel == "torch":
        return None
    if not ATTENTIONS.get(parts.attention.name).softmax:
        return None
    scheme = None if parts.position == "none" else POSITIONS.get(parts.position.name)
    has_bias = [scheme is not None and scheme.form in ("toeplitz", "blockwise")]
    if scheme is not None and scheme.form == "blockwise" and not scheme.compilable:
        has_bias = []
    if ARCHITECTURES.get(parts.model.architecture).reads_source:
        has_bias.append(False)  # cross-attention, where no position enters
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return min((fewest_queries(dtype, biased=biased) for biased in has_bias), default=None)


def pieces_of(segments: Segments, B: int, T: int) -> list[tuple[int, bool]]:
    """(tokens, whether they are a document): the documents of a packed batch (B,T) and the padding behind each row's last.

    In the order of the flattened batch. Raises ValueError where they do not fit it.
    """
    if len(segments) != B:
        raise ValueError(f"segments: expected one list of lengths for each of {B} rows, got {len(segments)}")
    pieces = []
    for row in segments:
        padding = T - sum(row)
        if padding < 0 or min(row, default=0) < 1:
            raise ValueError(f"segments: expected lengths >= 1 that add up to at most {T}, got {tuple(row)}")
        pieces += [(size, True) for size in row] + ([(padding, False)] if padding else [])
    return pieces
