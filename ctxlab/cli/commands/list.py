"""`ctxlab list [KIND]`: what can be composed, one line each, with its paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlab.config import catalog
from ctxlab.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

# What a user calls each group; the group itself works too.
KINDS = {
    "models": "model",
    "positions": "position",
    "attentions": "attention",
    "corpora": "data",
    "tokenizers": "tokenizer",
    "optimizers": "optim",
    "trainers": "trainer",
    "evaluations": "eval",
    "loggers": "logger",
    "experiments": "experiment",
}
USAGE = f"""What can be composed, one line each, with its paper.

  ctxlab list [KIND] [--config-dir DIR] [--plugin FILE.py]

Kinds: {", ".join(KINDS)}. One kind alone also shows what its components state about themselves."""

# Facts that a component's class states, shown when its kind is listed alone.
_FACTS = ("form", "relative", "bidirectional", "defined_beyond_training", "shared_across_layers")


def run(argv: list[str]) -> int:
    """Prints one kind, or all of them. Raises ConfigError for a kind that there is not."""
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    from ctxlab.config.overrides import split
    from ctxlab.registry import nearest

    kinds = [word for index, word in enumerate(argv) if not word.startswith("-") and not _is_value(argv, index)]
    flags = split("list", [word for word in argv if word not in kinds])
    if len(kinds) > 1:
        raise ConfigError(f"list: expected one kind, got {' '.join(kinds)}")
    groups = catalog.groups(flags.config_dirs)
    if not kinds:
        for kind, group in KINDS.items():
            _print(kind, groups.get(group, []), {})
        return 0
    group = KINDS.get(kinds[0], kinds[0])
    if group not in groups:
        raise ConfigError(f"list: there is no kind '{kinds[0]}'{nearest(kinds[0], KINDS)}")
    facts = _facts(group, flags.plugins)
    kind = next((name for name, own in KINDS.items() if own == group), group)
    options = groups[group]
    written = {option.name for option in options}
    options += [catalog.Option(name, Path(), row.pop("paper")) for name, row in facts.items() if name not in written]
    _print(kind, options, facts)
    return 0


def _is_value(argv: list[str], index: int) -> bool:
    return index > 0 and argv[index - 1] in ("--plugin", "--config-dir", "-cd")


def _facts(group: str, plugin_files: tuple[Path, ...]) -> dict[str, dict[str, str]]:
    """name -> what its class states, for the kinds whose names are classes. (This is what takes the time of torch.)"""
    from ctxlab.config import plugins, schema

    for path in plugin_files:
        plugins.load(path)
    registry = schema.REGISTRIES.get(group)
    if registry is None:
        return {}
    rows: dict[str, dict[str, str]] = {}
    for name in registry.names():
        cls = registry.get(name)
        stated = {fact: _word(getattr(cls, fact)) for fact in _FACTS if hasattr(cls, fact)}
        rows[name] = stated | {"paper": str(getattr(cls, "paper", ""))}
    return rows


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _print(kind: str, options: list[catalog.Option], facts: dict[str, dict[str, str]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ctxlab.cli import console

    if not options:
        return
    shown = [fact for fact in _FACTS if any(fact in row for row in facts.values())]
    table: Table = Table(box=box.SIMPLE_HEAD if shown else None, show_header=bool(shown), pad_edge=False, title=None)
    table.add_column(kind, no_wrap=True, min_width=16)
    for fact in shown:
        table.add_column(fact.replace("_", " "))
    table.add_column("what it is", overflow="fold")
    for option in options:
        facts_here = [facts.get(option.name, {}).get(fact, "") for fact in shown]
        table.add_row(Text(option.name), *facts_here, Text(option.summary))
    if not shown:
        console.stdout().print(Text(kind, style="bold"))
    console.stdout().print(table)
    console.stdout().print()
