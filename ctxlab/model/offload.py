"""What the forward pass keeps for backward waits in the host's memory, where the device has less than backward needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

from ctxlab.errors import ConfigError
from ctxlab.model.remake import Shared

OffloadSetting = Literal["none", "cpu"]
SMALLEST = 2**16
"""Bytes from which a storage is moved: smaller ones, statistics and scalars, cost more calls than memory."""

_AWAY: ContextVar[bool] = ContextVar("_AWAY", default=False)


def is_away() -> bool:
    """Whether what is kept here waits elsewhere: then it need not be made again to save room, which would hold its parts."""
    return _AWAY.get()


def require_elsewhere(setting: OffloadSetting, device: torch.device) -> None:
    """Raises ConfigError where the device's memory is the host's."""
    if setting == "cpu" and device.type == "cpu":
        raise ConfigError("trainer.offload: on a CPU what backward needs is in its memory already; use none")


def to_host(kept: Tensor) -> Callable[[], Tensor]:
    """Copies the storage of a tensor to the host, pinned where that is another memory; the answer brings it back, n bytes (n,).

    Copies stand in the order of the device's stream, like what made the bytes and what will read them: nothing waits.
    """
    device, pinned = kept.device, kept.device.type == "cuda"
    stored = torch.empty(0, dtype=torch.uint8, device=device).set_(kept.untyped_storage())
    host = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=pinned).copy_(stored, non_blocking=pinned)
    return lambda: torch.empty_like(host, device=device, pin_memory=False).copy_(host, non_blocking=pinned)


@contextmanager
def offloaded(
    parameters: Iterable[Tensor], *, smallest: int = SMALLEST, move: Callable[[Tensor], Callable[[], Tensor]] = to_host
) -> Iterator[None]:
    """Inside, what autograd keeps is moved, and comes back when backward first reads it, until the last that does.

    Storages of `smallest` bytes or more, but those of `parameters`, move whole and once, however many operations keep views of
    them. The gradients are the same bits. With blocks that are run again (`trainer.recompute=block`) only their inputs are kept
    at all. Copies of weights in autocast's dtype move too.
    """
    staying = {parameter.untyped_storage()._cdata for parameter in parameters}
    moved: dict[tuple[int, int], Shared] = {}  # by storage and version, as long as the storage is there

    def pack(kept: Tensor) -> Any:
        storage = kept.untyped_storage()
        if storage._cdata in staying or storage.nbytes() < smallest:
            return kept.detach()
        key = storage._cdata, kept._version
        if key not in moved:
            moved[key] = Shared(move(kept))
            weakref.finalize(storage, moved.pop, key, None)
        shared = moved[key]
        shared.uses += 1
        return shared, kept.dtype, kept.size(), kept.stride(), kept.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        shared, dtype, *view = packed
        back: Tensor = shared.take()
        return back.view(dtype).as_strided(*view)

    token = _AWAY.set(True)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _AWAY.reset(token)
