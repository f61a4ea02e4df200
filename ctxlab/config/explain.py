"""Hydra's and pydantic's errors as one line each: `path.field: expected a number > 0, got 'abc'; did you mean ...`."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ctxlab.config import catalog
from ctxlab.config.overrides import key_of
from ctxlab.errors import CtxlabError
from ctxlab.registry import nearest

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "key: value pairs",
    "model_type": "key: value pairs",
    "model_attributes_type": "key: value pairs",
    "path_type": "a path",
}
_WORDS = ("literal_error", "enum")
_LISTS = {"tuple_type", "list_type"}
_EMPTY = {"too_short": "at least one value", "string_too_short": "text that is not empty"}
_BOUNDS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}
# Commands that take the model from a record, and what they leave as it is there.
_OF_A_RUN = ("eval", "generate", "attention")
_RECORDED = ("model", "position", "tokenizer", "context", "optim", "init")
_CLOSE_ENDING = 0.75  # similarity from which the last part of a key elsewhere is worth a guess


def explain_hydra(error: Exception, command: str, overrides: Sequence[str], folders: Sequence[Path] = ()) -> str:
    """One line for what Hydra, OmegaConf or the YAML reader refused."""
    for link in _chain(error):
        if isinstance(link, CtxlabError):
            return str(link)
    if isinstance(error, MissingConfigException):
        return _missing_option(error, folders)
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: not valid YAML: {error.problem}"
    text = _first_line(str(error))
    if text.startswith("Ambiguous value for argument"):
        key, _, value = text.split("'", 1)[1].rsplit("'", 1)[0].partition("=")
        return f"{key.lstrip('+')}: '{value}' is several values; to sweep over them add -m, for one list write [..]"
    for link in _chain(error):
        if isinstance(link, InterpolationKeyError):
            return f"{link.full_key}: {_first_line(str(link))}"
        if isinstance(link, OmegaConfBaseException) and link.full_key and "is not in struct" in str(link):
            return unknown_key(_as_typed(str(link.full_key), overrides), command, overrides, folders)
    refused = re.search(
        r"Could not delete from config\. '(?P<deleted>.*?)' does not exist"
        r"|Could not (?:override|delete) '(?P<group>.*?)'\. No match in the defaults list",
        text,
    )
    if refused:
        return unknown_key((refused["deleted"] or refused["group"]).split("@")[0], command, overrides, folders)
    return text


def unknown_key(key: str, command: str, overrides: Sequence[str] = (), folders: Sequence[Path] = ()) -> str:
    """The line about a key that the command does not have: nearest by whole name, or the same last part elsewhere."""
    options = catalog.groups(folders)
    groups = {default.group for default in catalog.defaults(command)}
    known = {*catalog.keys(command, folders), *groups}
    top = key.replace("/", ".").split(".")[0]
    if command in _OF_A_RUN and top in _RECORDED:
        return f"{key}: is as in the recorded run; ctxlab {command} --help lists what may differ"
    if key == "run" and command == "train":
        return "run: ctxlab train starts from a run with init=RUN and goes on with one with resume=RUN"
    if "/" in key and key.replace("/", ".") in known:
        return f"{key}: write it as {key.replace('/', '.')}"
    group = key.split(".")[0]
    if key in options and key not in groups:
        return f"{key}: ctxlab {command} has no group '{key}'{nearest(key, groups)}"
    if group in groups and key in known:
        return _of_another_option(key, group, overrides, options)
    same_end = sorted(k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2])
    if same_end:
        return f"{key}: no such key; did you mean '{same_end[0]}'?"
    end = nearest(key, known) if "did you mean" in nearest(key, known) else ""
    if not end:
        ends = {k.rpartition(".")[2]: k for k in known}
        close = difflib.get_close_matches(key.rpartition(".")[2], ends, n=1, cutoff=_CLOSE_ENDING)
        end = f"; did you mean '{ends[close[0]]}'?" if close else f"; see ctxlab {command} --help"
        end += '; a prompt with a = in it is given as prompt="..."' if command == "generate" else ""
    return f"{key}: no such key{end}"


def _as_typed(key: str, overrides: Sequence[str]) -> str:
    """The whole key of the override that Hydra stopped at, of which it names only the first unknown part."""
    return next((key_of(o) for o in overrides if key_of(o).startswith(f"{key}.")), key)


def _of_another_option(key: str, group: str, overrides: Sequence[str], options: dict[str, list[catalog.Option]]) -> str:
    """A key that exists, in an option of the group that is not the chosen one."""
    field = key.removeprefix(f"{group}.")
    owners = [o.name for o in options[group] if any(e.key == field for e in catalog.entries(o.path))]
    chosen = next((o.partition("=")[2] for o in reversed(overrides) if key_of(o) == group), None)
    where = f"{group}={chosen}" if chosen else f"the chosen {group}"
    return f"{key}: {where} has no '{field}'; it belongs to {group}={_either(owners)}"


def _missing_option(error: MissingConfigException, folders: Sequence[Path]) -> str:
    missing = error.missing_cfg_file
    name = missing[0] if isinstance(missing, list | tuple) and missing else str(missing)
    group, _, option = name.partition("/")  # of data/task/mqar the group is data
    options = catalog.groups(folders)
    if group not in options:
        group, _, option = name.rpartition("/")
    known = [o.name for o in options.get(group, [])] or error.options or []
    if not group:
        return f"no config is called '{name}'{nearest(name, known)}"
    if option in known:
        return f"{group}: expected one of its options, got a list"
    return f"{group}: no {group} is called '{option}'{nearest(option, known)}"


def _unreadable(error: OverrideParseException) -> str:
    key, assigned, value = error.override.partition("=")
    if not assigned:
        return f"expected key=value, got '{error.override}'"
    return f"""{key}: Hydra cannot read the value {value}; quote it twice: '{key}="..."'"""


def explain_invalid(error: ValidationError, data: Any, known: dict[str, list[str]] | None = None) -> list[str]:
    """One line per wrong value. `known` names, per dotted path, the fields there, for the nearest name."""
    merged: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        merged.setdefault(_path(detail, data), []).append(detail)
    # Of a union of a word and a structure, the structure's own errors say more than "expected the word".
    deepest = {
        path: details for path, details in merged.items() if not any(p.startswith(f"{path}.") for p in merged if path)
    }
    return [_explain_field(path, details, known or {}) for path, details in deepest.items()]


def _path(detail: ErrorDetails, data: Any) -> str:
    """The dotted path of a value, without the labels that pydantic puts in for the branches of a union."""
    parts: list[str] = []
    node: Any = data
    for part in detail["loc"]:
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
        if inside:
            node = node[part]
        elif detail["type"] != "missing" or part != detail["loc"][-1]:
            continue
        parts.append(str(part))
    return ".".join(parts)


def _explain_field(path: str, details: list[ErrorDetails], known: dict[str, list[str]]) -> str:
    first = details[0]
    parent, _, name = path.rpartition(".")
    if first["type"] == "missing":
        return f"{path}: a value is needed here"
    if first["type"] == "extra_forbidden":
        return f"{path}: no such key{nearest(name, known.get(re.sub(r'[.][0-9]+', '.*', parent), []))}"
    got = first["input"]
    said = [_own_words(d) for d in details if d["type"] in ("value_error", "assertion_error")]
    expected = _either(list(dict.fromkeys(e for d in details for e in _expected(d))))
    if said and isinstance(got, dict):
        return _with_path(path, said[0])
    if said:
        words = said[0] + (f" ({expected} is allowed too)" if expected else "")
        return _with_path(path, words)
    if _LISTS & {detail["type"] for detail in details} and not isinstance(got, bool | dict | None):
        return f"{path}: expected {expected}, got {_shown(got)}; write [{got}]"
    literals = [str(detail["ctx"]["expected"]) for detail in details if detail["type"] in _WORDS]
    choices = [word for literal in literals for word in re.findall(r"'(.*?)'", literal)]
    close = nearest(got, choices) if isinstance(got, str) else ""
    guess = close if "did you mean" in close else ""
    return f"{path}: expected {expected}, got {_shown(got)}{guess}"


def _with_path(path: str, words: str) -> str:
    """A validator's own words, after the path unless they already begin with it or with one of its fields."""
    last = path.rpartition(".")[2]
    if not path or words.startswith(f"{path}"):
        return words
    if words.startswith((f"{last}:", f"{last}.")):
        return f"{path}{words[len(last) :]}"
    if re.match(r"[a-z_][\w.]*: ", words):
        return f"{path}.{words}"
    return f"{path}: {words}"


def _own_words(detail: ErrorDetails) -> str:
    return str(detail.get("ctx", {}).get("error", detail["msg"]))


def _expected(detail: ErrorDetails) -> list[str]:
    """What would have been right, as words to choose from; nothing where a validator has its own words."""
    kind = detail["type"]
    if kind in _BOUNDS:
        sign, name = _BOUNDS[kind]
        return [f"a number {sign} {detail['ctx'][name]:g}"]
    if kind in _EMPTY:
        return [_EMPTY[kind]]
    if kind in _WORDS:
        return re.findall(r"'(.*?)'", str(detail["ctx"]["expected"]))
    if kind in ("value_error", "assertion_error"):
        return []
    return [_KINDS.get(kind, detail["msg"][:1].lower() + detail["msg"][1:])]


def _either(words: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}'"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "unknown"


def _chain(error: BaseException | None) -> list[BaseException]:
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links
