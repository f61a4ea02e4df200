"""What a model attends to: every attention of one forward, looked at as it happens, a layer at a time.

Nothing is computed a second way: a hook takes what each mechanism is given (queries and keys as the positional scheme has
turned them, its bias, who may see whom), and `attention/weights.py` makes rows of weights of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ctxlab.errors import IncompatibleError
from ctxlab.model.attention.base import Attention
from ctxlab.model.attention.bias import Bias
from ctxlab.model.attention.weights import HeadRows, weight_rows
from ctxlab.model.base import Model
from ctxlab.model.blocks import Block
from ctxlab.model.transformer import Stack

Kind = Literal["encoder", "self", "cross"]
KINDS: tuple[Kind, ...] = ("encoder", "self", "cross")
"""Of an encoder-decoder's encoder; of a model's own tokens; of those to an encoded source."""


@dataclass(frozen=True)
class Seen:
    """One attention of a forward as its mechanism was given it. Layers and heads count from 0."""

    kind: Kind
    layer: int
    mechanism: Attention
    q: Tensor  # (B,H,T,D)
    k: Tensor  # (B,Hkv,S,D)
    v: Tensor  # (B,Hkv,S,Dv)
    scale: float
    causal: bool
    bias: Bias | None = None
    lengths: Tensor | None = None

    @property
    def n_heads(self) -> int:
        return self.q.shape[1]

    def rows(self, heads: Sequence[int] | None = None) -> Iterator[HeadRows]:
        """The weights of these heads (all where None), some queries of one head at a time: see `weight_rows`."""
        return weight_rows(
            self.mechanism, self.q, self.k,
            scale=self.scale, causal=self.causal, bias=self.bias, lengths=self.lengths, heads=heads,
        )  # fmt: skip

    def weights(self, heads: Sequence[int] | None = None) -> Tensor:
        """All weights of these heads, (B,h,T,S)."""
        asked = list(range(self.n_heads) if heads is None else heads)
        B, _, T, _ = self.q.shape
        found: Tensor | None = None
        for head, rows, weights in self.rows(asked):
            if found is None:
                found = weights.new_empty(B, len(asked), T, self.k.shape[2])
            for place in (place for place, one in enumerate(asked) if one == head):
                found[:, place, rows] = weights
        assert found is not None
        return found


def attentions(model: Model) -> list[tuple[Kind, int, Attention]]:
    """(kind, layer, mechanism) of every attention of a model, the encoder's first; none of one that does not attend."""
    found: list[tuple[Kind, int, Attention]] = []
    whole: nn.Module = model
    for module in model.modules():
        if not isinstance(module, Stack):
            continue
        for layer, block in enumerate(module.blocks):
            assert isinstance(block, Block)
            found.append(("self" if module is whole else "encoder", layer, block.attention.mechanism))
            if block.cross_attention is not None:
                found.append(("cross", layer, block.cross_attention.mechanism))
    return sorted(found, key=lambda one: KINDS.index(one[0]))


def look(model: Model, tokens: Tensor | None, visit: Callable[[Seen], None], **inputs: Any) -> Tensor | None:
    """Runs one forward of tokens (B,T) and calls `visit` with every attention in it, as it happens; returns its hidden states.

    inputs: what `model.hidden` takes besides, `source` and `source_lengths` say. Without tokens (None) an encoder-decoder
    reads its source alone. What `visit` keeps is all that is kept: queries and keys of one layer exist at a time.
    """
    handles = []
    for kind, layer, mechanism in attentions(model):

        def hook(module: Any, operands: Any, settings: dict[str, Any], kind: Kind = kind, layer: int = layer) -> None:
            q, k, v = operands
            visit(Seen(kind, layer, module, q, k, v, **settings))

        handles.append(mechanism.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with torch.inference_mode():
            if tokens is not None:
                return model.hidden(tokens, **inputs)
            encoder: Any = model
            encoder.encode(inputs["source"], inputs.get("source_lengths"))
            return None
    finally:
        for handle in handles:
            handle.remove()


def attention_weights(
    model: Model,
    tokens: Tensor | None,
    layer: int,
    *,
    kind: Kind = "self",
    heads: Sequence[int] | None = None,
    **inputs: Any,
) -> Tensor:
    """What each of `tokens` (B,T) attends to in one layer, (B,h,T,S): weights that `attend` multiplies the values with.

    kind: `self`, or of an encoder-decoder `encoder` (source to source; tokens may be None) and `cross` (tokens to source).
    heads: which, in this order; all where None. Layers and heads count from 0. inputs: as `model.hidden` takes them
    (lengths; source, source_lengths). Rows and columns of padding are to be ignored. T x S numbers a head are made, those of
    no other head or layer. Raises IncompatibleError where the model has no such attention.

        weights = attention_weights(model, None, 0, kind="encoder", source=source, source_lengths=lengths)
        from_ne_to_pas = weights[row, head, ne, pas]
    """
    check_asked(model, (kind,), (layer,), heads)
    found: list[Tensor] = []

    def visit(seen: Seen) -> None:
        if (seen.kind, seen.layer) == (kind, layer):
            found.append(seen.weights(heads))

    look(model, tokens, visit, **inputs)
    return found[0]


def check_asked(
    model: Model, kinds: Sequence[Kind], layers: Sequence[int] | None, heads: Sequence[int] | None, *, first: int = 0
) -> None:
    """Raises IncompatibleError, one line, where the model has none of these. `first`: what the user counts from."""
    there: dict[str, int] = {}
    for kind, layer, _ in attentions(model):
        there[kind] = layer + 1
    if not there:
        raise IncompatibleError(f"run: a model of architecture {model.config.architecture} attends to nothing")
    for kind in kinds:
        if kind not in there:
            raise IncompatibleError(f"kind: the model has no {kind} attention; it has {' and '.join(there)}")
    limits = {"layers": (layers, max(there[kind] for kind in kinds)), "heads": (heads, model.config.n_heads)}
    for name, (asked, n) in limits.items():
        for one in asked or ():
            if not 0 <= one < n:
                nearest = min(max(one, 0), n - 1) + first
                raise IncompatibleError(
                    f"{name}: the model has {n}, {first} to {n - 1 + first}, got {one + first}; the nearest is {nearest}"
                )
