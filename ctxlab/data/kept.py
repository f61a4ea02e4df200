"""Examples as a folder of the cache: made once for each state of their files and each tokenizer, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctxlab.cache import default_cache
from ctxlab.data.lock import locked, made_whole
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.sides import Tokenizers
from ctxlab.errors import DataError

_FACTS = "facts.json"


def kept(
    name: str,
    form: int,
    facts: Mapping[str, Any],
    tokenizer: Tokenizer.Config | Tokenizers,
    cache: Path | None,
    make: Callable[[Path], Mapping[str, Any]],
) -> tuple[Path, dict[str, Any]]:
    """The folder that `make` fills once for each `facts` and tokenizer, and its facts: these and those that `make` returned.

    name: of the folders of this kind; form: of what is in one, raised when the same input gives other files.
    """
    said = tokenizer.facts() if isinstance(tokenizer, Tokenizers) else tokenizer.model_dump(mode="json")
    key = json.dumps([form, facts, said], sort_keys=True, ensure_ascii=False)
    root = default_cache() if cache is None else cache
    folder = root / name / hashlib.sha256(key.encode()).hexdigest()[:24]
    with locked(folder):
        if not (folder / _FACTS).exists():
            with made_whole(folder) as draft:
                described = {**facts, **make(draft)}
                (draft / _FACTS).write_text(json.dumps(described, ensure_ascii=False, indent=1), encoding="utf-8")
    try:
        return folder, json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error


def damaged(folder: Path, error: Exception) -> DataError:
    return DataError(f"paths.cache: {folder} is damaged ({error}); remove it and run again")
