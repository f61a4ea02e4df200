"""The contract of a positional scheme: how a Transformer learns where its tokens stand. One class in one file a scheme."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ctxlab.errors import IncompatibleError, UndefinedBeyondTraining
from ctxlab.model.attention.bias import Bias, Toeplitz
from ctxlab.model.config import ModelConfig
from ctxlab.registry import ComponentConfig, Registry

Form = Literal["none", "embedding", "separable", "toeplitz", "blockwise"]


class Position(nn.Module):
    """A positional scheme: hooks that the model calls, each neutral here, and facts that the model and the tables read.

    The score of query i and key j is scale * query(q)_i . key(k)_j + bias_ij. A scheme that fits the product alone is as
    cheap as none: it runs inside the fused causal kernel. One with a bias runs in the blockwise function; both need memory
    linear in the context. Cross-attention calls no hook.

    In a forward, in this order:
      embed(x, positions)               once, before the first block;
      tables(positions, dtype)          once: whatever `query` and `key` need of the positions (cosines, columns);
      prepare(x, layer, carry)          every block: (state, carry), what the hooks below need of the block's input;
      query(q, tables, state), key(k, tables, state)    every block;
      bias(q, n_keys, state)            every block; Toeplitz schemes write `distance_bias` instead.

    One instance serves all layers; a scheme with parameters of their own for each makes n_layers of them.
    """

    class Config(ComponentConfig):
        name: str

    paper: ClassVar[str]
    form: ClassVar[Form]
    """Where the scheme enters: nowhere, in the embedding, in the product of queries and keys, or as a bias."""
    relative: ClassVar[bool]
    """Whether shifting all positions by the same amount changes nothing."""
    shared_across_layers: ClassVar[bool] = True
    """Whether all layers use the same parameters and tables."""
    bidirectional: ClassVar[bool] = True
    """Whether the scheme tells order without a causal mask, as an encoder needs."""
    directed: ClassVar[bool] = False
    """Whether its parameters stand for something else where there is no causal mask."""
    defined_beyond_training: ClassVar[bool] = True
    """Whether positions from the trained context on have a meaning."""
    compilable: ClassVar[bool] = False
    """Of form `blockwise`: whether its bias is one that the native kernel can state (attention/bias.py, `Compilable`)."""
    caches_raw_keys: ClassVar[bool] = False
    """Whether a cache holds keys before `key` (which then sees them all at every step) instead of after."""

    def __init__(self, config: Config, model: ModelConfig, context: int, *, causal: bool = True) -> None:
        super().__init__()
        self.check(config, model, causal=causal)
        self.config = config
        self.model = model
        self.context = context
        self.causal = causal

    @classmethod
    def check(cls, config: Config, model: ModelConfig, *, causal: bool = True) -> None:
        """Raises IncompatibleError where the scheme cannot serve a model of these sizes."""
        if not causal and not cls.bidirectional:
            raise IncompatibleError(f"position.name: {config.name} tells no order without a causal mask")

    @classmethod
    def n_parameters(cls, config: Config, model: ModelConfig, context: int) -> int:
        """Trained numbers, in closed form. Those of a form `embedding` count as embeddings."""
        return 0

    @classmethod
    def embedding_scale(cls, model: ModelConfig) -> float:
        """What `embed` multiplies embedded tokens by."""
        return 1.0

    @classmethod
    def key_columns(cls, config: Config, model: ModelConfig) -> int:
        """Columns that `key` appends to head_dim; the cache holds them too."""
        return 0

    @property
    def scale(self) -> float:
        """What the product of query and key is multiplied by: 1 / sqrt(head_dim) (Vaswani et al. 2017, eq. 1)."""
        return self.model.head_dim**-0.5

    @property
    def max_span(self) -> int | None:
        """The distance from which on the scheme no longer tells two distances apart; None when there is no such distance."""
        return None

    @property
    def n_positions(self) -> int | None:
        """How many positions have a meaning; None when all have."""
        return None if self.defined_beyond_training else self.context

    @property
    def why_they_end(self) -> str:
        """What stands in the way of more positions than `n_positions`."""
        return f"trained at context {self.context}"

    @property
    def table(self) -> nn.Parameter | None:
        """What has a trained row for each position up to the context, where something has."""
        return None

    def require_defined(self, last: int) -> None:
        """Raises UndefinedBeyondTraining when position `last` has no meaning."""
        limit = self.n_positions
        if limit is not None and last >= limit:
            raise UndefinedBeyondTraining(
                f"position {last}: {self.config.name} positions are defined up to {limit - 1} only ({self.why_they_end})"
            )

    def initialize(self) -> None:
        """Draws the scheme's parameters."""

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """The embedded tokens x (B,T,d_model) with their positions, (T,) or (B,T) int64, put in."""
        return x

    def tables(self, positions: Tensor, dtype: torch.dtype) -> Any:
        """What `query` and `key` need to know of positions (T,); queries and keys are of `dtype`."""
        return None

    def prepare(self, x: Tensor, layer: int, carry: Any) -> tuple[Any, Any]:
        """(state for the hooks of this block, carry for the next chunk of the same sequence).

        x: (B,T,d_model), what the block's queries and keys are projected from. carry: None at a sequence's start, then what
        the call for the chunk before returned: a tensor whose first dimension is B, or what is the same for all rows.
        """
        return None, None

    def query(self, q: Tensor, tables: Any, state: Any) -> Tensor:
        """Queries (B,H,T,D) as they enter the product, of the width of `key`."""
        return q

    def key(self, k: Tensor, tables: Any, state: Any) -> Tensor:
        """Keys (B,Hkv,T,D) as they enter the product."""
        return k

    def distance_bias(self, distances: Tensor, state: Any) -> Tensor:
        """The bias of each head at signed distances i - j, (n,) int64 -> (H,n). Of form `toeplitz` only."""
        raise NotImplementedError(f"{type(self).__name__} is of form {self.form}")

    def bias(self, q: Tensor, n_keys: int, state: Any) -> Bias | None:
        """What is added to the scaled scores of the last T of n_keys positions, or None. q (B,H,T,D): before `query`."""
        if self.form != "toeplitz":
            return None
        first = 0 if self.causal else 1 - n_keys
        distances = torch.arange(first, n_keys, device=q.device)
        return Toeplitz(self.distance_bias(distances, state), first, constant_from=self.max_span)


POSITIONS: Registry[Position] = Registry("position", "ctxlab.model.position")
