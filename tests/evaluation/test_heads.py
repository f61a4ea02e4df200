"""Heads in numbers, by hand; weights pooled to words and parts; the steps of decoding."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from ctxlab.errors import ConfigError
from ctxlab.evaluation.heads import HeadSums, Pool, induction_scores, parts, see, steps
from ctxlab.model.seeing import attention_weights
from tests.model.builders import VOCAB, build, tokens

# A causal head over four tokens.
P = torch.tensor(
    [[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64
)


def sums(p: torch.Tensor, *, crosses: bool = False, has_sink: bool = False) -> HeadSums:
    """Rows in two parts, the later first."""
    found = HeadSums(*p.shape, crosses=crosses, has_sink=has_sink)
    for rows in (slice(2, len(p)), slice(0, 2)):
        found.add(rows, p[rows])
    return found


def test_a_head_by_hand() -> None:
    found = sums(P).summary(induction=0.5)
    assert found.entropy == pytest.approx((0 + math.log(2) + 0 + math.log(4)) / 4, abs=1e-12)
    assert found.distance == pytest.approx((0 + 0.5 + 1 + (3 + 2 + 1 + 0) / 4) / 4, abs=1e-12)
    assert found.previous == pytest.approx((0.5 + 1.0 + 0.25) / 3, abs=1e-12)
    assert found.first == pytest.approx((0.5 + 0.0 + 0.25) / 3, abs=1e-12)
    assert (found.induction, found.sink) == (0.5, None)


def test_a_sink_is_one_more_place_to_look_at() -> None:
    """Half of every weight to the sink: entropy H becomes H / 2 + ln 2, the mean distance stays, the others halve."""
    whole, half = sums(P).summary(), sums(P / 2, has_sink=True).summary()
    assert half.sink == pytest.approx(0.5, abs=1e-12)
    assert half.entropy == pytest.approx(whole.entropy / 2 + math.log(2), abs=1e-12)
    assert half.distance == pytest.approx(whole.distance, abs=1e-12)
    assert (half.previous, half.first) == pytest.approx((whole.previous / 2, whole.first / 2), abs=1e-12)


def test_across_there_is_no_distance() -> None:
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)
    found = sums(p, crosses=True).summary()
    assert found.first == pytest.approx(1.75 / 3, abs=1e-12)
    assert (found.distance, found.previous, found.induction) == (None, None, None)


def test_a_text_of_one_token_has_no_token_before() -> None:
    found = HeadSums(1, 1, crosses=False, has_sink=False)
    found.add(slice(0, 1), torch.ones(1, 1))
    assert (found.summary().previous, found.summary().first, found.summary().entropy) == (None, None, 0.0)


def test_words_of_several_pieces_get_the_sum_and_give_the_mean() -> None:
    pool = Pool([0, 0, 1, 2], [0, 0, 1, 2])
    for rows in (slice(3, 4), slice(0, 3)):
        pool.add(rows, P[rows])
    expected = [[(1 + 1) / 2, 0, 0], [1, 0, 0], [0.5, 0.25, 0.25]]
    np.testing.assert_allclose(pool.weights(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "most", "expected"), [(3, 8, [0, 1, 2]), (5, 2, [0, 0, 0, 1, 1]), (6, 4, [0, 0, 1, 1, 2, 2])]
)
def test_long_texts_are_drawn_in_equal_parts(n: int, most: int, expected: list[int]) -> None:
    assert parts(range(n), most) == expected


def test_sees_every_head_as_its_weights_are() -> None:
    model, x = build("alibi").double(), tokens(1, 12)
    each = list(range(12))
    found, hidden, cross = see(model, x[0].tolist(), {"all": {"self": (each, each)}}, kinds=("self",))
    assert [(one.layer, one.head) for one in found] == [(layer, head) for layer in range(2) for head in range(4)]
    for one in found:
        expected = attention_weights(model, x, one.layer, heads=[one.head])[0, 0]
        np.testing.assert_allclose(one.maps["all"], expected.numpy(), atol=1e-12)
        assert asdict(one.summary) == pytest.approx(asdict(sums(expected).summary()), abs=1e-12)
    with torch.no_grad():
        assert torch.equal(hidden, model.hidden(x)[0])
    assert cross is None


def test_a_step_is_what_the_model_says_and_where_its_last_layer_looks() -> None:
    model = build("sinusoidal", architecture="encoder_decoder").double()
    source, target = tokens(1, 9, seed=3), tokens(1, 6)
    ids = target[0].tolist()
    found, hidden, cross = see(
        model, ids[:-1], {}, kinds=("cross",), layers=[1], heads=[2], source=source[0].tolist()
    )  # fmt: skip
    assert [(one.kind, one.layer, one.head, dict(one.maps)) for one in found] == [("cross", 1, 2, {})]
    assert cross is not None
    mean = attention_weights(model, target[:, :-1], 1, kind="cross", source=source)[0].mean(0)
    with torch.no_grad():
        p = model(target[:, :-1], source=source)[0].softmax(-1)
    written = steps(model, hidden, cross, ids)
    assert [(step.read, step.chosen) for step in written] == list(zip(ids[:-1], ids[1:], strict=True))
    for place, step in enumerate(written):
        assert step.p == pytest.approx(float(p[place, step.chosen]), abs=1e-12)
        order = [token for token in p[place].argsort(descending=True).tolist() if token != step.chosen]
        assert [token for token, _ in step.others] == order[:3]
        assert [p_other for _, p_other in step.others] == pytest.approx(p[place, order[:3]].tolist(), abs=1e-12)
        assert [j for j, _ in step.sources] == mean[place].argsort(descending=True)[:3].tolist()
        assert [w for _, w in step.sources] == pytest.approx(
            mean[place].sort(descending=True)[0][:3].tolist(), abs=1e-6
        )


def test_two_heads_made_by_hand_that_look_up_what_followed() -> None:
    """The first writes beside each token the one before it; the second looks for the place that has this token there.

    The residual stream has a column for each token, for each token before, and for each position. The first token has none
    before it and looks at itself, so its second occurrence finds its first as well as the token behind that: a half.
    """
    V, n = 8, 6
    d = 2 * V + 2 * n
    model = build(
        "learned", vocab_size=V, d_model=d, n_heads=1, n_kv_heads=1, head_dim=d, d_ff=1, context=2 * n
    ).double()  # fmt: skip
    token, before, place = torch.arange(V), torch.arange(V, 2 * V), torch.arange(2 * V, d)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        model.embedding.weight[token, token] = 1.0
        model.position.weight[torch.arange(2 * n), place] = 1.0
        first, second = (block.attention for block in model.blocks)
        first.query.weight[place, place] = 500.0
        first.key.weight[place[1:], place[:-1]] = 1.0
        first.value.weight[token, token] = first.out.weight[before, token] = 1.0
        second.query.weight[token, token] = 500.0
        second.key.weight[token, before] = 1.0
    scores = induction_scores(model, range(V), length=n, rows=3)
    assert scores == pytest.approx({(0, 0): 0.0, (1, 0): (n - 0.5) / n}, abs=1e-6)


def test_the_induction_score_is_the_mean_of_its_entries() -> None:
    """Against whole weights of the same sequences, which repeat and have no token twice in a copy."""
    model, n, rows = build("rope").double(), 10, 3
    seen: list[torch.Tensor] = []
    hidden = model.hidden

    def spy(x: torch.Tensor, **inputs: object) -> torch.Tensor:
        seen.append(x)
        return hidden(x, **inputs)

    model.hidden = spy  # type: ignore[method-assign]
    scores = induction_scores(model, range(5, VOCAB), length=n, rows=rows, seed=4)
    (x,) = seen
    assert x.shape == (rows, 2 * n)
    assert torch.equal(x[:, :n], x[:, n:])
    assert all(len(set(row.tolist())) == n and min(row.tolist()) >= 5 for row in x)
    for (layer, head), score in scores.items():
        p = attention_weights(model, x, layer, heads=[head])[:, 0]
        by_hand = sum(float(p[b, i, i - n + 1]) for b in range(rows) for i in range(n, 2 * n)) / (rows * n)
        assert score == pytest.approx(by_hand, abs=1e-12)


def test_induction_takes_as_many_different_tokens_as_there_are() -> None:
    with pytest.raises(ConfigError, match="expected 1 to 3 different tokens, got 4"):
        induction_scores(build("rope"), range(3), length=4)
