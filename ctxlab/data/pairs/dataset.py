"""Sentence pairs as tokens: a folder in the cache, made once, read as memory maps."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxlab.cache import default_cache
from ctxlab.data.kept import damaged, kept
from ctxlab.data.pairs.parallel import Pair, Parallel, held_out
from ctxlab.data.progress import Progress, silent
from ctxlab.data.sides import Side, SideWriter, read_side
from ctxlab.data.splits import SPLITS
from ctxlab.data.tokenizers.base import TOKENIZERS, Tokenizer
from ctxlab.data.tokenizers.sides import SOURCE, Tokenizers, are_apart, load_tokenizers

SIDES = ("source", "target")
_CHUNK = 8192  # pairs that are encoded together
_SAMPLE = 400_000  # sentences that a tokenizer learns from, at most


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
    parallel = Parallel(data)
    parallel.fetch(default_cache() if cache is None else cache, progress)
    folder, facts = kept(
        "pairs", 1, parallel.facts(), tokenizer, cache, lambda draft: _make(draft, parallel, tokenizer, progress)
    )
    try:
        both = load_tokenizers(folder, apart=SOURCE in facts)
        speaks = dict(zip(SIDES, (both.source, both.target), strict=True))
        splits = {
            name: Pairs(name, *(read_side(folder, f"{name}.{side}", said) for side, said in speaks.items()))
            for name in SPLITS
        }
    except (OSError, EOFError, ValueError) as error:
        raise damaged(folder, error) from error
    return PairDataset(splits, both, facts)


def _make(
    folder: Path, parallel: Parallel, tokenizer: Tokenizer.Config | Tokenizers, progress: Progress
) -> dict[str, Any]:
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
    digest = hashlib.sha256()
    n_bytes = 0
    with ExitStack() as stack:
        writers = {
            (name, said): stack.enter_context(closing(SideWriter(folder, f"{name}.{said}", speaks)))
            for name in SPLITS
            for said, speaks in zip(SIDES, (source_said, target_said), strict=True)
        }
        for chunk in _chunks(parallel.pairs()):
            sources = source_said.encode_lines([pair.source for pair in chunk])
            targets = target_said.encode_lines([pair.target for pair in chunk])
            for pair, source, target in zip(chunk, sources, targets, strict=True):
                name = bounds.part(getattr(pair, side))
                digest.update(f"{pair.source}\t{pair.target}\n".encode())
                n_bytes += len(pair.source.encode()) + len(pair.target.encode())
                writers[name, "source"].add([*source, source_said.eos_id])
                writers[name, "target"].add([target_said.bos_id, *target, target_said.eos_id])
            advance(len(chunk))
        starts = {key: writer.starts for key, writer in writers.items()}
    counts = {
        name: {"pairs": len(starts[name, "source"]) - 1, **{f"{said}_tokens": starts[name, said][-1] for said in SIDES}}
        for name in SPLITS
    }
    return {"text_sha256": digest.hexdigest(), "bytes": n_bytes, "splits": counts, **both.facts()}


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


def _chunks(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    while chunk := list(itertools.islice(pairs, _CHUNK)):
        yield chunk
