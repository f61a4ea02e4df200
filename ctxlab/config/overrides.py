"""A command line, read before Hydra sees it: flags, free text and bare words are taken off, overrides are left.

Hydra's lexer stops at accents, quotes, commas, `=`, `#` and `~`, and `${` interpolates, so text that a person writes
(a prompt, a note, a path) never passes through it: it is set, unchanged, on the resolved config.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ctxlab.errors import ConfigError
from ctxlab.registry import nearest

# Values that are text, not Hydra's grammar: whole keys, every key under a prefix, and every key with such a last part.
FREE_TEXT_KEYS = frozenset(
    {"prompt", "text", "target", "note", "name", "data.field", "model.pretrained", "logger.project", "logger.entity"}
)
FREE_TEXT_PREFIXES = ("paths.",)
FREE_TEXT_ENDINGS = frozenset(
    {
        "path",
        "target_path",
        "test_path",
        "file",
        "prompt_file",
        "prompts_file",
        "text_file",
        "include_path",
        "haystack",
        "squad",
        "hotpotqa",
    }
)

# Keys whose value names runs: an id, a unique prefix, a path, `last`, or several of them in brackets.
SELECTOR_KEYS = ("run", "init", "resume")

# What a word without `key=` means, in order, for the commands that take any.
BARE_WORDS = {"eval": ("run",), "generate": ("run", "prompt"), "attention": ("run", "text")}

# `--resolve` is Hydra's: what `--cfg job` prints here always has its references filled in.
FLAGS = ("--plugin", "--config-dir", "--cfg", "--resolve", "--multirun", "--json", "--help")
_SHORT = {"-m": "--multirun", "-cd": "--config-dir", "-c": "--cfg", "-h": "--help"}

_ASSIGNMENT = re.compile(r"(?P<prefix>\+\+|\+|~)?(?P<key>[A-Za-z_][\w./@:-]*)=(?P<value>.*)", re.DOTALL)
_DELETION = re.compile(r"~[A-Za-z_][\w./@-]*")


@dataclass(frozen=True)
class Line:
    """What the user typed after `ctxlab`, taken apart. `overrides` is what Hydra gets, in order."""

    command: str
    argv: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    free_text: dict[str, str] = field(default_factory=dict)
    selectors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    plugins: tuple[Path, ...] = ()
    config_dirs: tuple[Path, ...] = ()
    multirun: bool = False
    print_config: bool = False
    as_json: bool = False
    help: bool = False
    launcher: tuple[str, ...] = ()  # hydra/launcher=NAME and its settings: who runs a sweep, no part of any config
    sweeper: tuple[str, ...] = ()  # hydra/sweeper=NAME and its settings: which cells there are, no part of any either

    @property
    def text(self) -> str:
        """The line that does the same again, quoted for a shell."""
        return shlex.join(["ctxlab", self.command, *self.argv])


def is_free_text(key: str) -> bool:
    """Whether the value of `key` is taken literally instead of being parsed by Hydra."""
    return key in FREE_TEXT_KEYS or key.startswith(FREE_TEXT_PREFIXES) or key.rpartition(".")[2] in FREE_TEXT_ENDINGS


def key_of(override: str) -> str:
    """The key of one override, without `+`, `++`, `~`: `key_of("+model.bias=true") == "model.bias"`."""
    return override.split("=", 1)[0].lstrip("+~")


def split_selector(text: str) -> tuple[str, ...]:
    """`A` -> (A,); `[A,B]` -> (A, B). A path keeps its commas unless the whole value is in brackets."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return tuple(part.strip() for part in text[1:-1].split(",") if part.strip())
    return (text,)


def split(command: str, argv: Sequence[str]) -> Line:
    """Take a command's words apart. Raises ConfigError for an unknown flag and for a word that fits nowhere.

    Selectors under `-m` stay with Hydra (`-m run=A,B` is two cells) and are resolved cell by cell.
    """
    multirun = any(_SHORT.get(word, word) == "--multirun" for word in argv)
    plugins: list[Path] = []
    config_dirs: list[Path] = []
    overrides: list[str] = []
    free_text: dict[str, str] = {}
    selectors: dict[str, tuple[str, ...]] = {}
    bare: list[str] = []
    launcher: list[str] = []
    sweeper: list[str] = []
    print_config = show_help = as_json = False

    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            bare.extend(words)
            break
        if word.startswith("-") and len(word) > 1:
            flag, has_value, value = word.partition("=")
            flag = _SHORT.get(flag, flag)
            if flag in ("--plugin", "--config-dir", "--cfg"):
                if not has_value:
                    if not words:
                        raise ConfigError(f"{flag}: expected a value after it")
                    value = words.pop(0)
                if flag == "--cfg":
                    if value != "job":
                        raise ConfigError(f"--cfg: expected job, got '{value}'")
                    print_config = True
                else:
                    path = Path(value).expanduser()
                    _demand(flag, path)
                    (plugins if flag == "--plugin" else config_dirs).append(path.resolve())
            elif has_value or flag not in FLAGS:
                raise ConfigError(f"{flag}: no such flag of ctxlab {command}{nearest(flag, FLAGS)}")
            elif flag == "--help":
                show_help = True
            elif flag == "--json":
                if command != "eval" or multirun:
                    raise ConfigError("--json: is of one ctxlab eval; of recorded runs: ctxlab runs --json")
                as_json = True
            continue
        match = _ASSIGNMENT.fullmatch(word)
        if match is None:
            if _DELETION.fullmatch(word) and command not in BARE_WORDS:
                overrides.append(word)
            else:
                bare.append(word)
            continue
        key, value = match["key"], match["value"]
        if (key == "hydra/launcher" or key.startswith("hydra.launcher.")) and "_target_" not in key:
            launcher.append(word)
            continue
        if key.startswith(("hydra/sweeper", "hydra.sweeper.")) and not key.startswith("hydra.sweeper.params"):
            sweeper.append(word)
            continue
        if match["prefix"] == "~":
            overrides.append(word)
        elif key in SELECTOR_KEYS and not multirun:
            selectors[key] = split_selector(value)
        elif is_free_text(key):
            free_text[key] = value
        else:
            overrides.append(word)

    for position, word in enumerate(bare):
        names = BARE_WORDS.get(command, ())
        if position >= len(names):
            raise ConfigError(_misplaced(command, word, names))
        name = names[position]
        if name in free_text or name in selectors:
            raise ConfigError(f"{name}: given twice, as '{word}' and as {name}=...")
        if name == "run":
            selectors[name] = split_selector(word)
        else:
            free_text[name] = word

    return Line(
        command=command,
        argv=tuple(argv),
        overrides=tuple(overrides),
        free_text=free_text,
        selectors=selectors,
        plugins=tuple(plugins),
        config_dirs=tuple(config_dirs),
        multirun=multirun,
        print_config=print_config,
        as_json=as_json,
        help=show_help,
        launcher=tuple(launcher),
        sweeper=tuple(sweeper),
    )


def _demand(flag: str, path: Path) -> None:
    if flag == "--plugin" and not path.is_file():
        raise ConfigError(f"--plugin: there is no file {path}")
    if flag == "--config-dir" and not path.is_dir():
        raise ConfigError(f"--config-dir: there is no folder {path}")


def _misplaced(command: str, word: str, names: tuple[str, ...]) -> str:
    if names:
        taken = " and ".join(names)
        return f"{command}: '{word}' is one word too many (bare words are {taken}; quote text with spaces)"
    return f"{command}: expected key=value, got '{word}' (see ctxlab {command} --help)"
