"""What can be seen to be missing before anything is written down: a device, a key for the mirror, the text itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlab.errors import ConfigError, CtxlabError

if TYPE_CHECKING:
    from ctxlab.config.prepare import Cell
    from ctxlab.data.progress import Progress


def check(config: Any, progress: Progress) -> None:
    """Raises ConfigError or DataError where this machine lacks what a config asks for; fetches its text."""
    from ctxlab.cache import default_cache
    from ctxlab.data.source import SOURCES
    from ctxlab.evaluation.harness import check_harness
    from ctxlab.model.offload import require_elsewhere
    from ctxlab.records.sinks import check_mirror
    from ctxlab.train.lora import check_installed
    from ctxlab.train.precision import resolve_device

    if hasattr(config, "trainer") and not hasattr(config, "plan"):  # a device that is planned for need not be here
        device = resolve_device(config.trainer.accelerator)
        require_elsewhere(getattr(config.trainer, "offload", "none"), device)
    if hasattr(config, "logger"):
        check_mirror(config.logger)
    if getattr(getattr(getattr(config, "trainer", None), "lora", None), "r", "none") != "none":
        check_installed()
    harness: Any = getattr(getattr(config, "eval", None), "lm_eval", "none")
    if harness != "none":
        check_harness(harness, progress)
    data: Any = getattr(config, "data", "none")
    cache = config.paths.cache
    if data != "none":
        SOURCES.get(data.name)(data).fetch(default_cache() if cache == "auto" else Path(cache).expanduser(), progress)
    file = getattr(getattr(config, "tokenizer", None), "path", None)
    has_a_copy = any(getattr(config, key, "none") != "none" for key in ("resume", "init"))
    if file is not None and not has_a_copy and not Path(file).expanduser().is_file():
        raise ConfigError(f"tokenizer.path: there is no file {file}")
    pretrained = getattr(getattr(config, "model", None), "pretrained", "none")
    if pretrained != "none" and not has_a_copy:
        from ctxlab.model.bert_weights import check_folder

        check_folder(Path(pretrained).expanduser())


def check_cells(cells: Iterable[Cell], progress: Progress) -> None:
    """Checks every cell of a sweep that will run: its text is fetched here and once, not in the middle of a sweep.

    Raises ConfigError with one line for each mistake and the cells that make it.
    """
    problems: dict[str, str] = {}
    wrong: dict[str, list[str]] = {}
    for number, cell in enumerate(cells):
        if cell.skipped:
            continue
        parts = {key: cell.config.get(key) for key in ("trainer", "logger", "data", "tokenizer", "eval", "paths")}
        parts["pretrained"] = cell.config.get("model", {}).get("pretrained")
        asked = json.dumps(parts, sort_keys=True)
        if asked not in problems:
            problems[asked] = _problem(cell.typed, progress)
        if problems[asked]:
            wrong.setdefault(problems[asked], []).append(str(number))
    if wrong:
        raise ConfigError("\n".join(f"{text} (cell {', '.join(numbers)})" for text, numbers in wrong.items()))


def _problem(config: Any, progress: Progress) -> str:
    try:
        check(config, progress)
    except CtxlabError as error:
        return str(error)
    return ""
