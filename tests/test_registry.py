"""The registry: names found by importing a subpackage, once, whoever asks and from how many threads."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ctxlab.errors import ConfigError
from ctxlab.registry import ComponentConfig, Registry, import_file

SLOW = """
import time
from {package}.base import THINGS

time.sleep(0.05)


@THINGS.register("{name}")
class {name}:
    pass
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of a registry and four modules that take their time."""
    name = f"things_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "base.py").write_text(
        f"from ctxlab.registry import Registry\nTHINGS = Registry('thing', '{name}')\n", encoding="utf-8"
    )
    for thing in ("a", "b", "c", "d"):
        (folder / f"{thing}.py").write_text(SLOW.format(package=name, name=thing), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_threads_that_ask_at_once_all_find_everything(package: str) -> None:
    things: Registry[object] = __import__(f"{package}.base", fromlist=["THINGS"]).THINGS
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: things.names(), range(8)))
    assert found == [["a", "b", "c", "d"]] * 8


def test_a_wrong_name_is_told_the_nearest() -> None:
    things: Registry[object] = Registry("thing", "ctxlab.records")
    things.register("walnut")(object)
    with pytest.raises(ConfigError, match=r"thing: no thing is called 'walnot'; did you mean 'walnut'\?"):
        things.get("walnot")


def test_a_name_belongs_to_one_class() -> None:
    things: Registry[object] = Registry("thing", "ctxlab.records")
    things.register("one")(ComponentConfig)
    with pytest.raises(ValueError, match="thing 'one' is registered twice"):
        things.register("one")(Registry)


def test_a_file_that_fails_to_import_leaves_no_module(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("x = 1 / 0\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        import_file("bad_module_of_a_test", tmp_path / "bad.py")
    assert "bad_module_of_a_test" not in sys.modules
    (tmp_path / "good.py").write_text("x = 42\n", encoding="utf-8")
    assert import_file("good_module_of_a_test", tmp_path / "good.py").x == 42
    assert sys.modules.pop("good_module_of_a_test").x == 42
