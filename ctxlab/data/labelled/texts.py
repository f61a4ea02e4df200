"""Labelled texts as tokens and the numbers of their labels."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctxlab.cache import default_cache
from ctxlab.data.kept import damaged, kept
from ctxlab.data.labelled.classification import Classification, Labelled
from ctxlab.data.labelled.split import held_out, learned
from ctxlab.data.pairs.parallel import HeldOut
from ctxlab.data.progress import Progress, silent
from ctxlab.data.sides import Side, SideWriter, read_side
from ctxlab.data.splits import SPLITS
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.sides import Tokenizers, load_tokenizers
from ctxlab.errors import DataError

_FEWEST = 8  # texts that a part holds
_MOST_LABELS = 10_000
_SAMPLE = 400_000  # texts that a tokenizer learns from, at most
_CHUNK = 8192  # texts that are encoded together


@dataclass(frozen=True)
class Texts:
    """The texts of one split, and which of the dataset's labels each has."""

    name: str
    text: Side
    label: np.ndarray  # (n,) int64

    @property
    def n(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class LabelDataset:
    """Labelled texts as tokens, their tokenizer and the names of the labels, in order."""

    splits: dict[str, Texts]
    tokenizer: Tokenizer
    facts: dict[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.facts["labels"])


def prepare_texts(
    data: Classification.Config,
    tokenizer: Tokenizer.Config | Tokenizers,
    *,
    cache: Path | None = None,
    progress: Progress = silent,
) -> LabelDataset:
    """The tokens of labelled texts under a tokenizer (one given, or one learned from the train split).

    Raises DataError, one line, for files that cannot be used.
    """
    source = Classification(data)
    source.fetch(default_cache() if cache is None else cache, progress)
    folder, facts = kept(
        "classification", 1, source.facts(), tokenizer, cache, lambda draft: _make(draft, source, tokenizer, progress)
    )
    try:
        speaks = load_tokenizers(folder, apart=False).target
        return LabelDataset({name: _read(folder, name, speaks) for name in SPLITS}, speaks, facts)
    except (OSError, EOFError, ValueError) as error:
        raise damaged(folder, error) from error


def _make(
    folder: Path, source: Classification, tokenizer: Tokenizer.Config | Tokenizers, progress: Progress
) -> dict[str, Any]:
    tested_apart = "test_path" in source.files
    labels: set[str] = set()
    advance = progress("reading the texts", 0)
    bounds = held_out(
        _texts(source, labels), what="texts", fewest=_FEWEST, tested_apart=tested_apart, instead="; or give data.test_path"
    )  # fmt: skip
    if len(labels) < 2:
        raise DataError(
            f"data.path: {source.files['path']} has one label only ({min(labels)!r}), which leaves nothing to tell"
        )
    advance(1)
    advance = progress("training the tokenizer", 0)
    train = (found.text for name, found in _placed(source, bounds) if name == "train")
    speaks = learned(tokenizer, itertools.islice(train, _SAMPLE), folder)
    advance(1)
    if tested_apart:  # what is asked there may have labels that training has not
        labels.update(found.label for found in source.examples("test_path"))
    numbers = {label: number for number, label in enumerate(sorted(labels))}
    digest = hashlib.sha256()
    counts: dict[str, Counter[str]] = {name: Counter() for name in SPLITS}
    chosen: dict[str, array[int]] = {name: array("q") for name in SPLITS}
    advance = progress("turning texts into tokens", 0)
    with ExitStack() as stack:
        sides = {name: stack.enter_context(closing(SideWriter(folder, f"{name}.text", speaks))) for name in SPLITS}
        placed = _placed(source, bounds)
        while chunk := list(itertools.islice(placed, _CHUNK)):
            encoded = speaks.encode_lines([found.text for _, found in chunk])
            for (name, found), ids in zip(chunk, encoded, strict=True):
                sides[name].add(ids)
                chosen[name].append(numbers[found.label])
                counts[name][found.label] += 1
                digest.update(f"{found.text}\t{found.label}\n".encode())
            advance(len(chunk))
        tokens = {name: side.starts[-1] for name, side in sides.items()}
    for name, label in chosen.items():
        np.save(folder / f"{name}.label.npy", np.array(label, dtype=np.int64))
    if not chosen["test"]:
        raise DataError(f"data.test_path: {source.files['test_path']} has no text")
    return {
        "text_sha256": digest.hexdigest(),
        "labels": sorted(labels),
        "splits": {
            name: {"texts": len(chosen[name]), "tokens": tokens[name], "labels": dict(sorted(counts[name].items()))}
            for name in SPLITS
        },
        "majority_label": min(counts["train"], key=lambda label: (-counts["train"][label], label)),
        **Tokenizers.joint(speaks).facts(),
    }


def _texts(source: Classification, labels: set[str]) -> Iterator[str]:
    """The texts to be split, whose labels are taken note of."""
    for found in source.examples("path"):
        labels.add(found.label)
        if len(labels) > _MOST_LABELS:
            raise DataError(
                f"data.label_column: column {source.config.label_column} of {source.files['path']} has more than "
                f"{_MOST_LABELS:,} different labels"
            )
        yield found.text


def _placed(source: Classification, bounds: HeldOut) -> Iterator[tuple[str, Labelled]]:
    for key in source.files:
        for found in source.examples(key):
            yield "test" if key == "test_path" else bounds.part(found.text), found


def _read(folder: Path, name: str, tokenizer: Tokenizer) -> Texts:
    text, label = read_side(folder, f"{name}.text", tokenizer), np.load(folder / f"{name}.label.npy", mmap_mode="r")
    if len(text.starts) != len(label) + 1:
        raise ValueError(f"{name} has {len(label)} labels and {len(text.starts) - 1} texts")
    return Texts(name, text, label)
