"""Text to tokens in the cache: what is on disk is what was said, made once, and never taken for whole when it is not."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxlab.cache import default_cache
from ctxlab.data import prepare as module
from ctxlab.data.corpora.text import Text
from ctxlab.data.prepare import TextDataset, prepare
from ctxlab.data.splits import SPLITS
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.bpe import BPE
from ctxlab.data.tokenizers.byte import Byte
from ctxlab.data.tokenizers.pieces import MODEL
from ctxlab.data.tokenizers.unigram import Unigram
from ctxlab.errors import DataError
from tests.data.builders import naive_labels, prose, trained

TEXTS = [prose(seed, 20) for seed in range(40)] + ["a\r\n\u2581\t中文😀 no newline", "", prose(0, 20)]


def write(folder: Path, texts: list[str]) -> Text.Config:
    """A corpus of one .txt file a text, in their order."""
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    return Text.Config(path=str(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def made_in(cache: Path) -> list[Path]:
    """What is in the folder of tokens, hidden leftovers too."""
    found = (cache / "tokens").iterdir() if (cache / "tokens").exists() else ()
    return sorted(path for path in found if not path.name.endswith(".lock"))


def must_not_run(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was made before")


def documents_of(dataset: TextDataset, name: str) -> list[list[int]]:
    split = dataset.splits[name]
    return [split.document(index).tolist() for index in range(split.n_documents)]


@pytest.mark.parametrize("config", [Unigram.Config(vocab_size=400), BPE.Config(vocab_size=400), Byte.Config()])
def test_tokens_and_facts_are_those_of_the_text(tmp_path: Path, config: Tokenizer.Config) -> None:
    data = write(tmp_path / "text", TEXTS)
    dataset = prepare(data, config, cache=tmp_path / "cache")
    tokenizer, sides = dataset.tokenizer, naive_labels(TEXTS)
    for name in SPLITS:
        mine = [text for text, side in zip(TEXTS, sides) if side == name]
        expected = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in mine]
        assert documents_of(dataset, name) == expected
        assert dataset.facts["splits"][name] == {
            "documents": len(mine),
            "tokens": sum(map(len, expected)),
            "bytes": sum(len(text.encode()) for text in mine),
        }
        named = [str(tmp_path / "text" / f"{number:03}.txt") for number, side in enumerate(sides) if side == name]
        assert list(dataset.splits[name].names) == ([] if name == "train" else named)
    digests = sorted(hashlib.sha256(text.encode()).digest()[:16] for text in TEXTS)
    assert dataset.facts["text_sha256"] == hashlib.sha256(b"".join(digests)).hexdigest()
    model = b"" if config.name == "byte" else MODEL.encode() + b"\0" + tokenizer.files()[MODEL]
    assert dataset.facts["tokenizer"] == {
        "name": config.name,
        "vocab_size": tokenizer.vocab_size,
        "sha256": hashlib.sha256(config.name.encode() + model).hexdigest(),
    }
    assert dataset.facts["cut"] is None
    assert (dataset.facts["corpus"], dataset.facts["n_files"]) == ("text", len(TEXTS))


def test_the_parts_of_a_small_corpus_are_its_documents_and_the_facts_say_so(tmp_path: Path) -> None:
    text = prose(1, 1500)
    dataset = prepare(write(tmp_path / "text", [text]), Byte.Config(), cache=tmp_path / "cache")
    assert dataset.facts["cut"] == {"n_bytes": len(text) // 48, "ends": "blank lines"}
    parts = [dataset.tokenizer.decode(ids) for name in SPLITS for ids in documents_of(dataset, name)]
    assert sum(map(len, parts)) == len(text)
    assert all(part in text for part in parts)
    assert len(dataset.splits["test"].names) >= 8
    assert all(name.startswith(f"{tmp_path}/text/000.txt#") for name in dataset.splits["test"].names)
    assert "".join(sorted(parts, key=text.index)) == text


def test_what_is_in_the_cache_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = write(tmp_path / "text", TEXTS), tmp_path / "cache"
    first = prepare(data, Unigram.Config(vocab_size=400), cache=cache)
    before = contents(cache)
    monkeypatch.setattr(module, "split", must_not_run)
    other = prepare(data, Byte.Config(), cache=cache)  # another tokenizer has the same splits without another reading
    assert other.facts["text_sha256"] == first.facts["text_sha256"]
    monkeypatch.setattr(module, "_make", must_not_run)
    again = prepare(data, Unigram.Config(vocab_size=400), cache=cache)
    assert again.facts == first.facts
    assert again.tokenizer.sha256 == first.tokenizer.sha256
    assert [documents_of(again, name) for name in SPLITS] == [documents_of(first, name) for name in SPLITS]
    after = contents(cache)
    assert {name: after[name] for name in before} == before


def test_a_changed_file_is_another_text(tmp_path: Path) -> None:
    data, cache = write(tmp_path / "text", TEXTS), tmp_path / "cache"
    first = prepare(data, Byte.Config(), cache=cache)
    file = tmp_path / "text" / "007.txt"
    changed = TEXTS[7].replace(".", "!")
    assert len(changed) == len(TEXTS[7])  # the time alone tells it
    file.write_text(changed)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    second = prepare(data, Byte.Config(), cache=cache)
    assert len(made_in(cache)) == 2
    assert second.facts["text_sha256"] != first.facts["text_sha256"]
    written = {second.tokenizer.decode(ids) for name in SPLITS for ids in documents_of(second, name)}
    assert written == {*TEXTS[:7], changed, *TEXTS[8:]} - {""}


def test_a_tokenizer_that_is_given_is_used(tmp_path: Path) -> None:
    data, cache = write(tmp_path / "text", TEXTS), tmp_path / "cache"
    given = trained("unigram")  # of another text
    dataset = prepare(data, given, cache=cache)
    own = prepare(data, given.config, cache=cache)
    assert dataset.tokenizer.sha256 == dataset.facts["tokenizer"]["sha256"] == given.sha256 != own.tokenizer.sha256
    assert documents_of(dataset, "test")[0][1:-1] == given.encode(given.decode(documents_of(dataset, "test")[0]))


def test_only_the_train_split_teaches_the_tokenizer(tmp_path: Path) -> None:
    """A document is replaced by one with a letter of its own, on the same side: only a train one changes the tokenizer."""
    texts = [prose(seed, 12) for seed in range(40)]
    sides = naive_labels(texts)
    models = {}
    for side in ("nothing", *SPLITS):
        changed = list(texts)
        if side != "nothing":
            place = sides.index(side)
            for number in itertools.count():
                changed[place] = f"龍{number} " * 40
                if naive_labels(changed) == sides:
                    break
        data = write(tmp_path / side, changed)
        dataset = prepare(data, Unigram.Config(vocab_size=400), cache=tmp_path / "cache")
        models[side] = dataset.tokenizer.files()[MODEL]
        assert (len(dataset.tokenizer.encode("龍")) == 1) == (side == "train")
    assert models["nothing"] == models["validation"] == models["test"]
    assert models["nothing"] != models["train"]


def test_a_tokenizer_learns_from_no_more_than_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{number:03}\n" * 100 for number in range(100)]
    n_bytes = sum(400 for side in naive_labels(texts) if side == "train")
    monkeypatch.setattr(module, "_SAMPLE", 1000)
    learned: list[str] = []
    made = trained("bpe")
    monkeypatch.setattr(BPE, "make", classmethod(lambda cls, config, sample: learned.extend(sample) or made))
    prepare(write(tmp_path / "text", texts), BPE.Config(vocab_size=400), cache=tmp_path / "cache")
    every = -(-n_bytes // 1000)
    lines = [
        line for text, side in zip(texts, naive_labels(texts)) if side == "train" for line in text.splitlines(True)
    ]
    assert learned == lines[::every]
    assert 900 < sum(map(len, learned)) <= 1000


def reference(tmp_path: Path, data: Text.Config) -> dict[str, bytes]:
    """The files of a dataset that nothing disturbed."""
    prepare(data, Byte.Config(), cache=tmp_path / "undisturbed")
    (folder,) = made_in(tmp_path / "undisturbed")
    return contents(folder)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_work_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    data, cache = write(tmp_path / "text", TEXTS), tmp_path / "cache"
    expected = reference(tmp_path, data)
    original = module.write_tokens

    def failing(*words: Any, **options: Any) -> None:
        original(*words, **options)
        raise error("the disk is full")

    monkeypatch.setattr(module, "write_tokens", failing)
    with pytest.raises(error, match="the disk is full"):
        prepare(data, Byte.Config(), cache=cache)
    assert made_in(cache) == []
    monkeypatch.setattr(module, "write_tokens", original)
    prepare(data, Byte.Config(), cache=cache)
    (folder,) = made_in(cache)
    assert contents(folder) == expected


def die_writing(data: Text.Config, cache: Path) -> None:
    """Ends the process as a kill would, with all tokens written and no facts."""
    original = module.write_tokens

    def killed(*words: Any, **options: Any) -> None:
        original(*words, **options)
        os._exit(7)

    module.write_tokens = killed
    prepare(data, Byte.Config(), cache=cache)


def test_what_a_killed_process_leaves_is_not_taken_for_whole(tmp_path: Path) -> None:
    data, cache = write(tmp_path / "text", TEXTS), tmp_path / "cache"
    expected = reference(tmp_path, data)
    process = get_context("spawn").Process(target=die_writing, args=(data, cache))
    process.start()
    process.join()
    assert process.exitcode == 7
    (left,) = made_in(cache)
    prepare(data, Byte.Config(), cache=cache)
    (folder,) = set(made_in(cache)) - {left}
    assert contents(folder) == expected


def test_a_folder_without_facts_is_made_again(tmp_path: Path) -> None:
    data, cache = write(tmp_path / "text", TEXTS), tmp_path / "cache"
    expected = reference(tmp_path, data)
    prepare(data, Byte.Config(), cache=cache)
    (folder,) = made_in(cache)
    (folder / "facts.json").unlink()
    (folder / "train.bin").write_bytes(b"\1\0")
    prepare(data, Byte.Config(), cache=cache)
    assert contents(folder) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.bin", b"\1\0"),
        ("train.bin", b"\1"),
        ("train.bin", None),
        ("test.starts.npy", b""),
        ("test.starts.npy", b"\x93NUMPY"),
        ("validation.names.json", b"["),
        ("validation.names.json", None),
        ("facts.json", b'{"half'),
    ],
)
def test_a_damaged_cache_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes | None) -> None:
    data, cache = write(tmp_path / "text", TEXTS), tmp_path / "cache"
    prepare(data, Byte.Config(), cache=cache)
    (folder,) = made_in(cache)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^paths\.cache: {folder} is damaged \([^\n]+\); remove it and run again$"):
        prepare(data, Byte.Config(), cache=cache)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no archive"])
def test_damaged_splits_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    data, cache = write(tmp_path / "text", TEXTS), tmp_path / "cache"
    prepare(data, Byte.Config(), cache=cache)
    (file,) = (cache / "splits").glob("*.npz")
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"^paths\.cache: {file} is damaged \([^\n]+\); remove it and run again$"):
        prepare(data, Unigram.Config(vocab_size=400), cache=cache)


def prepare_at_once(data: Text.Config, cache: Path, barrier: Any, counts: Path) -> None:
    """Prepares when all are there, slowly, and writes down that it made something."""
    original = module.write_tokens

    def slow(*words: Any, **options: Any) -> None:
        with counts.open("a") as file:
            file.write("made\n")
        time.sleep(0.3)
        original(*words, **options)

    module.write_tokens = slow
    barrier.wait()
    dataset = prepare(data, Byte.Config(), cache=cache)
    assert len(documents_of(dataset, "test")) == 8


def test_two_processes_at_once_make_it_once(tmp_path: Path) -> None:
    data, cache, counts = write(tmp_path / "text", TEXTS), tmp_path / "cache", tmp_path / "counts"
    context = get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=prepare_at_once, args=(data, cache, barrier, counts)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert counts.read_text() == "made\n"
    (folder,) = made_in(cache)
    assert contents(folder) == reference(tmp_path, data)


def test_progress_goes_as_far_as_the_bytes_of_the_text(tmp_path: Path) -> None:
    data = write(tmp_path / "text", TEXTS)
    seen: dict[str, list[int]] = {}

    def progress(text: str, total: int) -> Callable[[int], None]:
        seen[text] = [total]
        return seen[text].append

    prepare(data, BPE.Config(vocab_size=400), cache=tmp_path / "cache", progress=progress)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert list(seen) == ["reading the corpus", "training the tokenizer (bpe)", "turning text into tokens"]
    assert seen["turning text into tokens"][0] == sum(seen["turning text into tokens"][1:]) == n_bytes
    assert sum(seen["reading the corpus"][1:]) == n_bytes
    assert seen["training the tokenizer (bpe)"] == [1, 1]


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CTXLAB_CACHE", "~/somewhere")
    assert default_cache() == tmp_path / "somewhere"
    prepare(write(tmp_path / "text", TEXTS), Byte.Config())
    (folder,) = made_in(tmp_path / "somewhere")
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["splits"]["train"]["documents"] == np.load(folder / "train.starts.npy").size - 1
