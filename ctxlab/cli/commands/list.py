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

# Facts that a component's class states, in words: (attribute, {value: word}).
_FACTS: tuple[tuple[str, dict[bool, str]], ...] = (
    ("relative", {True: "relative", False: "absolute"}),
    ("bidirectional", {True: "in encoders too", False: "causal only"}),
    ("defined_beyond_training", {True: "any length", False: "trained length only"}),
    ("shared_across_layers", {True: "shared by the layers", False: "a layer's own"}),
)
_EXAMPLE_SIZE = "tiny"  # whose heads and layers the cost of a scheme is stated for
_EXAMPLE_CONTEXT = 256


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
    options += [catalog.Option(name, Path(), paper) for name, (paper, _) in facts.items() if name not in written]
    _print(kind, options, facts)
    return 0


def _is_value(argv: list[str], index: int) -> bool:
    return index > 0 and argv[index - 1] in ("--plugin", "--config-dir", "-cd")


def _facts(group: str, plugin_files: tuple[Path, ...]) -> dict[str, tuple[str, str]]:
    """name -> (paper, what its class states), where names are classes. (This is what takes the time of torch.)"""
    from ctxlab.config import plugins, schema

    for path in plugin_files:
        plugins.load(path)
    registry = schema.REGISTRIES.get(group)
    if registry is None:
        return {}
    rows: dict[str, tuple[str, str]] = {}
    for name in registry.names():
        cls = registry.get(name)
        stated = [str(cls.form)] if hasattr(cls, "form") else []
        stated += [words[getattr(cls, fact)] for fact, words in _FACTS if hasattr(cls, fact)]
        cost = _cost(cls, name) if group == "position" else ""
        rows[name] = str(getattr(cls, "paper", "")), "; ".join(part for part in (", ".join(stated), cost) if part)
    return rows


def _cost(scheme: Any, name: str) -> str:
    """What a scheme adds to a model, by closed form: columns of the product and the cache, trained numbers."""
    import yaml  # type: ignore[import-untyped]

    from ctxlab.model.config import ModelConfig

    size = yaml.safe_load((catalog.conf_dir() / "model" / f"{_EXAMPLE_SIZE}.yaml").read_text(encoding="utf-8"))
    model, config = ModelConfig.model_validate(size), scheme.Config(name=name)
    made = scheme(config, model, _EXAMPLE_CONTEXT)
    ends = made.n_positions if scheme.defined_beyond_training else None
    columns = scheme.key_columns(config, model)
    numbers = scheme.n_parameters(config, model, _EXAMPLE_CONTEXT)
    parts = [f"{columns} more columns a key"] if columns else []
    parts += [f"{numbers:,} parameters ({_EXAMPLE_SIZE} at {_EXAMPLE_CONTEXT})"] if numbers else []
    parts += [f"positions end at {ends:,}: {made.why_they_end}"] if ends else []
    return ", ".join(parts) or "nothing to train or to hold"


def _print(kind: str, options: list[catalog.Option], facts: dict[str, tuple[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from ctxlab.cli import console

    if not options:
        return
    table: Table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, min_width=16)
    table.add_column(overflow="fold")
    for option in options:
        stated = facts.get(option.name, ("", ""))[1]
        text = Text(option.summary)
        if stated:
            text.append(f"\n{stated}", style="dim")
        table.add_row(Text(option.name), text)
    console.stdout().print(Text(kind, style="bold"))
    console.stdout().print(table)
    console.stdout().print()
