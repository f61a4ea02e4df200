"""Names to classes: one registry a kind of component, filled by importing every module of one subpackage.

A component is one class in one file that owns a frozen `Config`. Adding a component is adding a file.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from ctxlab.errors import ConfigError

T = TypeVar("T")


class ComponentConfig(BaseModel):
    """Base of every component's settings: frozen, strict types, unknown keys refused. `name` picks the component."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of an error message about a wrong name: `; did you mean 'rope'?` or the list of what there is."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; available: {', '.join(known)}" if known else ""


def import_file(name: str, path: Path) -> ModuleType:
    """Imports a file as the module `name`, which registers its components. Raises ImportError for no Python file."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class Registry(Generic[T]):
    """name -> class for one kind of component (`position`, `attention`, `corpus`, ...).

    Each of `packages` is imported module by module on first use, so a new file registers itself. A plugin registers the
    same way by being imported. Registering a name twice is a programming error and raises at once.
    """

    def __init__(self, kind: str, *packages: str) -> None:
        self.kind = kind
        self.packages = packages
        self._classes: dict[str, type[T]] = {}
        self._discovered = False
        self._discovering = threading.RLock()

    def register(self, name: str) -> Callable[[type[Any]], type[Any]]:
        def decorate(cls: type[Any]) -> type[Any]:
            if name in self._classes and self._classes[name].__qualname__ != cls.__qualname__:
                raise ValueError(f"{self.kind} '{name}' is registered twice: {self._classes[name]} and {cls}")
            self._classes[name] = cls
            return cls

        return decorate

    def names(self) -> list[str]:
        self._discover()
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        self._discover()
        if name not in self._classes:
            raise ConfigError(f"{self.kind}: no {self.kind} is called '{name}'{nearest(name, self._classes)}")
        return self._classes[name]

    def config(self, settings: dict[str, Any]) -> Any:
        """The typed settings of a component out of recorded ones (`{"name": "rope", "theta": 10000.0}`)."""
        return self.get(settings["name"]).Config.model_validate_json(json.dumps(settings))  # type: ignore[attr-defined]

    def _discover(self) -> None:
        with self._discovering:  # another thread waits until all are there; this one may come by again meanwhile
            if self._discovered:
                return
            self._discovered = True
            for name in self.packages:
                package = importlib.import_module(name)
                for module in pkgutil.iter_modules(package.__path__, prefix=f"{name}."):
                    importlib.import_module(module.name)
