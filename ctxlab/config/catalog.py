"""What can be composed, read from the file names and comments of conf/ alone: help, `list`, completion, nearest names.

Nothing here imports Hydra, OmegaConf or torch, so a page of help costs milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Between what a YAML is and lines that show it in use, in its first comment.
EXAMPLE = ":  "

_ENTRY = re.compile(
    r"(?P<indent> *)(?P<key>[A-Za-z_]\w*):(?:\s+(?P<value>[^#\s].*?))?\s*(?:(?<=\s)#\s*(?P<comment>.*))?"
)
_DEFAULT = re.compile(
    r"\s*-\s*(?:override\s+/?)?(?P<group>[\w/]+):\s*(?P<option>\[.*?\]|[^\s#]+)\s*(?:#\s*(?P<comment>.*))?"
)


@dataclass(frozen=True)
class Option:
    """One YAML of a group: `position/rope.yaml` is option `rope`, `data/task/mqar.yaml` is option `task/mqar`. The summary is
    its first comment line."""

    name: str
    path: Path
    summary: str


@dataclass(frozen=True)
class Entry:
    """One value of a YAML, as it is written: dotted key, text of the value, trailing comment."""

    key: str
    value: str
    comment: str

    @property
    def choices(self) -> list[str]:
        """The words it may be, where its comment begins with them: `auto | fp32 | bf16: ...`."""
        if self.value in ("true", "false"):
            return ["true", "false"]
        start = self.comment.split(":", 1)[0]
        return [word.strip() for word in start.split(" | ")] if " | " in start else []


@dataclass(frozen=True)
class Default:
    """One line of a primary config's defaults list."""

    group: str
    option: str
    comment: str


def conf_dir() -> Path:
    """The shipped conf/: the repository's beside an editable install or a checkout, else the copy inside the wheel.

    An editable install also leaves a copy in site-packages, which goes stale: it is never looked at, since the package
    itself is imported from the repository.
    """
    package = Path(__file__).resolve().parent.parent
    repository = package.parent
    if (repository / "pyproject.toml").is_file() and (repository / "conf" / "train.yaml").is_file():
        return repository / "conf"
    return package / "conf"


def groups(folders: Sequence[Path] = ()) -> dict[str, list[Option]]:
    """Group -> its options by name, over the shipped conf/ and then each of `folders`."""
    found: dict[str, dict[str, Option]] = {}
    for folder in (conf_dir(), *folders):
        for path in sorted(folder.glob("*/**/*.yaml")):
            group, *below = path.relative_to(folder).with_suffix("").parts
            name = "/".join(below)
            found.setdefault(group, {}).setdefault(name, Option(name, path, summary(path)))
    return {group: [found[group][name] for name in sorted(found[group])] for group in sorted(found)}


def defaults(command: str) -> list[Default]:
    """The groups that a command composes, in order, with the option each starts from."""
    result = []
    for line in _defaults_block((conf_dir() / f"{command}.yaml").read_text(encoding="utf-8")):
        match = _DEFAULT.fullmatch(line)
        if match:
            result.append(Default(match["group"], match["option"], match["comment"] or ""))
    return result


def entries(path: Path) -> Iterator[Entry]:
    """The keys of a YAML file with their comments, without its defaults list and its `hydra` part.

    A key that only holds others has no value.
    """
    stack: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _ENTRY.fullmatch(line)
        if not match:
            continue
        indent = len(match["indent"])
        while stack and stack[-1][0] >= indent:
            stack.pop()
        stack.append((indent, match["key"]))
        if stack[0][1] not in ("defaults", "hydra"):
            yield Entry(".".join(part for _, part in stack), match["value"] or "", match["comment"] or "")


def keys(command: str, folders: Sequence[Path] = ()) -> list[str]:
    """Every dotted key that a line of `command` may set: its own and those of every option of its groups."""
    found = {entry.key for entry in entries(conf_dir() / f"{command}.yaml") if entry.value}
    options = groups(folders)
    for default in defaults(command):
        for option in options.get(default.group, []):
            if not is_global(option.path):
                found.update(f"{default.group}.{entry.key}" for entry in entries(option.path) if entry.value)
    return sorted(found)


def is_global(path: Path) -> bool:
    """Whether a YAML is placed at the root (an experiment) instead of under its group."""
    with path.open(encoding="utf-8") as file:
        return any(line.replace(" ", "").startswith("#@package_global_") for line in file)


def summary(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            text = line.strip()
            if text.startswith("#") and not text.lstrip("# ").startswith("@package"):
                return text.lstrip("# ").strip().split(EXAMPLE)[0]
            if text and not text.startswith("#"):
                break
    return ""


def _defaults_block(text: str) -> Iterator[str]:
    inside = False
    for line in text.splitlines():
        if line.startswith("defaults:"):
            inside = True
        elif inside and line and not line[0].isspace() and not line.startswith(("-", "#")):
            return
        elif inside:
            yield line
