"""How a run begins with another's weights: what is taken over, what is new, what is left behind, and what does not fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.sides import Tokenizers
from ctxlab.errors import ConfigError
from ctxlab.model.base import ARCHITECTURES, Model, Side
from ctxlab.model.position.base import POSITIONS, Position
from ctxlab.train.stacks import EMBEDDING, ENCODER, arrange

_LAYER = re.compile(r"(.*\bblocks\.)\d+\.(\w+).*")  # a module of one: what is before its number, and which part it is


@dataclass(frozen=True)
class Initial:
    """Weights of another run, and what they stand for: the scheme of its positions and its tokens (None: as here)."""

    weights: Mapping[str, Tensor]
    position: str | None = None
    tokenizers: Tokenizers | None = None
    causal: bool | None = None  # whether all of the run's model looks back only
    architecture: str = ""  # of the run's model, where it may be another than here
    sha256: str = ""  # of the file of weights, where it matters


@dataclass(frozen=True)
class Begun:
    """What became of a run's weights, but for those that were taken over as they are."""

    new: dict[str, tuple[int, ...]] = field(default_factory=dict)  # name -> shape, drawn as in a fresh model
    dropped: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the run, without a place here
    rows: dict[str, int] = field(default_factory=dict)  # of the vocabulary: kept, new, dropped
    rows_of: tuple[str, ...] = ()  # the parameters that have these
    stacks: dict[str, str] = field(default_factory=dict)  # stack here -> what it was in the run, where that is another
    cut: dict[str, dict[str, int]] = field(default_factory=dict)  # table of positions -> rows kept and dropped
    multiplied: dict[str, float] = field(default_factory=dict)  # embeddings -> by what, to enter as they did
    entering: dict[str, float] = field(default_factory=dict)  # embeddings that were not -> how much larger tokens enter

    @property
    def facts(self) -> dict[str, Any]:
        """For the record; nothing where all was taken over."""
        found = {
            "new": {name: list(shape) for name, shape in self.new.items()},
            "dropped": {name: list(shape) for name, shape in self.dropped.items()},
            "vocabulary": self.rows,
            "stacks": self.stacks,
            "positions": self.cut,
            "multiplied": self.multiplied,
            "entering": self.entering,
        }
        return {name: what for name, what in found.items() if what}

    @property
    def lines(self) -> list[str]:
        """For people."""
        lines = [f"init: the {here} begins as the run's {there}" for here, there in self.stacks.items()]
        if self.dropped:
            lines.append(f"init: left behind {listed(self.dropped)}")
        if self.new:
            lines.append(f"init: new, and drawn as in a fresh model, {listed(self.new)}")
        for name, factor in self.multiplied.items():
            lines.append(
                f"init: {name} multiplied by {factor:.4g}: tokens enter as large as in the run, whose positions scale them in "
                "another way"
            )
        for name, factor in self.entering.items():
            lines.append(
                f"init: tokens enter {factor:.4g} times as large as in the run: its positions scale them in another way, and "
                f"{name}, which the head reads too, is left as it was"
            )
        for name, number in self.cut.items():
            lines.append(f"init: of {name} the first {number['kept']:,} rows kept, {number['dropped']:,} left behind")
        if self.rows:
            of = " and ".join(self.rows_of)
            dropped = f", {self.rows['dropped']:,} left behind" if self.rows["dropped"] else ""
            new = f", {self.rows['new']:,} new, each the mean of the run's" if self.rows["new"] else ""
            lines.append(f"init: of {of} {self.rows['kept']:,} rows kept by their tokens{new}{dropped}")
        return lines


def begin(model: Model, initial: Initial, tokenizers: Tokenizers) -> Begun:
    """Gives a fresh model another run's weights, and says which are not as they were.

    Another scheme of positions brings its own parameters, as drawn, and those of the run's scheme are left behind. So does the
    same one where they mean something else, as T5's buckets do in an encoder. Where the two multiply embedded tokens by
    other numbers, as the sinusoidal does by sqrt(d_model), embeddings are multiplied by what is missing, but for one that is
    the head's matrix too: of that it is said. A table of positions is cut to a shorter context, and is not made longer.

    Of another tokenizer every token that the run knew has its row, and a new one the mean of the run's rows (Hewitt 2021,
    nlp.stanford.edu/~johnhew/vocab-expansion.html: a new token is then no likelier than the old ones are on average). A
    model of another architecture has the stacks that the run has of its kind, or can make into it (stacks.py).
    Everything else has to fit. Raises ConfigError, one line.
    """
    own = model.state_dict()
    arranged = arrange(initial.weights, initial.architecture or model.config.architecture, model)
    origin, new = arranged.origin, arranged.new
    for scheme, module in model.named_modules():
        if isinstance(module, Position) and _means_other(module, initial, origin.get(_first(own, scheme))):
            _begin_afresh(f"{scheme}.", origin, own, new)
    if not _same_head(own, initial.weights):
        _begin_afresh("task_head.", origin, own, new)
    weights = {name: initial.weights[there] for name, there in origin.items()}
    rows, rows_of = _move_rows(weights, origin, model.token_rows, initial.tokenizers, tokenizers)
    cut = _cut(weights, own, model)
    multiplied, entering = _rescale(weights, model, initial.position)
    load_into(model, weights | {name: own[name] for name in new}, "init")
    used = set(origin.values())
    return Begun(
        new={name: tuple(own[name].shape) for name in own if name in new},
        dropped={name: tuple(weight.shape) for name, weight in initial.weights.items() if name not in used},
        rows=rows,
        rows_of=rows_of,
        stacks=arranged.stacks,
        cut=cut,
        multiplied=multiplied,
        entering=entering,
    )


def _begin_afresh(below: str, origin: dict[str, str], own: Mapping[str, Tensor], new: set[str]) -> None:
    """What is named below it is not taken over but as drawn."""
    for name in [name for name in origin if name.startswith(below)]:
        del origin[name]
    new |= {name for name in own if name.startswith(below)}


def _same_head(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    """Whether the head of a task can go on: it has the same shapes."""
    ours, theirs = ({n: w.shape for n, w in some.items() if n.startswith("task_head.")} for some in (own, weights))
    return ours == theirs


def _first(names: Iterable[str], below: str) -> str:
    return next((name for name in names if name.startswith(f"{below}.")), "")


def _move_rows(
    weights: dict[str, Tensor],
    origin: Mapping[str, str],
    token_rows: Mapping[str, Side],
    old: Tokenizers | None,
    new: Tokenizers,
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Gives the rows of `weights` the order of the new tokens: how many were kept, new and dropped, and in which parameters.

    Raises ConfigError where tokens have other ids than they had and not all of their rows can be found.
    """
    if old is None:
        return {}, ()
    rows: Counter[str] = Counter()
    moved = []
    found: dict[tuple[Tokenizer, Tokenizer], Tensor | None] = {}
    for name, side in token_rows.items():
        if name not in weights:
            continue
        theirs, ours = pair = getattr(old, _side_there(origin[name], name, side)), getattr(new, side)
        if pair not in found:
            found[pair] = shared_rows(*pair)
        if (index := found[pair]) is None:
            continue
        if len(weights[name]) != theirs.vocab_size:
            raise ConfigError(
                f"init: {name} of the run has {len(weights[name]):,} rows, and its tokenizer {theirs.vocab_size:,} tokens"
            )
        weights[name] = _by_token(weights[name], index)
        moved.append(name)
    for (theirs, ours), index in found.items():
        if index is not None:
            rows.update(_check_shared(index, theirs, ours))
    if not found and shared_rows(old.target, new.target) is not None:
        raise ConfigError(
            "init: tokens have other ids than in the run, and no weight of this model is known to have a row for each; "
            "leave the tokenizer out"
        )
    return dict(rows), tuple(moved)


def _cut(weights: dict[str, Tensor], own: Mapping[str, Tensor], model: Model) -> dict[str, dict[str, int]]:
    """Leaves of tables of positions the rows that there are here. Raises ConfigError where there are more than in the run."""
    cut = {}
    for name in model.position_rows:
        there, here = len(weights.get(name, own[name])), len(own[name])
        if there < here:
            other = " or position=rope" if "position" in model.parts else ""
            raise ConfigError(
                f"context: the positions that the run has learned end at {there}; use context={there}{other}"
            )
        if there > here:
            weights[name] = weights[name][:here]
            cut[name] = {"kept": here, "dropped": there - here}
    return cut


def _rescale(weights: dict[str, Tensor], model: Model, before: str | None) -> tuple[dict[str, float], dict[str, float]]:
    """Makes up for a scheme that multiplies embedded tokens by another number than the one before, or says by which."""
    scheme = next((module for module in model.modules() if isinstance(module, Position)), None)
    if scheme is None or before not in POSITIONS.names():
        return {}, {}
    factor = POSITIONS.get(before).embedding_scale(model.config) / scheme.embedding_scale(model.config)
    if factor == 1:
        return {}, {}
    names = [name for name in (EMBEDDING, ENCODER + EMBEDDING) if name in weights]
    tied = [name for name in names if name == EMBEDDING and model.head is None]
    multiplied = [name for name in names if name not in tied]
    for name in multiplied:
        weights[name] = weights[name] * factor
    return dict.fromkeys(multiplied, factor), dict.fromkeys(tied, 1 / factor)


def _side_there(origin: str, name: str, side: Side) -> Side:
    """Whose tokens a weight of the run has rows of, which may be another's name and side here."""
    if origin == name:
        return side
    return "source" if origin.startswith(ENCODER) else "target"


def _means_other(scheme: Position, initial: Initial, origin: str | None) -> bool:
    """Whether the scheme's parameters, of which the run has called the first `origin`, are no longer what they were."""
    causal = initial.causal
    if initial.architecture and ARCHITECTURES.get(initial.architecture).reads_source and origin is not None:
        causal = not origin.startswith(ENCODER)
    turned = scheme.directed and causal is not None and scheme.causal != causal
    return initial.position is not None and (scheme.config.name != initial.position or turned)


def shared_rows(old: Tokenizer, new: Tokenizer) -> Tensor | None:
    """Of each new token the same token's old id, or -1, (V,) int64; None where all ids are as they were.

    Tokens of the same bytes are the same, the k-th of them the k-th (a letter may be a piece and a byte); special ones where
    they have the same part to play: padding, begin, end, mask, the k-th sentinel.
    """
    there: dict[Any, int] = {}
    for token, names in enumerate(_names(old)):
        for name in names:
            there.setdefault(name, token)
    found = [next((there[name] for name in names if name in there), -1) for names in _names(new)]
    if found == list(range(old.vocab_size)):
        return None
    return torch.tensor(found)


def _names(tokenizer: Tokenizer) -> Iterator[list[Any]]:
    """What each token is known by."""
    roles = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "mask": tokenizer.mask_id}
    sentinels = {tokenizer.sentinel_id(k): k for k in range(tokenizer.config.sentinels)}
    seen: Counter[bytes] = Counter()
    for token, piece in enumerate(tokenizer.pieces):
        if token in sentinels:
            yield [("sentinel", sentinels[token])]
            continue
        played = [role for role, at in roles.items() if at == token]
        if played:
            yield list(played)
            continue
        seen[piece] += 1
        yield [(piece, seen[piece])]


def _check_shared(index: Tensor, old: Tokenizer, new: Tokenizer) -> dict[str, int]:
    kept = int((index >= 0).sum())
    gone = set(range(old.vocab_size)) - set(index.tolist())
    text = [token for token, piece in enumerate(old.pieces) if piece]
    shared = len(text) - len(gone & set(text))
    if 2 * shared < len(text):
        raise ConfigError(
            f"init: of the {len(text):,} pieces that the run has learned, only {shared:,} are among the "
            f"{sum(map(bool, new.pieces)):,} of tokenizer={new.config.name}; leave the tokenizer out, or use one that has them"
        )
    return {"kept": kept, "new": len(index) - kept, "dropped": len(gone)}


def _by_token(weight: Tensor, index: Tensor) -> Tensor:
    """Rows (V_old, ...) as those of the new tokens, (V, ...)."""
    mean = weight.double().mean(0).to(weight.dtype)
    found = weight[index.clamp(min=0)]
    found[index < 0] = mean
    return found


def load_into(model: Model, weights: Mapping[str, Tensor], key: str) -> None:
    """Copies weights into a model of the same shape, or says what differs. `key` is the setting that brought them."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if wrong:
        first = wrong[0]
        raise ConfigError(
            f"{key}: the weights do not fit this model: {first} is {_shape(given.get(first))} there, "
            f"{_shape(own.get(first))} here{f', and {len(wrong) - 1} more differ' if len(wrong) > 1 else ''}"
        )
    model.load_state_dict(dict(weights))


def listed(parameters: Mapping[str, tuple[int, ...]]) -> str:
    """For people: each with its shape; of more than a few the modules, those of all layers as one."""
    if len(parameters) <= 4:
        return ", ".join(f"{name} ({_shape(shape)})" for name, shape in parameters.items())
    modules = Counter(_LAYER.sub(r"\1*.\2", name.rpartition(".")[0]) for name in parameters)
    return ", ".join(f"{module} ({number} weight{'s' if number > 1 else ''})" for module, number in modules.items())


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))
