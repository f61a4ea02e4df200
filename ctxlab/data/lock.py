"""One process at a time: a lock file beside what is being made. The system drops it when its holder dies."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ctxlab.errors import DataError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until nobody else is inside the lock of `path`, then holds it. Makes the parent folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"paths.cache: {path.parent} cannot be written: {error.strerror or error}") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
