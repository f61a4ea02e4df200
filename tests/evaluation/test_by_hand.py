"""Every perplexity number of a hand-made corpus under a fixed tiny model, against sums in float64 over one forward a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from ctxlab.data.tokenizers.byte import Byte
from ctxlab.evaluation.perplexity import Evaluated, PerplexityConfig, evaluate_perplexity
from ctxlab.model.transformer import Transformer
from ctxlab.records.schema import Measurement
from tests.evaluation.builders import dataset_of, split_of
from tests.evaluation.by_hand import nats_of_last, streamed_nats
from tests.model.builders import build

TEXTS = (
    "To be, or not to be: that is the question.\n",  # 43 bytes: 2 segments of 16 and 11 left over
    "Ça va? Déjà vu.\n  Oui, déjà vu: façade naïve, là-bas, à côté.\n",
    "Words words words.",
)
SEGMENT, LENGTHS, TRAINED, STRIDE, CACHE, SINKS = 16, (4, 8, 16), 8, 3, 6, 2
T_975 = 4.302652729696142  # of Student's t with 2 degrees of freedom: sqrt(2) * 0.95 / sqrt(1 - 0.95^2)
TOKENIZER = Byte(Byte.Config())
DOCUMENTS = [[TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id] for text in TEXTS]
NEAR = {"rel": 0, "abs": 1e-9}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build("alibi", vocab_size=TOKENIZER.vocab_size, context=TRAINED).double()


@pytest.fixture(scope="module")
def found(model: Transformer) -> Evaluated:
    config = PerplexityConfig(
        lengths=LENGTHS,
        strides=(STRIDE,),
        streaming=(CACHE,),
        sinks=SINKS,
        bos=True,
        segment=SEGMENT,
        min_documents=1,
        batch_tokens=10,
    )
    return evaluate_perplexity(
        model, dataset_of(split_of(DOCUMENTS), TOKENIZER), config, trained_context=TRAINED, device=torch.device("cpu"),
        precision="fp32",
    )  # fmt: skip


def begins_plain(length: int) -> Callable[[int], int]:
    """Of a target at a place of its segment, where its window begins."""
    return lambda place: place // length * length


def begins_sliding(length: int) -> Callable[[int], int]:
    def begin(place: int) -> int:
        end = length
        while end <= place:
            end = min(end + STRIDE, SEGMENT)
        return end - length

    return begin


def nats_by_target(model: Transformer, begin: Callable[[int], int], bos: bool) -> list[np.ndarray]:
    """Of each document, the nats of its scored targets, each by a forward of its own over what it may see."""
    found = []
    for document in DOCUMENTS:
        nats = []
        for start in range(0, len(document) - SEGMENT, SEGMENT):
            for place in range(SEGMENT):
                first = start + begin(place)
                seen = document[first : start + place + 1]
                front = [TOKENIZER.bos_id] if bos and first > 0 else []
                nats.append(nats_of_last(model, front + seen, document[start + place + 1]))
        found.append(np.array(nats))
    return found


def nats_streamed(model: Transformer, bos: bool) -> list[np.ndarray]:
    found = []
    for document in DOCUMENTS:
        nats: list[float] = []
        for start in range(0, len(document) - SEGMENT, SEGMENT):
            front = [TOKENIZER.bos_id] if bos and start > 0 else []
            tokens = front + document[start : start + SEGMENT + 1]
            nats += streamed_nats(model, tokens, sinks=SINKS, window=CACHE - SINKS)[len(front) :]
        found.append(np.array(nats))
    return found


def ratio(numerators: list[float], denominators: list[float]) -> tuple[float, float, float]:
    """(R, low, high) of three documents."""
    value = sum(numerators) / sum(denominators)
    residual = sum((n - value * m) ** 2 for n, m in zip(numerators, denominators, strict=True))
    half = T_975 * math.sqrt(residual / (3 * 2)) / (sum(denominators) / 3)
    return value, value - half, value + half


def scored_text(text: str) -> bytes:
    """The bytes behind the scored targets: a token a byte, and whole segments of them."""
    data = text.encode()
    return data[: (len(data) + 1) // SEGMENT * SEGMENT]


def words(data: bytes) -> int:
    """Places of a word's first byte; the texts have no white space but ASCII's."""
    return sum(byte not in b" \n" and (at == 0 or data[at - 1] in b" \n") for at, byte in enumerate(data))


def bounds(row: Measurement) -> tuple[float | None, float | None, float | None]:
    return row.value, row.low, row.high


WAYS = [
    *((length, "non-overlapping", {}) for length in LENGTHS),
    *((length, "sliding", {"stride": STRIDE}) for length in LENGTHS),
    (CACHE, "streaming", {"sinks": SINKS}),
]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("length", "protocol", "axes"), WAYS)
def test_every_way_of_scoring_under_every_normaliser(
    model: Transformer, found: Evaluated, length: int, protocol: str, axes: dict[str, int], bos: bool
) -> None:
    if protocol == "streaming":
        by_target, plain = nats_streamed(model, bos), nats_streamed(model, False)
    else:
        begin = begins_plain(length) if protocol == "non-overlapping" else begins_sliding(length)
        by_target, plain = (nats_by_target(model, begin, b) for b in (bos, False))
    nats = [float(one.sum()) for one in by_target]
    texts = [scored_text(text) for text in TEXTS]
    tokens, n_bytes = [float(len(one)) for one in by_target], [float(len(text)) for text in texts]
    assert tokens == [32, 64, 16]

    where = {"segment": SEGMENT, **axes, **({"bos": True} if bos else {})}
    rows = {row.name: row for row in found.measurements if row.context == length and row.axes == where}
    assert set(rows) == {"nats_per_token", "perplexity", "bits_per_byte", "nats_per_word", "word_perplexity"}
    assert {row.protocol for row in rows.values()} == {f"{protocol}, bos first" if bos else protocol}
    assert {(row.n_targets, row.n_docs) for row in rows.values()} == {(112, 3)}
    assert {name: row.normaliser for name, row in rows.items()} == {
        "nats_per_token": "token", "perplexity": "token", "bits_per_byte": "byte", "nats_per_word": "word",
        "word_perplexity": "word",
    }  # fmt: skip
    per_token, per_word = ratio(nats, tokens), ratio(nats, [float(words(text)) for text in texts])
    assert bounds(rows["nats_per_token"]) == pytest.approx(per_token, **NEAR)
    assert bounds(rows["bits_per_byte"]) == pytest.approx(ratio([n / math.log(2) for n in nats], n_bytes), **NEAR)
    assert bounds(rows["nats_per_word"]) == pytest.approx(per_word, **NEAR)
    for name, exponents in (("perplexity", per_token), ("word_perplexity", per_word)):
        logs = [math.log(value) for value in bounds(rows[name]) if value is not None]
        assert logs == pytest.approx(exponents, **NEAR)

    if bos or protocol == "sliding":
        other = plain if bos else nats_by_target(model, begins_plain(length), False)
        change, low, high = ratio([a - float(b.sum()) for a, b in zip(nats, other, strict=True)], tokens)
        facts = rows["nats_per_token"].facts
        assert (facts["difference"], facts["difference_low"], facts["difference_high"]) == pytest.approx(
            (change, low, high), **NEAR
        )
    sums = {axes_of: row for row in found.sums if (axes_of := (row.context, tuple(row.axes.items())))}
    kept = sums[length, tuple((axes | ({"bos": True} if bos else {})).items())]
    assert kept.nats == pytest.approx(nats, **NEAR)
    assert (kept.targets, kept.n_bytes) == ((32, 64, 16), tuple(map(len, texts)))


def test_a_stride_of_the_windows_length_or_more_is_no_other_way(found: Evaluated) -> None:
    assert {row.axes.get("stride") for row in found.measurements} == {None, STRIDE}


def test_loss_by_position(model: Transformer, found: Evaluated) -> None:
    by_target = [one.reshape(-1, SEGMENT) for one in nats_by_target(model, begins_plain(16), False)]
    rows = {(row.axes["from"], row.axes["to"]): row for row in found.measurements if row.protocol == "by position"
            and row.name == "nats_per_token"}  # fmt: skip
    assert list(rows) == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 11), (12, 16)]
    for (first, last), row in rows.items():
        nats = [float(one[:, first - 1 : last].sum()) for one in by_target]
        targets = [float(one[:, first - 1 : last].size) for one in by_target]
        assert bounds(row) == pytest.approx(ratio(nats, targets), **NEAR)
        assert (row.n_targets, row.normaliser) == (sum(targets), "token")


def test_the_in_context_score(model: Transformer, found: Evaluated) -> None:
    """Of a trained context of 8 the indices are 50 * 8 / 512 and 500 * 8 / 512, rounded down, and at least 1."""
    by_target = [one.reshape(-1, 8) for one in nats_by_target(model, begins_plain(8), False)]
    (row,) = (row for row in found.measurements if row.name == "in_context_score")
    change = [float((one[:, 6] - one[:, 0]).sum()) for one in by_target]
    assert bounds(row) == pytest.approx(ratio(change, [float(len(one)) for one in by_target]), **NEAR)
    assert row.axes == {"segment": SEGMENT, "length": 8, "early": 1, "late": 7}


def test_the_extrapolation_ratio(model: Transformer, found: Evaluated) -> None:
    """The last 8 / 4 indices of windows of 16 are the last ones of every other window of 8."""
    ours, theirs = (
        [one.reshape(-1, SEGMENT)[:, 14:] for one in nats_by_target(model, begins_plain(n), False)] for n in (16, 8)
    )
    (row,) = (row for row in found.measurements if row.name == "extrapolation_ratio")
    change = ratio(
        [float(a.sum() - b.sum()) for a, b in zip(ours, theirs, strict=True)], [float(one.size) for one in ours]
    )
    (said,) = row.facts["changes"].values()
    assert (said["change"], said["low"], said["high"]) == pytest.approx(change, **NEAR)
    assert row.value == (2.0 if change[0] <= 0.05 else 1.0)
    assert row.axes == {"segment": SEGMENT, "trained": 8, "epsilon": 0.05, "last": 2}


def test_the_effective_context(model: Transformer, found: Evaluated) -> None:
    """In windows that move on by 3, where every target but the first ones sees nearly the whole length."""
    perplexity = {
        length: math.exp(np.concatenate(nats_by_target(model, begins_sliding(length), False)).mean())
        for length in LENGTHS
    }
    (row,) = (row for row in found.measurements if row.name == "effective_context")
    assert row.value == min(length for length in LENGTHS if perplexity[length] <= 1.01 * perplexity[16])
    assert row.axes == {"segment": SEGMENT, "stride": STRIDE}
    assert row.facts == {"within": 0.01, "lengths": list(LENGTHS)}


def test_the_numbers_are_told_apart(found: Evaluated) -> None:
    """Below the segment's length no two ways give the same number, or one could be taken for another above."""
    rows = [row for row in found.measurements if row.name == "nats_per_token" and row.context in (4, 6, 8)]
    values = sorted(row.value for row in rows if row.value is not None)
    assert len(values) == 10
    assert min(b - a for a, b in pairwise(values)) > 1e-5
