"""What help, list and completion know: held against Hydra's and YAML's own reading of the same files."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctxlab.config import catalog

COMMANDS = ("train", "eval", "generate", "profile", "plan", "show")


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {path: node}
    return {k: v for key, value in node.items() for k, v in leaves(value, f"{path}.{key}" if path else key).items()}


@pytest.mark.parametrize(
    "path", sorted(catalog.conf_dir().glob("**/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_entries_are_what_yaml_reads(path: Path) -> None:
    parsed = yaml.safe_load(path.read_text()) or {}
    wanted = leaves({k: v for k, v in parsed.items() if k not in ("defaults", "hydra")}) if parsed else {}
    wanted.pop("", None)
    found = {entry.key: yaml.safe_load(entry.value) for entry in catalog.entries(path) if entry.value}
    assert found == wanted


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_what_yaml_reads(command: str) -> None:
    parsed = yaml.safe_load((catalog.conf_dir() / f"{command}.yaml").read_text())
    wanted = [next(iter(d.items())) for d in parsed.get("defaults", []) if isinstance(d, dict)]
    found = [(d.group, yaml.safe_load(d.option)) for d in catalog.defaults(command)]
    assert found == wanted


@pytest.mark.parametrize(
    "path", sorted(catalog.conf_dir().glob("**/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_yaml_begins_with_what_it_is(path: Path) -> None:
    assert len(catalog.summary(path)) > 10


def test_values_are_commented() -> None:
    bare = [
        f"{command}: {entry.key}"
        for command in COMMANDS
        for entry in catalog.entries(catalog.conf_dir() / f"{command}.yaml")
        if entry.value and not entry.comment
    ]
    assert bare == []


def test_choices_are_read_from_values_and_comments() -> None:
    assert catalog.Entry("a", "true", "").choices == ["true", "false"]
    assert catalog.Entry("a", "auto", "auto | fp32 | bf16: auto is what fits").choices == ["auto", "fp32", "bf16"]
    assert catalog.Entry("a", "3", "a number").choices == []


def test_the_packaged_conf_is_used_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel has ctxlab/conf and no pyproject.toml beside the package; a stale copy beside a checkout is not read."""
    package = tmp_path / "site-packages" / "ctxlab"
    (package / "config").mkdir(parents=True)
    (package / "conf").mkdir()
    monkeypatch.setattr(catalog, "__file__", str(package / "config" / "catalog.py"))
    assert catalog.conf_dir() == package / "conf"
    (tmp_path / "site-packages" / "pyproject.toml").touch()
    (tmp_path / "site-packages" / "conf").mkdir()
    (tmp_path / "site-packages" / "conf" / "train.yaml").touch()
    assert catalog.conf_dir() == tmp_path / "site-packages" / "conf"


def test_user_folders_add_options(tmp_path: Path) -> None:
    (tmp_path / "position").mkdir()
    (tmp_path / "position" / "mine.yaml").write_text("# My own scheme\nname: mine\nslope: 2.0  # of the bias\n")
    options = {option.name: option.summary for option in catalog.groups([tmp_path])["position"]}
    assert options["mine"] == "My own scheme"
    assert "rope" in options
    assert "position.slope" in catalog.keys("train", [tmp_path])


def test_catalog_imports_nothing_heavy() -> None:
    """Help and completion stand on it: the standard library only."""
    tree = ast.parse(Path(catalog.__file__).read_text())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"__future__", "re", "collections", "dataclasses", "pathlib"}
