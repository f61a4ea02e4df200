"""Where what can be made again is kept for all runs of a user."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def default_cache() -> Path:
    """The user's cache folder; CTXLAB_CACHE sets it."""
    said = os.environ.get("CTXLAB_CACHE")
    return Path(said).expanduser() if said else Path(platformdirs.user_cache_dir("ctxlab", appauthor=False))
