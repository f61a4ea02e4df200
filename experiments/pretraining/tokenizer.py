"""A tokenizer for a corpus and for sentence pairs: unigram pieces learned from both, as T5's were from English and from the
languages it translates (Raffel et al. 2020, arXiv:1910.10683, section 3.1.3). It reads what is trained on alone: the train
splits of the pairs, which no test sentence is in, and of Shakespeare.

    python experiments/pretraining/tokenizer.py fra.txt joint.model
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ctxlab.data.corpora.base import Corpus
from ctxlab.data.pairs.parallel import Parallel, held_out
from ctxlab.data.prepare import default_cache, training_text
from ctxlab.data.progress import silent
from ctxlab.data.source import SOURCES
from ctxlab.data.tokenizers.pieces import train
from ctxlab.data.tokenizers.unigram import Unigram
from ctxlab.errors import ConfigError
from ctxlab.study.script import run_script

VOCABULARY = 4000


def sentences(path: str) -> Iterator[str]:
    """Both sides of the pairs that are trained on, French to English."""
    parallel = Parallel(Parallel.Config(path=path, source_column=2, target_column=1))
    parallel.fetch(default_cache(), silent)
    bounds = held_out(pair.target for pair in parallel.pairs())
    for pair in parallel.pairs():
        if bounds.part(pair.target) == "train":
            yield from pair


def lines() -> Iterator[str]:
    """The default corpus, of what is trained on."""
    config = SOURCES.config({"name": "shakespeare"})
    assert isinstance(config, Corpus.Config)
    for document in training_text(config).documents:
        yield from document.lines


def main(words: list[str]) -> None:
    """Raises CtxlabError, one line, for what cannot be read or written."""
    if len(words) != 2:
        raise ConfigError(
            "expected the pairs and the file to write: python experiments/pretraining/tokenizer.py fra.txt joint.model"
        )
    pairs, corpus = list(sentences(words[0])), list(lines())
    model = train("unigram", VOCABULARY, [*pairs, *corpus])
    try:
        Path(words[1]).write_bytes(model)
    except OSError as error:
        raise ConfigError(f"{words[1]} cannot be written: {error.strerror}") from error
    tokenizer = Unigram(Unigram.Config(vocab_size=VOCABULARY), model)
    for name, texts in (("pairs", pairs), ("corpus", corpus)):
        n_bytes, some = sum(len(text.encode()) for text in texts[::50]), tokenizer.encode_lines(texts[::50])
        row = {"text": name, "lines": len(texts), "bytes_per_token": n_bytes / sum(map(len, some))}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run_script(main)
