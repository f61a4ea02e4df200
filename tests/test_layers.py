"""Imports point only up the list of layers; what prints and reports never imports torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ctxlab

PACKAGE = Path(ctxlab.__file__).parent
# Each layer may import itself and the ones before it.
LAYERS = (
    "errors", "registry", "units", "fields", "cores", "cache", "records", "data", "model", "train", "evaluation", "profiling",
    "interop", "config", "report", "launch", "study", "cli",
)  # fmt: skip
WITHOUT_TORCH = ("errors", "registry", "units", "fields", "cores", "cache", "records", "report", "launch", "study")
HEAVY = {"torch", "lightning", "transformers"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when this one is): type-checking imports are left out, lazy ones are not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lazy.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            lazy.difference_update(ast.walk(node))
            for inner in ast.walk(node):
                inner.skipped = True  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if getattr(node, "skipped", False):
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in lazy
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", node not in lazy


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_up(path: Path) -> None:
    layer = layer_of(path)
    if layer in ("__init__", "__main__", "conf", "experiments"):
        return
    assert layer in LAYERS, f"{path} belongs to no layer"
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "ctxlab" and len(parts) > 1:
            assert LAYERS.index(parts[1]) <= LAYERS.index(layer), f"{path} imports {name}"


@pytest.mark.parametrize(
    "path", [p for p in modules() if layer_of(p) in WITHOUT_TORCH], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_records_and_reports_import_no_torch(path: Path) -> None:
    assert not [name for name, _ in imports(path) if name.split(".")[0] in HEAVY]


def test_importing_the_package_is_light() -> None:
    watched = HEAVY | {"pydantic", "hydra", "rich", "wandb", "numpy"}
    code = f"import ctxlab, ctxlab.cli.main, sys; print({watched!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
