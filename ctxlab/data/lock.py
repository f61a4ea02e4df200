"""One process at a time: a lock file beside what is being made; and a folder that is there whole or not at all.

The system drops a lock when its holder dies.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
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


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A draft beside `folder`, whose parent is there, that takes its place when all is done, and is gone when it is not."""
    draft = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        yield draft
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
