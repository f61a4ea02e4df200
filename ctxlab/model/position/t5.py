"""T5's relative bias: one learned number a head and bucket of distances."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position


@POSITIONS.register("t5")
class T5(Position):
    """bias_ij = W[bucket(i - j)] for each head, one table W (buckets, H) shared by all layers.

    Raffel et al. 2020, arXiv:1910.10683, section 2.1. Half of the buckets hold one distance each, the others grow
    geometrically up to max_distance; the last holds everything beyond. T5 itself does not scale its scores by 1/sqrt(head_dim)
    (its initialization makes up for it); here they are scaled, as with every other scheme.
    """

    class Config(Position.Config):
        name: Literal["t5"] = "t5"
        buckets: int = Field(32, ge=4, multiple_of=4, description="rows of the table")
        max_distance: int = Field(128, gt=0, description="distance from which on all share the last bucket")

        @model_validator(mode="after")
        def _room_for_growth(self) -> T5.Config:
            if self.max_distance <= self.buckets // 2:
                raise ValueError(
                    f"max_distance ({self.max_distance}) must be greater than half of the buckets ({self.buckets})"
                )
            return self

    paper = "Raffel et al. 2020, arXiv:1910.10683"
    form = "toeplitz"
    relative = True
    directed = True  # half of the buckets are of keys ahead

    def __init__(self, config: Config, model: ModelConfig, context: int, *, causal: bool = True) -> None:
        super().__init__(config, model, context, causal=causal)
        self.weight = nn.Parameter(torch.empty(config.buckets, model.n_heads))
        self._starts = bucket_starts(config.buckets, config.max_distance, bidirectional=not causal)

    @classmethod
    def n_parameters(cls, config: Position.Config, model: ModelConfig, context: int) -> int:
        assert isinstance(config, T5.Config)
        return config.buckets * model.n_heads

    @property
    def max_span(self) -> int:
        return self._starts[-1]

    def initialize(self) -> None:
        nn.init.normal_(self.weight, std=self.model.d_model**-0.5)

    def distance_bias(self, distances: Tensor, state: Any) -> Tensor:
        return nn.functional.embedding(bucket(distances, self._starts, not self.causal), self.weight).T


def bucket_starts(buckets: int, max_distance: int, *, bidirectional: bool) -> list[int]:
    """The smallest distance of each bucket of one direction, found in whole numbers.

    With n buckets a direction (all of them, or half when bidirectional) and e = n // 2 exact ones, bucket e + k begins at the
    smallest d with e ln(d / e) / ln(max_distance / e) >= k, that is d^e >= e^(e-k) max_distance^k.
    """
    n = buckets // 2 if bidirectional else buckets
    exact, growing = n // 2, n - n // 2
    starts = list(range(exact))
    d = exact
    for k in range(growing):
        while d**growing < exact ** (growing - k) * max_distance**k:
            d += 1
        starts.append(d)
    return starts


def bucket(distances: Tensor, starts: list[int], bidirectional: bool) -> Tensor:
    """The bucket of each signed distance i - j. Bidirectional: keys behind the query come first, keys ahead of it after."""
    edges = torch.tensor(starts, device=distances.device)
    size = distances.abs() if bidirectional else distances.clamp(min=0)
    index = torch.bucketize(size, edges, right=True) - 1
    return index + (distances < 0) * len(starts) if bidirectional else index
