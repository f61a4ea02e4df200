"""A corpus and a tokenizer to tokens on disk: made once, found again by what they are made of.

In the cache folder: corpora/ (what was fetched), splits/KEY.npz (which document goes where), tokenizers/KEY/ (trained ones),
tokens/KEY/ (ids, and the tokenizer that made them). A key is a hash of the corpus' facts and of what else decides: the
tokenizer's settings where it is trained, its content where it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from ctxlab.cache import default_cache
from ctxlab.data.corpora.base import Corpus, Document
from ctxlab.data.lock import locked, made_whole
from ctxlab.data.progress import Progress, silent
from ctxlab.data.source import SOURCES, Source
from ctxlab.data.splits import SPLITS, Cut, Splits, documents, split
from ctxlab.data.tokenizers.base import TOKENIZERS, Tokenizer, load_tokenizer
from ctxlab.data.tokens import Split, read_split, write_tokens
from ctxlab.data.windows import Packed, Rows, Windows
from ctxlab.errors import DataError

FORMAT = 1  # of the cache: raised when the same input gives other files
_FACTS = "facts.json"
_SAMPLE = 24 << 20  # bytes of text that a tokenizer is trained on, at most


@dataclass(frozen=True)
class TextDataset:
    """Text as tokens: its splits, the tokenizer that made them, and what a record says of both."""

    splits: dict[str, Split]
    tokenizer: Tokenizer
    facts: dict[str, Any]
    corpus: Corpus.Config | None = None  # what it was made of, and the cache that it is in
    cache: Path | None = None

    def rows(self, context: int, *, seed: int, packed: bool) -> Rows:
        """Training rows of one context. Raises DataError where no document is that long."""
        return (Packed if packed else Windows)(self.splits["train"], context, seed)


def prepare(
    data: Source.Config,
    tokenizer: Tokenizer.Config | Tokenizer,
    *,
    cache: Path | None = None,
    progress: Progress = silent,
) -> TextDataset:
    """The tokens of a corpus under a tokenizer (one given, or one by its settings), from the cache or made now.

    Raises DataError, one line, for text or a tokenizer that cannot be used.
    """
    root = default_cache() if cache is None else cache
    corpus = SOURCES.get(data.name)(data)
    assert isinstance(corpus, Corpus)
    corpus.fetch(root, progress)
    facts = corpus.facts()
    made = tokenizer if isinstance(tokenizer, Tokenizer) else _tokenizer(tokenizer, corpus, facts, root, progress)
    folder = root / "tokens" / _key(facts, made.sha256)
    if not (folder / _FACTS).exists():
        with locked(folder):
            if not (folder / _FACTS).exists():
                _make(folder, corpus, facts, made, root, progress)
    return replace(_read(folder), corpus=corpus.config, cache=root)


class TrainingText(NamedTuple):
    """The documents of a corpus that are trained on."""

    key: str  # tells one state of this text from another
    n_bytes: int
    documents: Iterator[Document]  # read the lines of each before going on to the next


def training_text(data: Corpus.Config, *, cache: Path | None = None, progress: Progress = silent) -> TrainingText:
    """What of a corpus is trained on, whatever the tokenizer. Raises DataError for text that cannot be used."""
    root = default_cache() if cache is None else cache
    corpus = SOURCES.get(data.name)(data)
    assert isinstance(corpus, Corpus)
    corpus.fetch(root, progress)
    facts = corpus.facts()
    splits = _splits(corpus, facts, root, progress)
    chosen = splits.labels == SPLITS.index("train")
    texts = zip(documents(corpus, splits.cut), chosen, strict=True)
    return TrainingText(
        _key(facts, "splits"), int(splits.n_bytes[chosen].sum()), (document for document, mine in texts if mine)
    )


def _tokenizer(
    config: Tokenizer.Config, corpus: Corpus, facts: dict[str, Any], root: Path, progress: Progress
) -> Tokenizer:
    """The tokenizer of some settings: made from them alone, or trained on the train split, once."""
    kind = TOKENIZERS.get(config.name)
    if not kind.learns:
        return kind.make(config, ())
    folder = root / "tokenizers" / _key(facts, config.model_dump(mode="json"))
    with locked(folder):
        if not folder.exists():
            splits = _splits(corpus, facts, root, progress)
            advance = progress(f"training the tokenizer ({config.name})", 1)
            made = kind.make(config, _sample(corpus, splits))
            with made_whole(folder) as draft:
                made.save(draft)
            advance(1)
    return load_tokenizer(folder)


def _make(folder: Path, corpus: Corpus, facts: dict[str, Any], made: Tokenizer, root: Path, progress: Progress) -> None:
    splits = _splits(corpus, facts, root, progress)
    total = int(splits.n_bytes.sum())
    with made_whole(folder) as draft:
        made.save(draft / "tokenizer")
        write_tokens(
            draft, documents(corpus, splits.cut), splits.labels, made, draft / "tokenizer",
            n_bytes=total, advance=progress("turning text into tokens", total),
        )  # fmt: skip
        counts = {
            name: {
                "documents": (part := read_split(draft, name, made.vocab_size)).n_documents,
                "tokens": len(part.tokens),
                "bytes": int(splits.n_bytes[splits.labels == label].sum()),
            }
            for label, name in enumerate(SPLITS)
        }
        described = {
            **facts,
            "text_sha256": splits.sha256,
            "cut": asdict(splits.cut) if splits.cut else None,
            "splits": counts,
            "tokenizer": {"name": made.config.name, "vocab_size": made.vocab_size, "sha256": made.sha256},
        }
        (draft / _FACTS).write_text(json.dumps(described, ensure_ascii=False, indent=1), encoding="utf-8")


def _splits(corpus: Corpus, facts: dict[str, Any], root: Path, progress: Progress) -> Splits:
    """Which document goes where, from the cache or by reading the corpus. Other tokenizers use the same."""
    file = root / "splits" / f"{_key(facts, 'splits')}.npz"
    with locked(file):
        if not file.exists():
            found = split(corpus, progress("reading the corpus", 0))
            cut = json.dumps(asdict(found.cut) if found.cut else None)
            draft = file.with_suffix(".draft.npz")
            np.savez(draft, labels=found.labels, n_bytes=found.n_bytes, sha256=found.sha256, cut=cut)
            os.replace(draft, file)
            return found
    try:
        with np.load(file) as saved:
            cut = json.loads(str(saved["cut"]))
            return Splits(Cut(**cut) if cut else None, saved["labels"], saved["n_bytes"], str(saved["sha256"]))
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"paths.cache: {file} is damaged ({error}); remove it and run again") from error


def _sample(corpus: Corpus, splits: Splits) -> Iterator[str]:
    """Lines of the train split, evenly taken from all of it, to the amount that a tokenizer learns from."""
    train = SPLITS.index("train")
    every = max(1, -(-int(splits.n_bytes[splits.labels == train].sum()) // _SAMPLE))
    number = 0
    for document, label in zip(documents(corpus, splits.cut), splits.labels, strict=True):
        for line in document.lines:
            if label == train:
                if number % every == 0:
                    yield line
                number += 1


def _read(folder: Path) -> TextDataset:
    try:
        tokenizer = load_tokenizer(folder / "tokenizer")
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        return TextDataset({name: read_split(folder, name, tokenizer.vocab_size) for name in SPLITS}, tokenizer, facts)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"paths.cache: {folder} is damaged ({error}); remove it and run again") from error


def _key(facts: dict[str, Any], of: Any) -> str:
    text = json.dumps([FORMAT, facts, of], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
