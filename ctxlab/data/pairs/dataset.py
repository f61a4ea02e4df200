"""Sentence pairs as tokens: a folder in the cache, made once, read as memory maps."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctxlab.data.lock import locked, made_whole
from ctxlab.data.pairs.parallel import Pair, Parallel, held_out
from ctxlab.data.prepare import default_cache
from ctxlab.data.progress import Progress, silent
from ctxlab.data.splits import SPLITS
from ctxlab.data.tokenizers.base import TOKENIZERS, Tokenizer
from ctxlab.data.tokenizers.sides import SOURCE, Tokenizers, are_apart, load_tokenizers
from ctxlab.errors import DataError

FORMAT = 1  # of the folder: raised when the same input gives other files
SIDES = ("source", "target")
_FACTS = "facts.json"
_CHUNK = 8192  # pairs that are encoded together
_SAMPLE = 400_000  # sentences that a tokenizer learns from, at most


@dataclass(frozen=True)
class Side:
    """One side of a split's pairs: the sentences' tokens one behind the other, and where each begins."""

    tokens: np.ndarray  # uint16 or uint32
    starts: np.ndarray  # (n + 1,) int64

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.starts)

    def sentence(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]


@dataclass(frozen=True)
class Pairs:
    """The pairs of one split. A source ends with eos; a target begins with bos and ends with eos."""

    name: str
    source: Side
    target: Side

    @property
    def n(self) -> int:
        return len(self.source.starts) - 1


@dataclass(frozen=True)
class PairDataset:
    """Sentence pairs as tokens, and the tokenizers of both sides, which may be one."""

    splits: dict[str, Pairs]
    tokenizers: Tokenizers
    facts: dict[str, Any]

    @property
    def tokenizer(self) -> Tokenizer:
        """Of what is written."""
        return self.tokenizers.target

    def text(self, split: str, index: int) -> Pair:
        """A pair as it was written."""
        pairs, said = self.splits[split], self.tokenizers
        return Pair(
            said.source.decode(pairs.source.sentence(index).tolist()),
            said.target.decode(pairs.target.sentence(index).tolist()),
        )


def prepare_pairs(
    data: Parallel.Config,
    tokenizer: Tokenizer.Config | Tokenizers,
    *,
    cache: Path | None = None,
    progress: Progress = silent,
) -> PairDataset:
    """The tokens of sentence pairs under the tokenizers of both languages (given, or by their settings: one learned from both
    sides of the train split, or one from each).

    Raises DataError, one line, for files that cannot be used.
    """
    root = default_cache() if cache is None else cache
    parallel = Parallel(data)
    parallel.fetch(root, progress)
    facts = parallel.facts()
    said = tokenizer.facts() if isinstance(tokenizer, Tokenizers) else tokenizer.model_dump(mode="json")
    key = json.dumps([FORMAT, facts, said], sort_keys=True, ensure_ascii=False)
    folder = root / "pairs" / hashlib.sha256(key.encode()).hexdigest()[:24]
    with locked(folder):
        if not (folder / _FACTS).exists():
            with made_whole(folder) as draft:
                _make(draft, parallel, tokenizer, facts, progress)
    return _read(folder)


def _make(
    folder: Path,
    parallel: Parallel,
    tokenizer: Tokenizer.Config | Tokenizers,
    facts: dict[str, Any],
    progress: Progress,
) -> None:
    side = parallel.config.held_out_by
    advance = progress("reading the pairs", 0)
    bounds = held_out(getattr(pair, side) for pair in parallel.pairs())
    advance(1)
    if isinstance(tokenizer, Tokenizers):
        both = tokenizer
    else:

        def train() -> Iterator[Pair]:
            return (pair for pair in parallel.pairs() if bounds.part(getattr(pair, side)) == "train")

        both = _learned(tokenizer, train, progress)
    both.save(folder)
    advance = progress("turning pairs into tokens", 0)
    source_said, target_said = both.source, both.target
    dtypes = dict(zip(SIDES, (_dtype(source_said), _dtype(target_said)), strict=True))
    digest = hashlib.sha256()
    starts: dict[tuple[str, str], list[int]] = {(name, side): [0] for name in SPLITS for side in SIDES}
    n_bytes = 0
    with ExitStack() as stack:
        files = {key: stack.enter_context(open(_bin(folder, *key), "wb")) for key in starts}
        for chunk in _chunks(parallel.pairs()):
            sources = source_said.encode_lines([pair.source for pair in chunk])
            targets = target_said.encode_lines([pair.target for pair in chunk])
            for pair, source, target in zip(chunk, sources, targets, strict=True):
                name = bounds.part(getattr(pair, side))
                digest.update(f"{pair.source}\t{pair.target}\n".encode())
                n_bytes += len(pair.source.encode()) + len(pair.target.encode())
                whole = [*source, source_said.eos_id], [target_said.bos_id, *target, target_said.eos_id]
                for said, ids in zip(SIDES, whole, strict=True):
                    files[name, said].write(np.array(ids, dtype=dtypes[said]).tobytes())
                    starts[name, said].append(starts[name, said][-1] + len(ids))
            advance(len(chunk))
    for (name, said), where in starts.items():
        np.save(folder / f"{name}.{said}.starts.npy", np.array(where, dtype=np.int64))
    counts = {
        name: {"pairs": len(starts[name, "source"]) - 1, **{f"{said}_tokens": starts[name, said][-1] for said in SIDES}}
        for name in SPLITS
    }
    described = {
        **facts,
        "text_sha256": digest.hexdigest(),
        "bytes": n_bytes,
        "splits": counts,
        **both.facts(),
    }
    (folder / _FACTS).write_text(json.dumps(described, ensure_ascii=False, indent=1), encoding="utf-8")


def _learned(settings: Tokenizer.Config, pairs: Callable[[], Iterator[Pair]], progress: Progress) -> Tokenizers:
    """One tokenizer of all sentences, or one of each side's."""
    kind = TOKENIZERS.get(settings.name)
    learning = progress(f"training the tokenizer ({settings.name})", 1 + are_apart(settings.model_dump()))

    def make(sentences: Iterator[str]) -> Tokenizer:
        made = kind.make(settings, itertools.islice(sentences, _SAMPLE))
        learning(1)
        return made

    if are_apart(settings.model_dump()):
        return Tokenizers(make(pair.source for pair in pairs()), make(pair.target for pair in pairs()))
    joint = make(itertools.chain.from_iterable(pairs()))
    return Tokenizers(joint, joint)


def _dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def _read(folder: Path) -> PairDataset:
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        both = load_tokenizers(folder, apart=SOURCE in facts)
        sides = dict(zip(SIDES, (_dtype(both.source), _dtype(both.target)), strict=True))
        splits = {
            name: Pairs(name, *(_side(folder, name, side, dtype) for side, dtype in sides.items())) for name in SPLITS
        }
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"paths.cache: {folder} is damaged ({error}); remove it and run again") from error
    return PairDataset(splits, both, facts)


def _side(folder: Path, name: str, side: str, dtype: type[np.unsignedinteger]) -> Side:
    starts = np.load(folder / f"{name}.{side}.starts.npy", mmap_mode="r")
    tokens = np.memmap(_bin(folder, name, side), dtype=dtype, mode="r")
    if len(tokens) != starts[-1]:
        raise ValueError(f"{name}.{side} holds {len(tokens)} tokens, its sentences have {starts[-1]}")
    return Side(tokens, starts)


def _bin(folder: Path, name: str, side: str) -> Path:
    return folder / f"{name}.{side}.bin"


def _chunks(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    while chunk := list(itertools.islice(pairs, _CHUNK)):
        yield chunk
