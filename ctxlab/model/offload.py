"""What the forward pass keeps for backward waits in the host's memory, or on its disk, where there is too little."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ctxlab.cache import default_cache
from ctxlab.errors import ConfigError, RunError
from ctxlab.model.remake import Shared

OffloadSetting = Literal["none", "cpu", "disk"]
Move = Callable[[Tensor], Callable[[], Tensor]]
"""Moves the storage of a tensor; the answer brings it back, n bytes (n,)."""

SMALLEST = 2**16
"""Bytes from which a storage is moved: smaller ones, statistics and scalars, cost more calls than memory."""

_AWAY: ContextVar[bool] = ContextVar("_AWAY", default=False)


def is_away() -> bool:
    """Whether what is kept here waits elsewhere: then it need not be made again to save room, which would hold its parts."""
    return _AWAY.get()


def require_elsewhere(setting: OffloadSetting, device: torch.device) -> None:
    """Raises ConfigError where the device's memory is the host's."""
    if setting == "cpu" and device.type == "cpu":
        raise ConfigError("trainer.offload: on a CPU what backward needs is in its memory already; use none or disk")


def offloading(setting: OffloadSetting, parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """`offloaded` to where a setting says, or nothing."""
    if setting == "none":
        return nullcontext()
    return offloaded(parameters, move=to_host if setting == "cpu" else ToDisk(default_cache() / "offload"))


def to_host(kept: Tensor) -> Callable[[], Tensor]:
    """To the host's memory, pinned where that is not the device's own.

    Copies stand in the order of the device's stream, like what made the bytes and what will read them: nothing waits.
    """
    device, pinned = kept.device, kept.device.type == "cuda"
    stored = _bytes(kept)
    host = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=pinned).copy_(stored, non_blocking=pinned)
    return lambda: torch.empty_like(host, device=device, pin_memory=False).copy_(host, non_blocking=pinned)


class ToDisk:
    """To a file without a name in a folder, one storage behind the other. It is gone with the last that could be read from it.

    The file takes as much of the disk as all of it would of memory. What the system keeps of it in memory it gives back where
    others need that. Raises RunError where it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.end = folder, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  it stays open as long as this
        except OSError as error:
            raise self._full(error) from error
        weakref.finalize(self, self.file.close)

    def __call__(self, kept: Tensor) -> Callable[[], Tensor]:
        stored, device, start = _bytes(kept), kept.device, self.end
        left = stored.cpu().numpy().data
        n = len(left)
        try:
            while left:  # a call writes 2 GiB at most
                written = os.pwrite(self.file.fileno(), left, self.end)
                left, self.end = left[written:], self.end + written
        except OSError as error:
            raise self._full(error) from error

        def back() -> Tensor:
            room = torch.empty(n, dtype=torch.uint8)
            left, at = room.numpy().data, start
            while left:
                read = os.preadv(self.file.fileno(), [left], at)
                if not read:
                    raise RunError(f"trainer.offload: what was kept in {self.folder} is not there any more")
                left, at = left[read:], at + read
            return room.to(device)

        return back

    def _full(self, error: OSError) -> RunError:
        return RunError(f"trainer.offload: {self.folder} cannot be written: {error.strerror}; use another paths.cache")


def _bytes(kept: Tensor) -> Tensor:
    """The storage of a tensor, (n,) uint8."""
    return torch.empty(0, dtype=torch.uint8, device=kept.device).set_(kept.untyped_storage())


@contextmanager
def offloaded(parameters: Iterable[Tensor], *, smallest: int = SMALLEST, move: Move = to_host) -> Iterator[None]:
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
