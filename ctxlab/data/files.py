"""Examples out of a person's own files: which files they are, what is wrong with them, what pins their state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ctxlab.data.source import Source
from ctxlab.errors import DataError


class FileSource(Source):
    """A source whose files are named by settings, `data.path` first of them."""

    where_from: ClassVar[str]
    """What `data.path` takes, for people."""
    file_settings: ClassVar[tuple[str, ...]] = ("path",)

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of each setting that names one."""
        paths = {key: getattr(self.config, key) for key in self.file_settings}
        return {key: Path(path).expanduser() for key, path in paths.items() if path != "none"}

    def require_files(self) -> None:
        """Raises DataError where no file is named, or one is not there."""
        if "path" not in self.files:
            raise DataError(f"data.path: it takes {self.where_from}")
        for key, file in self.files.items():
            if not file.is_file():
                raise DataError(f"data.{key}: there is no file {file}; it takes {self.where_from}")

    def facts(self) -> dict[str, Any]:
        """What pins this state of the examples, cheap to find: names, sizes and times of the files, and the settings."""
        return {
            "corpus": self.config.name,
            "settings": self.config.model_dump(mode="json", exclude={"workers"}),
            "files_sha256": files_sha256(self.files.values()),
        }


def files_sha256(files: Iterable[Path], of: str = "") -> str:
    """A hash of the files' names, sizes and times, behind what is read `of` them."""
    digest = hashlib.sha256(of.encode())
    for file in files:
        stat = file.stat()
        digest.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
