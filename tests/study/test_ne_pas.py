"""`experiments/ne_pas/ne_pas.py`: words found among pieces, the weights between them, the words they are held against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctxlab.data.pairs.dataset import PairDataset, Pairs
from ctxlab.data.sides import Side
from ctxlab.data.tokenizers.byte import Byte
from ctxlab.data.tokenizers.sides import Tokenizers
from ctxlab.evaluation.heads import Pool
from ctxlab.registry import import_file
from tests.train.builders import command, the_run

ne_pas: Any = import_file("ne_pas", Path(__file__).parents[2] / "experiments/ne_pas/ne_pas.py")
BYTES = Byte(Byte.Config())


def source(text: str) -> list[int]:
    return [*BYTES.encode(text), BYTES.eos_id]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Je ne parle pas.", (1, 3)),
        ("Ne pars pas, ne ris pas !", (0, 2)),  # the first of each
        ("Pas lui ! Il ne veut pas.", (4, 6)),  # a pas before is another
        ("Il n'est pas là.", None),
        ("Je ne veux jamais.", None),
        ("Pas ici, ne viens plus.", None),
        ("Une passante nerveuse", None),  # no word of their own
    ],
)
def test_words_are_found_whatever_their_pieces(text: str, expected: tuple[int, int] | None) -> None:
    found = ne_pas.read(BYTES, source(text))
    assert (None if found is None else (found.ne, found.pas)) == expected


def test_a_word_gives_the_mean_and_gets_the_sum_of_its_pieces() -> None:
    p = torch.rand(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    words = [0, 1, 1, 2, 2, 2]
    ours = ne_pas.by_word(p, words)
    for head in range(3):
        pool = Pool(words, words)
        pool.add(slice(0, 6), p[head])
        np.testing.assert_allclose(ours[head].numpy(), pool.weights(), atol=1e-12, rtol=0)


def test_others_are_as_far_apart_in_the_same_direction_and_as_long() -> None:
    """Of " ne" and " pas" as pieces of three and four bytes: " qu" and " les" are such a pair, " qu" and " lesquels" is none."""
    for text, others in (("Il ne dit pas qu il les a.", [4]), ("Il ne dit pas qu il lesquels a.", [])):
        assert ne_pas.read(BYTES, source(text)).others == others
    found = ne_pas.read(BYTES, source("Il ne dit pas qu il les a."))
    p = torch.arange(81, dtype=torch.float64).view(1, 9, 9)  # from row to column
    assert [float(x) for x in found.weights(p, "ne")] == [9 * 1 + 3, 9 * 4 + 6]
    assert [float(x) for x in found.weights(p, "pas")] == [9 * 3 + 1, 9 * 6 + 4]


def test_attention_that_is_the_same_everywhere_ties_nothing() -> None:
    found = ne_pas.read(BYTES, source("Il ne dit pas qu il les a."))
    n = len(found.words)
    words = ne_pas.by_word(torch.full((2, n, n), 1 / (n + 1), dtype=torch.float64), found.words)
    for start in ("ne", "pas"):
        own, others = found.weights(words, start)
        torch.testing.assert_close(own, others, atol=1e-12, rtol=0)


def test_sentences_are_those_held_out_each_once() -> None:
    def pairs(name: str, *texts: str) -> Pairs:
        ids = [source(text) for text in texts]
        side = Side(np.concatenate([np.array(one) for one in ids]), np.cumsum([0, *map(len, ids)]))
        return Pairs(name, side, side)

    end = " qu il les a."
    splits = {
        "train": pairs("train", f"Je ne sais pas{end}"),
        "validation": pairs("validation", f"Il ne dort pas{end}", f"Tu ne ris pas{end}"),
        "test": pairs(
            "test", f"Tu ne ris pas{end}", "Oui.", f"Tu ne ris pas{end}", f"Elle ne pense pas{end}", "Tu ne ris pas."
        ),
    }
    found = ne_pas.sentences(PairDataset(splits, Tokenizers.joint(BYTES), {}), longest=29)
    assert [BYTES.decode(one.tokens) for one in found] == [f"Tu ne ris pas{end}", f"Il ne dort pas{end}"]


def test_it_asks_a_run_as_training_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command that trains to the rows and the figure."""
    said = [f"{who} ne {does} pas qu il les {n} {end}" for who in ("Il", "Tu") for does in ("dit", "sait")
            for n in range(500) for end in ("rient", "dorment")]  # fmt: skip
    lines = [f"{source}\t{n} says nothing" for n, source in enumerate(said)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    done = command(
        tmp_path, "train", "data=parallel", "data.path=pairs.tsv", "tokenizer=byte", "model=nano",
        "model.architecture=encoder_decoder", "model.d_model=16", "model.n_heads=2", "model.head_dim=8", "model.d_ff=32",
        "context=64", "trainer.precision=fp32", "trainer.max_tokens=none", "trainer.max_steps=1", "eval=none",
        "logger.mode=disabled", "profile.contexts=none", "name=small",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    run = the_run(tmp_path, "small")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CTXLAB_RUNS", str(run.path.parent))
    monkeypatch.setenv("CTXLAB_RESULTS", str(tmp_path / "results"))
    ne_pas.main([run.id])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    heads, layers = [row for row in rows if "head" in row], [row for row in rows if "heads_of" in row]
    n_layers = run.record.config["model"]["n_layers"]
    assert len(heads) == 2 * 2 * n_layers
    assert len(layers) == 2 * n_layers
    assert all(0 < row["weight"] < 1 and row["sentences"] > 1 for row in heads)
    assert (tmp_path / "results/ne_pas.png").stat().st_size > 1000
