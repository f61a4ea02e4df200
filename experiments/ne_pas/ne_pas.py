"""Does an encoder tie "ne" to "pas"? The weight between the two, by head, against words as far apart in the same sentences.

Of up to 200 different held-out sentences with the word "ne" and a word "pas" behind it (the first of each; those of the test
split, then those of the validation split, on which no weight was trained either). A word's weight to another is the mean over
its pieces of the sum over the other's pieces (Clark et al. 2019, arXiv:1906.04341, section 4.1). Beside it stands the mean of
that over all other pairs of words of the sentence, punctuation among them, that are as many words apart in the same
direction, each of as many pieces as "ne" and "pas": attention that is the same everywhere gives both the same. A sentence
without such a pair is left out.

A row is a run, head and direction, with the 95% interval of the difference, paired over sentences; then rows of all runs by
layer and direction: means over their heads, with the interval over runs by Student's t, and how many heads are above the
other words by their own interval. Layers and heads count from 1.

Words are ids of runs of an encoder-decoder that translates out of French, or what those begin with, in the folder of runs:

    python experiments/ne_pas/ne_pas.py ne_pas
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ctxlab.cli.environment import set_process_defaults

set_process_defaults()  # before torch is imported

import altair
import torch

from ctxlab.data.pairs.dataset import PairDataset, prepare_pairs
from ctxlab.data.pairs.parallel import Parallel
from ctxlab.data.source import SOURCES
from ctxlab.data.stream import padded
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.shown import words_of
from ctxlab.errors import ConfigError
from ctxlab.evaluation.intervals import ratio_interval
from ctxlab.model.seeing import attention_weights, attentions
from ctxlab.records.run import Run
from ctxlab.report.plots import PALETTE, save, styled
from ctxlab.study.script import cache_of, given_runs, mean, results_folder, run_script
from ctxlab.train.checkpoint import LoadedRun, open_run

MOST = 200  # sentences
DIRECTIONS = (("ne", "pas"), ("pas", "ne"))

Row = dict[str, object]


@dataclass(frozen=True)
class Sentence:
    """The tokens of a source, eos behind them; the word of each token but eos; which words are "ne" and "pas", and which are
    the first of the pairs that these are held against."""

    tokens: list[int]
    words: list[int]
    ne: int
    pas: int
    others: list[int]

    def weights(self, p: torch.Tensor, start: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Of weights p (H,n,n) of words, from `start` to the other word: the pair's, and the mean of the others', (H,) each."""
        along = (
            p.diagonal(self.pas - self.ne, dim1=1, dim2=2)
            if start == "ne"
            else p.diagonal(self.ne - self.pas, dim1=1, dim2=2)
        )
        return along[:, self.ne], along[:, self.others].mean(1)


def sentences(dataset: PairDataset, longest: int) -> list[Sentence]:
    """Those of the test split, then of the validation split, each text once, that have pairs to be held against."""
    tokenizer, found = dataset.tokenizers.source, dict[str, Sentence]()
    for split in ("test", "validation"):
        side = dataset.splits[split].source
        for index in range(dataset.splits[split].n):
            tokens = side.sentence(index).tolist()
            one = read(tokenizer, tokens)
            if one is not None and one.others and len(tokens) <= longest:
                found.setdefault(tokenizer.decode(tokens), one)
    return list(found.values())[:MOST]


def read(tokenizer: Tokenizer, tokens: list[int]) -> Sentence | None:
    """A source, where it has the word "ne" and behind it the word "pas"; the last of `tokens` is eos."""
    words = words_of(tokenizer, tokens[:-1])
    pieces: list[list[int]] = [[] for _ in range(max(words, default=-1) + 1)]
    for token, word in zip(tokens[:-1], words, strict=True):
        pieces[word].append(token)
    texts = [tokenizer.decode(word).strip().casefold() for word in pieces]
    if "ne" not in texts or "pas" not in texts[texts.index("ne") :]:
        return None
    ne = texts.index("ne")
    pas = texts.index("pas", ne)
    sizes = [len(word) for word in pieces]
    others = [
        first
        for first, second in enumerate(range(pas - ne, len(pieces)))
        if first != ne and (sizes[first], sizes[second]) == (sizes[ne], sizes[pas])
    ]
    return Sentence(tokens, words, ne, pas, others)


def by_word(weights: torch.Tensor, words: Sequence[int]) -> torch.Tensor:
    """Weights (H,T,T) of pieces as those of words, (H,n,n): the mean over a word's queries of the sum over another's keys."""
    belongs = torch.nn.functional.one_hot(torch.tensor(words)).to(weights)  # (T,n)
    return (belongs / belongs.sum(0)).T @ weights @ belongs


def measure(loaded: LoadedRun, chosen: Sequence[Sentence]) -> Iterator[Row]:
    """A row a head of the encoder and direction."""
    rows, lengths = padded([one.tokens for one in chosen], loaded.tokenizer.pad_id)
    source, sizes = torch.from_numpy(rows), torch.from_numpy(lengths)
    layers = [layer for kind, layer, _ in attentions(loaded.model) if kind == "encoder"]
    for layer in layers:
        weights = attention_weights(
            loaded.model, None, layer, kind="encoder", source=source, source_lengths=sizes
        ).double()
        words = [by_word(weights[n, :, : len(one.words), : len(one.words)], one.words) for n, one in enumerate(chosen)]
        for start, end in DIRECTIONS:
            pairs = [one.weights(p, start) for p, one in zip(words, chosen, strict=True)]
            own, others = (torch.stack(side) for side in zip(*pairs, strict=True))  # (sentences,H) twice
            for head in range(own.shape[1]):
                difference = (own[:, head] - others[:, head]).tolist()
                low, high = ratio_interval(difference, [1.0] * len(difference)) or (None, None)
                yield {
                    "run": loaded.run.id, "seed": loaded.config["seed"], "layer": layer + 1, "head": head + 1,
                    "from": start, "to": end, "sentences": len(chosen), "weight": float(own[:, head].mean()),
                    "equal_distance": float(others[:, head].mean()), "difference": statistics.fmean(difference),
                    "difference_low": low, "difference_high": high,
                }  # fmt: skip


def together(rows: Sequence[Row]) -> Iterator[Row]:
    """A row a layer and direction: over all runs."""
    groups: dict[tuple[object, ...], dict[object, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["layer"], row["from"], row["to"]][row["run"]].append(row)
    for (layer, start, end), runs in groups.items():
        found: Row = {"heads_of": "all runs", "layer": layer, "from": start, "to": end, "runs": len(runs)}
        for name in ("weight", "equal_distance", "difference"):
            means = [statistics.fmean(float(str(row[name])) for row in heads) for heads in runs.values()]
            found |= mean(means, name)
        heads = [row for some in runs.values() for row in some]
        found["heads"] = len(heads)
        found["heads_above"] = sum(
            row["difference_low"] is not None and float(str(row["difference_low"])) > 0 for row in heads
        )
        found["heads_below"] = sum(
            row["difference_high"] is not None and float(str(row["difference_high"])) < 0 for row in heads
        )
        yield found


def draw(rows: Sequence[Row]) -> None:
    """Each head as a point: its weight against that of words as far apart; above the line it looks there more."""
    numbers = [float(str(row[name])) for row in rows for name in ("weight", "equal_distance")]
    most = max(numbers) * 1.05
    colour = altair.Color(
        "layer:N", scale=altair.Scale(range=list(PALETTE)), legend=altair.Legend(title="layer", orient="bottom")
    )
    panels = []
    for start, end in DIRECTIONS:
        points = altair.Data(values=[row for row in rows if row["from"] == start])
        line = altair.Chart(altair.Data(values=[{"at": 0}, {"at": most}])).mark_line(color="#777777", strokeDash=[4, 4])
        heads = altair.Chart(points).mark_point(filled=True, size=60, opacity=0.8)
        scale = altair.Scale(domain=[0, most], nice=False)
        panel = line.encode(x=altair.X("at:Q", scale=scale), y=altair.Y("at:Q", scale=scale)) + heads.encode(
            x=altair.X("equal_distance:Q", scale=scale, axis=altair.Axis(title="other words as far apart")),
            y=altair.Y("weight:Q", scale=scale, axis=altair.Axis(title=f"weight from {start} to {end}")),
            color=colour,
        )
        panels.append(panel.properties(width=300, height=300))
    n = len({row["run"] for row in rows})
    heading = f"Every head of the encoder, {n} run{'s' * (n > 1)}: mean over sentences"
    save(styled(altair.hconcat(*panels).properties(title=heading)), results_folder("ne_pas") / "ne_pas.png")


def translates(run: Run) -> None:
    """Raises ConfigError where a run is none that can be asked."""
    config = run.record.config
    if config["model"]["architecture"] != "encoder_decoder" or config["data"]["name"] != "parallel":
        raise ConfigError(f"run: {run.id} does not translate; make one with: ctxlab train experiment=translation")


def main(selectors: Sequence[str]) -> None:
    """Raises CtxlabError, one line, for what cannot be read."""
    rows: list[Row] = []
    for run in given_runs(selectors):
        translates(run)
        loaded = open_run(run)
        data = SOURCES.config(run.record.config["data"])
        assert isinstance(data, Parallel.Config)
        dataset = prepare_pairs(data, loaded.tokenizers, cache=cache_of(run))
        chosen = sentences(dataset, loaded.context)
        if not chosen:
            raise ConfigError(f"run: no held-out source of {run.id} has the words ne and pas: is it French?")
        for row in measure(loaded, chosen):
            rows.append(row)
            print(json.dumps(row), flush=True)
    for row in together(rows):
        print(json.dumps(row), flush=True)
    draw(rows)


if __name__ == "__main__":
    run_script(main)
