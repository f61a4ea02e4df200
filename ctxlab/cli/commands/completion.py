"""`ctxlab completion bash|zsh`: the script that a shell evaluates; `ctxlab _complete ...`: the words it asks for.

The words come from the files and comments of conf/, so an answer takes as long as starting Python.
"""

from __future__ import annotations

import os
from pathlib import Path

from ctxlab.config import catalog
from ctxlab.errors import ConfigError

USAGE = """Shell completion of commands, groups, options, keys and runs.

  eval "$(ctxlab completion bash)"      in ~/.bashrc
  eval "$(ctxlab completion zsh)"       in ~/.zshrc, after compinit"""

# Bash splits words at `=` and `:`; the script joins them again, asks, and gives back what follows the last of them.
_BASH = r"""_ctxlab_complete() {
    local line="${COMP_LINE:0:COMP_POINT}" current answer
    local -a words
    read -r -a words <<< "$line"
    [[ "$line" == *[[:space:]] ]] && words+=("")
    current="${words[${#words[@]}-1]}"
    COMPREPLY=()
    while IFS= read -r answer; do
        [[ -n "$answer" ]] && COMPREPLY+=("$answer")
    done < <("${words[0]}" _complete "${words[@]:1}" 2>/dev/null)
    local kept="${current%"${current##*[=:]}"}" i
    if [[ -n "$kept" && "$COMP_WORDBREAKS" == *=* ]]; then
        for i in "${!COMPREPLY[@]}"; do COMPREPLY[i]="${COMPREPLY[i]#"$kept"}"; done
    fi
    if [[ ${#COMPREPLY[@]} -gt 0 && "${COMPREPLY[0]}" == *[=/.,] ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o default -F _ctxlab_complete ctxlab
"""
_ZSH = r"""_ctxlab_complete() {
    local -a answers
    answers=("${(@f)$("${words[1]}" _complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    answers=("${(@)answers:#}")
    (( ${#answers} )) || { _default; return }
    local -a open closed
    open=("${(@M)answers:#*[=/.,]}")
    closed=("${(@)answers:#*[=/.,]}")
    (( ${#open} )) && compadd -Q -S '' -- "${open[@]}"
    (( ${#closed} )) && compadd -Q -- "${closed[@]}"
}
compdef _ctxlab_complete ctxlab
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH}
_FLAGS = ("--multirun", "--config-dir", "--plugin", "--cfg", "--json", "--help")


def run(argv: list[str]) -> int:
    """Prints a shell's script. Raises ConfigError for another shell."""
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if len(argv) != 1 or argv[0] not in _SCRIPTS:
        raise ConfigError(f"completion: expected bash or zsh, got '{' '.join(argv)}'")
    print(_SCRIPTS[argv[0]], end="")
    return 0


def answer(argv: list[str]) -> int:
    """`ctxlab _complete WORD...`: prints one completion of the last word a line; nothing where there is none."""
    for word in complete(argv or [""]):
        print(word)
    return 0


def complete(words: list[str]) -> list[str]:
    """What the last of `words` (those after `ctxlab`) could become."""
    from ctxlab.cli.main import COMMANDS

    current = words[-1]
    if len(words) == 1:
        names = [command.name for command in COMMANDS] + ["--help", "--version"]
        return [name for name in names if name.startswith(current)]
    command = words[0]
    if command == "list":
        from ctxlab.cli.commands.list import KINDS

        return [kind for kind in KINDS if kind.startswith(current)]
    if command == "completion":
        return [shell for shell in _SCRIPTS if shell.startswith(current)]
    if command == "runs":
        from ctxlab.cli.commands.runs import WORDS

        first = tuple(WORDS) if len(words) == 2 else ("last",)
        found = _run_ids(".trash") if words[1] == "restore" and len(words) > 2 else [*first, *_run_ids()]
        return [word for word in found if word.startswith(current)]
    if command == "sync":
        return [word for word in ("last", *_run_ids()) if word.startswith(current)]
    if command == "report":
        from ctxlab.study.readme import studies

        return [word for word in ("last", *_run_ids(), *studies()) if word.startswith(current)]
    if command == "experiment":
        return [word for word in _of_experiment(words) if word.startswith(current)]
    if not any(c.name == command and c.composed for c in COMMANDS):
        return []
    if current.startswith("-"):
        return [flag for flag in _FLAGS if flag.startswith(current)]
    if "=" in current:
        return _values(command, current, _config_dirs(words))
    return _keys(command, current, _config_dirs(words), first=len(words) == 2)


def _of_experiment(words: list[str]) -> list[str]:
    from ctxlab.cli.commands.experiment import WORDS
    from ctxlab.study.readme import studies

    if len(words) == 2:
        return list(WORDS)
    return list(studies()) if len(words) == 3 and words[1] != "list" else []


def _keys(command: str, current: str, folders: list[Path], *, first: bool) -> list[str]:
    """Groups and keys; deeper keys once their first part is typed, so that the first answer stays short."""
    groups = [f"{default.group}=" for default in catalog.defaults(command)]
    keys = [f"{key}=" for key in catalog.keys(command, folders)]
    runs = [*_run_ids(), "last"] if command in ("eval", "generate", "attention") and first else []
    found = [word for word in (*groups, *keys, *runs) if word.startswith(current)]
    if "." in current:
        return sorted(found)
    shallow = {word if "." not in word else f"{word.split('.', 1)[0]}." for word in found}
    return sorted(shallow)


def _values(command: str, current: str, folders: list[Path]) -> list[str]:
    """Options of a group (also after commas, for a sweep), runs for a selector, the words a value's comment offers."""
    key, _, value = current.partition("=")
    done, comma, start = value.rpartition(",")
    prefix = f"{key}={done}{comma}"
    choices: list[str] = []
    if key in {default.group for default in catalog.defaults(command)}:
        choices = [option.name for option in catalog.groups(folders).get(key, [])]
    elif key in ("run", "init", "resume") and key in catalog.keys(command):
        choices = [*_run_ids(), "last"]
    else:
        choices = sorted(_words_of(command, key, folders))
    return [f"{prefix}{choice}" for choice in choices if choice.startswith(start)]


def _words_of(command: str, key: str, folders: list[Path]) -> set[str]:
    """The words that a value may be, as far as its YAML says."""
    group, _, rest = key.partition(".")
    files = [(catalog.conf_dir() / f"{command}.yaml", key)]
    files += [(option.path, rest) for option in catalog.groups(folders).get(group, [])]
    return {
        word for path, name in files for entry in catalog.entries(path) if entry.key == name for word in entry.choices
    }


def _run_ids(below: str = "") -> list[str]:
    root = Path(os.environ.get("CTXLAB_RUNS") or "runs").expanduser() / below
    return sorted(path.parent.name for path in root.glob("*/run.json"))


def _config_dirs(words: list[str]) -> list[Path]:
    from ctxlab.cli.help import config_dirs

    return config_dirs(words)
