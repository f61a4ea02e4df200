"""What a training step holds in memory at its worst, found by running it on tensors that have no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ctxlab.model.base import Model, build_model, read_parts
from ctxlab.model.kernels import traced_for
from ctxlab.model.offload import offloaded
from ctxlab.train.optim.base import OPTIMIZERS, Optimizer
from ctxlab.train.optim.early import EarlyUpdates
from ctxlab.train.precision import autocast
from ctxlab.train.trained import freeze

if TYPE_CHECKING:
    from ctxlab.profiling.measure import Point

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "temporaries")
"""What bytes are there for: activations are what the forward pass leaves, logits what the loss does, temporaries the rest."""


_ASKED_FOR_NUMBERS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
_NO_SUBCLASS = "is not supported for tensor subclasses"  # what torch says where a list or an array is asked for


def asked_for_numbers(error: Exception) -> bool:
    """Whether a trace ended because a component asked fake tensors for what they do not have: values, a shape that depends on
    values, a list or an array, an operation that torch knows nothing of. Anything else is a fault of the component."""
    return isinstance(error, _ASKED_FOR_NUMBERS) or (isinstance(error, RuntimeError) and _NO_SUBCLASS in str(error))


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is on, until each is freed, by what they are for.

    `moments` are the splits when most bytes were alive, one for each stretch between two calls of `mark`. Views share a
    storage and count once. What a kernel sets aside for itself and returns before it ends is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "weights"
        self.now = dict.fromkeys(KINDS, 0)
        self.moments: list[dict[str, int]] = []
        self._total = self._most = 0
        self._alive: dict[int, tuple[str, int]] = {}

    @contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        """New storages are of this kind."""
        before, self.kind = self.kind, kind
        yield
        self.kind = before

    def is_now(self, tensor: Tensor, kind: str) -> None:
        """A tensor turns out to be of another kind than it was made as."""
        key = tensor.untyped_storage()._cdata
        if key in self._alive:
            was, size = self._alive[key]
            self._alive[key] = kind, size
            self.now[was] -= size
            self.now[kind] += size

    def mark(self) -> None:
        """Begins a new stretch."""
        self._most = self._total
        self.moments.append(dict(self.now))

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        if self._total > self._most and self.moments:
            self._most, self.moments[-1] = self._total, dict(self.now)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = self.kind, size
        self.now[self.kind] += size
        self._total += size
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        kind, size = self._alive.pop(key)
        self.now[kind] -= size
        self._total -= size


def trace_step(point: Point) -> list[dict[str, int]]:
    """Bytes of each of KINDS at the worst moment of every stretch of a step's two passes, the optimizer's state left out.

    A stretch ends where the gradient of a parameter is complete: the same ones at every context, in the same order. Within one,
    bytes grow as a line, so that the whole is the largest of some lines.

    The model and the loss are the real ones, run once over the context on torch's fake tensors: shapes and lifetimes without
    memory or arithmetic. These stand on a CPU, since a backward pass over those of a GPU ends the process where torch was built
    without it; the operations are those of the point's device where a model is made of this package's parts, under the CPU's
    autocast, which for them is that of a GPU. Raises what `asked_for_numbers` knows where a component asks for
    numbers.
    """
    with traced_for(point.device), FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        model = _model(point)
        optimizer = _with_state(point, model, live)[1] if point.update == "backward" else None

        def arrived(parameter: Tensor) -> None:
            assert parameter.grad is not None
            live.is_now(parameter.grad, "gradients")
            live.mark()

        for parameter in _trained(model):
            parameter.register_post_accumulate_grad_hook(arrived)
        if optimizer is not None:
            EarlyUpdates(optimizer)  # its hooks come behind
        memory = model.new_memory(1) if model.carries else None
        if memory is not None:
            memory.held.fill_(memory.capacity)
        live.mark()
        with live.counting("temporaries"):
            tokens = torch.zeros(1, point.context + 1, dtype=torch.int64)
        with autocast(point.precision, torch.device("cpu")):  # type: ignore[arg-type]
            with live.counting("activations"):
                source: Any = {"source": tokens[:, :-1]} if model.reads_source else {}
                with offloaded(model.parameters(), move=_elsewhere) if point.offload != "none" else nullcontext():
                    hidden = model.hidden(tokens[:, :-1], memory=memory, **source)
            live.mark()
            with live.counting("logits"):
                loss = model.nats(hidden, tokens[:, 1:]).sum() / point.context
        with live.counting("temporaries"):
            del hidden
            loss.backward()
    return live.moments


def trace_update(point: Point) -> tuple[int, dict[str, int]]:
    """Bytes that the optimizer keeps from step to step, and the split at the worst moment of clipping and its step.

    Where parameters are updated within the backward pass there is no such moment: `trace_step` has it.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        model = _model(point)
        optim, optimizer = _with_state(point, model, live)
        live.mark()
        if point.update == "step":
            with live.counting("gradients"):
                _give_gradients(model)
            live.kind = "temporaries"
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.config.clip or float("inf"))
            optimizer.step()
    return live.now["optimizer"], live.moments[-1]


def _elsewhere(kept: Tensor) -> Callable[[], Tensor]:
    """Moves a storage to where it is not counted."""
    n = kept.untyped_storage().nbytes()
    return lambda: torch.empty(n, dtype=torch.uint8)


def _with_state(point: Point, model: Model, live: Live) -> tuple[Optimizer, torch.optim.Optimizer]:
    """The optimizer of a point and torch's, which has stepped once, without the gradients of that."""
    optim = OPTIMIZERS.get(point.optim["name"])(OPTIMIZERS.config(point.optim))
    optimizer = optim.build(model)
    with live.counting("temporaries"):
        _give_gradients(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for part in getattr(optimizer, "parts", (optimizer,)):
        for state in part.state.values():
            for kept in state.values():
                if isinstance(kept, Tensor):
                    live.is_now(kept, "optimizer")
    return optim, optimizer


def _give_gradients(model: Model) -> None:
    for parameter in _trained(model):
        parameter.grad = torch.empty_like(parameter)


def count_weights(point: Point) -> tuple[int, int]:
    """All weights of the model, and those that are trained. Raises ConfigError where what is frozen has no such name."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _model(point)
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in _trained(model))


def _trained(model: Model) -> list[Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _model(point: Point) -> Model:
    model = build_model(
        read_parts(point.__dict__),
        vocab_size=point.vocab_size,
        context=point.context,
        source_vocab_size=point.source_vocab_size,
    )
    assert point.recompute != "auto", "Point.at comes first"
    model.recompute, model.loss_chunk = point.recompute, point.loss_chunk
    freeze(model, point.freeze)
    return model
