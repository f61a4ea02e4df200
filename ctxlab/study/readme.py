"""A study: a folder with a README.md (its question, the lines under *Run*, its findings) and its results/.

The lines come from whoever wrote the README, so they are read as data: a line is `ctxlab ...`, or `python` on a script of
the study's own folder, its words are handed over as they are, and there is no shell that could make more of them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ctxlab.config import catalog
from ctxlab.config.overrides import SELECTOR_KEYS, key_of, split, split_selector
from ctxlab.errors import ConfigError
from ctxlab.registry import nearest

FOLDER = "experiments"  # of studies: where the user stands, in the repository, and inside the wheel
README = "README.md"

# Commands that are no part of a study: it would start itself; it makes records and does not take them away; it would not end.
_NO_LINE = ("experiment", "runs", "dashboard")
# Overrides that say how a line is run, not what it computes: with others, it is the same line.
_HOW = ("sweep.", "logger.")
_FOR_A_SHELL = ";&|<>()`$!*?{}"
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*")
_TAKES = re.compile(r"^Takes\s+(.+?)(?=\s*\(|[.;:](?:\s|$)|$)", re.MULTILINE)


@dataclass(frozen=True)
class Line:
    """One line of a study. `text` is what it is known by; `how` are overrides that its runs do not depend on."""

    text: str
    program: str  # ctxlab | python
    words: tuple[str, ...]  # after the program
    how: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """Of `ctxlab ...`: which of its commands. Else nothing."""
        return self.words[0] if self.program == "ctxlab" else ""

    @property
    def output(self) -> str:
        """The file that holds what a script printed: named after the script and its words."""
        name = "-".join([Path(self.words[0]).stem, *self.words[1:]])
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name) + ".txt"


@dataclass(frozen=True)
class Block:
    """Lines of Markdown under one heading, with the number of the first."""

    heading: str
    first: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """The folder of one study, and what its README says."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def readme(self) -> Path:
        return self.folder / README

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The README by its headings: the title first, then each section. Raises ConfigError where it is no text."""
        try:
            text = self.readme.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.readme}: {getattr(error, 'strerror', None) or error}") from error
        return tuple(_sections(text))

    def section(self, heading: str) -> Block | None:
        """The section of a heading, whatever its case."""
        return next((block for block in self.blocks if block.heading.lower() == heading.lower()), None)

    @property
    def question(self) -> str:
        """The README's title."""
        return self.blocks[0].heading if self.blocks else ""

    @property
    def takes(self) -> str:
        """How long the lines take, where a sentence under *Run* begins with `Takes`."""
        run = self.section("Run")
        found = _TAKES.search("\n".join(run.lines)) if run else None
        return found[1] if found else ""

    def lines(self, commands: Collection[str]) -> list[Line]:
        """The lines under *Run*, of ctxlab's `commands` and the folder's scripts.

        Raises ConfigError with a line for each that is something else: nothing of such a study is run.
        """
        found: list[Line] = []
        wrong: list[str] = []
        for number, text in self._commands():
            try:
                line = self._line(text, commands)
                if line.text in [other.text for other in found]:
                    raise ConfigError("stands there twice; a repetition is another seed")
                found.append(line)
            except ConfigError as error:
                wrong.append(f"{self.readme}:{number}: {error}")
        if wrong:
            raise ConfigError("\n".join(wrong))
        return found

    def located(self, word: str) -> str:
        """A word with the study's own files where they really are: a README says `experiments/NAME/FILE`."""
        key, assigned, value = word.partition("=")
        start = f"{FOLDER}/{self.name}/"
        if value.startswith(start):
            return f"{key}{assigned}{self.folder / value.removeprefix(start)}"
        return str(self.folder / word.removeprefix(start)) if word.startswith(start) else word

    def _commands(self) -> Iterator[tuple[int, str]]:
        """(number, text) of each line of the first fenced block under *Run*; a backslash at an end joins two."""
        run = self.section("Run")
        fences = [n for n, line in enumerate(run.lines) if line.startswith("```")] if run else []
        if run is None or len(fences) < 2:
            raise ConfigError(f"{self.readme}: has no fenced block under '## Run'")
        started, text = 0, ""
        for n in range(fences[0] + 1, fences[1]):
            started = started or run.first + n
            text += run.lines[n].strip()
            if text.endswith("\\"):
                text = text[:-1].rstrip() + " "
                continue
            if text and not text.startswith("#"):
                yield started, text
            started, text = 0, ""
        if text.strip():
            yield started, text

    def _line(self, text: str, commands: Collection[str]) -> Line:
        words = _plain_words(text)
        program = words[0] if words else ""
        if program == "ctxlab" and len(words) > 1:
            self._check_command(words[1:], commands)
        elif program == "python" and len(words) > 1:
            self._own_file("python", words[1])
        else:
            raise ConfigError(f"expected `ctxlab ...` or `python {FOLDER}/{self.name}/FILE.py ...`, got '{text}'")
        return Line(shlex.join(words), program, tuple(words[1:]))

    def _check_command(self, words: Sequence[str], commands: Collection[str]) -> None:
        name = words[0]
        allowed = [command for command in commands if command not in _NO_LINE]
        if name not in allowed:
            raise ConfigError(f"ctxlab {name} is no command for a study{nearest(name, allowed)}")
        for index, word in enumerate(words):
            flag, assigned, value = word.partition("=")
            if flag == "--plugin":
                self._own_file("--plugin", value if assigned else "".join(words[index + 1 : index + 2]))
            if flag == "paths.runs":
                raise ConfigError("paths.runs: is for whoever runs the study (ctxlab experiment run NAME --runs DIR)")

    def _own_file(self, what: str, path: str) -> None:
        """Refuses a program that is no file of the study's folder."""
        start = f"{FOLDER}/{self.name}/"
        inside = (self.folder / path.removeprefix(start)).resolve()
        if not path.startswith(start) or not inside.is_relative_to(self.folder.resolve()) or inside.suffix != ".py":
            raise ConfigError(f"{what}: expected a script of the study, {start}FILE.py, got '{path}'")
        if not inside.is_file():
            raise ConfigError(f"{what}: there is no file {inside}")


def folders() -> list[Path]:
    """Where studies are: under experiments/ where the user stands, and the shipped ones."""
    shipped = catalog.conf_dir().parent / FOLDER
    here = Path(FOLDER)
    return [here, shipped] if here.resolve() != shipped.resolve() else [shipped]


def studies() -> dict[str, Study]:
    """Every study by its name; one of the user's own wins over a shipped one of its name."""
    found: dict[str, Study] = {}
    for folder in reversed(folders()):
        for readme in sorted(folder.glob(f"*/{README}")):
            found[readme.parent.name] = Study(readme.parent)
    return dict(sorted(found.items()))


def find(name: str) -> Study:
    """Raises ConfigError naming the nearest where there is none of that name."""
    known = studies()
    if name not in known:
        raise ConfigError(f"experiment: there is no study '{name}'{nearest(name, known)}")
    return known[name]


def with_overrides(lines: Sequence[Line], overrides: Sequence[str]) -> list[Line]:
    """The lines with further overrides, each on the lines of commands that know its key.

    Raises ConfigError for what is no `key=value` and for a key that no line knows.
    """
    changed = list(lines)
    known = {line.command: _keys(line.command) for line in lines if line.command}
    for override in overrides:
        key, assigned, _ = override.partition("=")
        if not assigned or key.startswith("-"):
            raise ConfigError(f"experiment: expected key=value, got '{override}'")
        if key.startswith("paths."):
            raise ConfigError(f"{key}: of a whole study: --runs DIR (CTXLAB_RUNS), CTXLAB_CACHE")
        if not any(key_of(key) in keys for keys in known.values()):
            raise ConfigError(f"{key}: no line of the study has it{nearest(key, set().union(*known.values()))}")
        changed = [_with(line, override) if key_of(key) in known.get(line.command, ()) else line for line in changed]
    return changed


def changes_what_is_computed(override: str) -> bool:
    """Whether an override makes another study of it, rather than the same one run in another way."""
    return not key_of(override).startswith(_HOW)


def _with(line: Line, override: str) -> Line:
    if not changes_what_is_computed(override):
        return replace(line, how=(*line.how, override))
    key = key_of(override)
    words = [word for word in line.words if "=" not in word or key_of(word) != key]
    return replace(line, text=shlex.join([line.program, *words, override]), words=(*words, override))


def _keys(command: str) -> set[str]:
    try:
        return {*catalog.keys(command), *(default.group for default in catalog.defaults(command))}
    except OSError:  # a command of flags
        return set()


def selected(line: Line) -> dict[str, tuple[str, ...]]:
    """The runs that a line asks for, as it writes them: key -> ids, prefixes, `last`."""
    if not _keys(line.command):
        return {}
    said = split(line.command, line.words[1:])
    swept = {key_of(o): split_selector(o.partition("=")[2]) for o in said.overrides if key_of(o) in SELECTOR_KEYS}  # -m
    return {key: names for key, names in {**said.selectors, **swept}.items() if names != ("none",)}


def asks_for_several(line: Line, key: str) -> bool:
    """Whether a selector stands in brackets, where a prefix is of every run that it begins."""
    return any(word.removeprefix(f"{key}=").startswith("[") for word in line.words)


def with_runs(line: Line, chosen: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """A line's words with its selectors written out as ids."""
    asked = selected(line)
    words = list(line.words)
    for key, ids in chosen.items():
        written = [n for n, word in enumerate(words) if word.startswith(f"{key}=")]
        bare = [n for n, word in enumerate(words) if n and split_selector(word) == asked[key]]
        words[(written or bare)[0]] = f"{key}={ids[0] if len(ids) == 1 else '[' + ','.join(ids) + ']'}"
    return tuple(words)


def _sections(text: str) -> Iterator[Block]:
    heading, first, lines, fenced = "", 1, list[str](), False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            fenced = not fenced
        match = None if fenced else _HEADING.fullmatch(line)
        if match is None or len(match[1]) > 2:
            lines.append(line)
            continue
        if heading or any(each.strip() for each in lines):
            yield Block(heading, first, tuple(lines))
        heading, first, lines = match[2], number + 1, []
    yield Block(heading, first, tuple(lines))


def _plain_words(text: str) -> list[str]:
    """A line's words. Raises ConfigError for what only a shell would understand, unless it is quoted."""
    quote, escaped, before = "", False, " "
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\" and quote != "'":
            escaped = True
        elif quote:
            if character == quote:
                quote = ""
            elif quote == '"' and character in "`$":
                raise ConfigError(_no_shell(character))
        elif character in "'\"":
            quote = character
        elif character == "#" and before.isspace():
            break
        elif character in _FOR_A_SHELL:
            raise ConfigError(_no_shell(character))
        before = character
    try:
        return shlex.split(text, comments=True)
    except ValueError as error:
        raise ConfigError(f"{error} in '{text}'") from error


def _no_shell(character: str) -> str:
    return f"'{character}' is for a shell, and a study has none; in a value, put it in single quotes"
