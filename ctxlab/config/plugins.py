"""Somebody's own components: a Python file named on the line, imported once, its hash kept in the record."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from pydantic_core import PydanticUndefined, to_jsonable_python

from ctxlab.config import catalog
from ctxlab.errors import ConfigError
from ctxlab.registry import import_file


@dataclass(frozen=True)
class Plugin:
    """A file given with --plugin, and what its bytes were when it was imported."""

    path: Path
    sha256: str


def load(path: Path, expected: str = "") -> Plugin:
    """Imports a plugin, which registers its components.

    `expected` is the hash a parent process recorded; a file that has changed since is refused.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--plugin: {path} cannot be read: {error.strerror}") from error
    sha256 = hashlib.sha256(source).hexdigest()
    if expected and sha256 != expected:
        raise ConfigError(f"--plugin: {path} has changed since the run was written down")
    name = f"ctxlab_plugin_{sha256[:16]}"
    if name not in sys.modules:
        try:
            import_file(name, path)
        except (Exception, SystemExit) as error:  # a script that ends itself is no plugin, and must not end us
            raise ConfigError(f"--plugin: {path}: {type(error).__name__}: {error}") from error
    return Plugin(path, sha256)


def write_options(folder: Path, user_folders: Sequence[Path]) -> None:
    """A group option for every registered component that has no YAML: its name and its Config's defaults."""
    from ctxlab.config.schema import REGISTRIES

    options = catalog.groups(user_folders)
    for group, registry in REGISTRIES.items():
        written = {option.name for option in options.get(group, [])}
        for name in registry.names():
            if name not in written:
                fields = registry.get(name).Config.model_fields
                plain = {
                    key: "???" if field.get_default(call_default_factory=True) is PydanticUndefined
                    else to_jsonable_python(field.get_default(call_default_factory=True))
                    for key, field in fields.items()
                }  # fmt: skip
                write_option(folder, group, name, plain | {"name": name})


def write_option(folder: Path, group: str, name: str, values: dict[str, object]) -> None:
    """One generated group option. Values are literal: nothing in them is interpolated."""
    path = folder / group / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(_literal(values), allow_unicode=True, sort_keys=False), encoding="utf-8")


def _literal(value: object) -> object:
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, dict):
        return {key: _literal(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_literal(entry) for entry in value]
    return value
