"""The decoder as a whole: packing, recomputation, dropout, precision, initialization, refusals."""

from __future__ import annotations

import pytest
import torch

from ctxlab.errors import UndefinedBeyondTraining
from ctxlab.model.cache import KVCache
from ctxlab.model.remake import POLICIES, Recompute
from ctxlab.model.transformer import Transformer
from tests.model.builders import VOCAB, build, tokens


def gradients(model: Transformer, **inputs: object) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    x = tokens(2, 33)
    hidden = model.hidden(x[:, :-1], **inputs)  # type: ignore[arg-type]
    loss = model.nats(hidden, x[:, 1:]).sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("position", ["rope", "t5", "fox"])
@pytest.mark.parametrize("segments", [None, ((10, 22), (32,))])
@pytest.mark.parametrize("policy", ["selective", "block"])
def test_recomputed_gradients_are_equal(position: str, segments: object, policy: Recompute) -> None:
    model = build(position, dropout=0.1).train()
    torch.manual_seed(3)
    loss, kept = gradients(model, segments=segments)
    model.recompute = policy
    torch.manual_seed(3)
    again, recomputed = gradients(model, segments=segments)
    assert again == loss
    assert all(torch.equal(recomputed[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("activation", "norm"),
    [
        ("gelu", "layernorm"),
        ("gelu_tanh", "rmsnorm"),
        ("swiglu", "layernorm"),
        ("geglu_tanh", "rmsnorm"),
        ("relu", "rmsnorm"),
    ],
)
def test_recomputed_gradients_are_equal_under_autocast(activation: str, norm: str) -> None:
    model = build("rope", activation=activation, norm=norm).train()
    found = {}
    for policy in POLICIES:
        model.recompute = policy
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[policy] = gradients(model)[1]
    for policy in POLICIES:
        assert all(torch.equal(found[policy][name], found["none"][name]) for name in found["none"])


def test_nats_are_those_of_the_logits() -> None:
    model = build("rope")
    x = tokens(2, 33)
    targets = x[:, 1:].clone()
    targets[0, 3:7] = -100
    with torch.no_grad():
        logits = model(x[:, :-1])
        model.loss_chunk = 10
        nats = model.nats(model.hidden(x[:, :-1]), targets)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(nats.flatten(), expected, atol=1e-5, rtol=0)


def test_padding_on_the_right_changes_no_real_token() -> None:
    model = build("rope")
    x = tokens(2, 20)
    other = x.clone()
    other[0, 12:] = (other[0, 12:] + 1) % VOCAB
    lengths = torch.tensor([12, 20])
    with torch.no_grad():
        assert torch.equal(model(x, lengths=lengths)[0, :12], model(other, lengths=lengths)[0, :12])


def test_packed_padding_is_no_document() -> None:
    """What stands behind a row's documents reaches none of them, and the documents reach no other row."""
    model = build("rope")
    x = tokens(2, 20)
    other = x.clone()
    other[0, 15:] = (other[0, 15:] + 1) % VOCAB
    segments = ((7, 8), (20,))
    with torch.no_grad():
        one, two = model(x, segments=segments), model(other, segments=segments)
    assert torch.equal(one[0, :15], two[0, :15])
    assert torch.equal(one[1], two[1])


def test_packed_gradients_are_those_of_the_documents() -> None:
    model = build("t5").double()
    x = tokens(1, 24)
    together = torch.autograd.grad(model(x, segments=((9, 15),)).square().sum(), list(model.parameters()))
    alone = model(x[:, :9]).square().sum() + model(x[:, 9:]).square().sum()
    for a, b in zip(together, torch.autograd.grad(alone, list(model.parameters()))):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_head_dim_and_groups_are_free() -> None:
    """512 wide with 6 heads of 64, 3 key-value heads: the matrices have just these shapes."""
    model = build("rope", d_model=512, n_heads=6, n_kv_heads=3, head_dim=64, n_layers=1)
    attention = model.blocks[0].attention
    shapes = [tuple(linear.weight.shape) for linear in (attention.query, attention.key, attention.value, attention.out)]
    assert shapes == [(384, 512), (192, 512), (192, 512), (512, 384)]
    assert model(tokens(1, 5)).shape == (1, 5, VOCAB)


def test_grouped_heads_equal_repeated_ones() -> None:
    """Two key-value heads for four queries are four key-value heads of which two and two are the same."""
    grouped = build("rope", n_kv_heads=2)
    whole = build("rope", n_kv_heads=4)
    weights = grouped.state_dict()
    for name in weights:
        if ".attention.key" in name or ".attention.value" in name:
            weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    whole.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(grouped(tokens(2, 30)), whole(tokens(2, 30)), atol=1e-5, rtol=0)


def test_dropout_acts_in_training_only() -> None:
    model = build("rope", dropout=0.5)
    x = tokens(1, 10)
    assert torch.equal(model(x), model(x))
    model.train()
    torch.manual_seed(0)
    one = model(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), one)
    assert not torch.equal(model(x), one)


def test_same_seed_same_weights() -> None:
    one, two = (build("t5").state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_initialization() -> None:
    """std 0.02, 0.02 / sqrt(2 n_layers) where the residual stream is written to; norms 1, biases 0."""
    fresh = build("rope", d_model=128, n_layers=8, n_heads=4, n_kv_heads=4, d_ff=512, bias=True, norm="layernorm")
    fresh.initialize()
    block = fresh.blocks[3]
    for linear, std in (
        (block.attention.query, 0.02),
        (block.feed_forward.up, 0.02),
        (block.attention.out, 0.005),
        (block.feed_forward.down, 0.005),
    ):
        n = linear.weight.numel()
        assert abs(linear.weight.std().item() / std - 1) < 4 / (2 * n) ** 0.5  # four standard errors of a deviation
        assert (linear.bias == 0).all()
    assert (block.attention_norm.weight == 1).all()


def test_a_fresh_model_is_near_uniform() -> None:
    torch.manual_seed(0)
    model = build("rope")
    model.initialize()
    x = tokens(4, 33)
    nats = model.nats(model.hidden(x[:, :-1]), x[:, 1:]).mean().item()
    assert abs(nats - torch.tensor(float(VOCAB)).log().item()) < 0.05


def test_autocast_is_near_fp32() -> None:
    model = build("rope", n_layers=4)
    model.initialize()
    x = tokens(2, 65)
    with torch.no_grad():
        exact = model.nats(model.hidden(x[:, :-1]), x[:, 1:])
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.hidden(x[:, :-1])
            rounded = model.nats(hidden, x[:, 1:])
    assert hidden.dtype == torch.bfloat16
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.01


def test_a_model_cast_to_bf16_keeps_exact_angles() -> None:
    """Tables come from the positions in float64 at every forward: casting the weights rounds no angle."""
    model = build("rope").bfloat16()
    far = torch.arange(100_000, 100_064)
    turns = model.position.tables(far, torch.bfloat16)
    frequencies = torch.tensor([10_000.0 ** (-2 * k / 8) for k in range(4)], dtype=torch.float64)
    exact = torch.polar(torch.ones(64, 4, dtype=torch.float64), far[:, None] * frequencies)
    assert (turns.to(torch.complex128) - exact).abs().max() < 1e-7


def test_weights_have_no_duplicates_and_no_tables() -> None:
    tied, untied = build("rope").state_dict(), build("rope", tie_embeddings=False).state_dict()
    assert set(untied) - set(tied) == {"head.weight"}
    assert not any(name.startswith("position") for name in tied)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (((5, 5),), "segments: expected one list of lengths for each of 2 rows, got 1"),
        (((5, 6), (10,)), r"segments: expected lengths >= 1 that add up to at most 10, got \(5, 6\)"),
        (((5, 0), (10,)), r"segments: expected lengths >= 1 that add up to at most 10, got \(5, 0\)"),
    ],
)
def test_wrong_segments(segments: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("rope")(tokens(2, 10), segments=segments)


def test_a_packed_batch_has_no_cache() -> None:
    with pytest.raises(ValueError, match="a packed batch has no cache"):
        build("rope")(tokens(1, 10), segments=((10,),), cache=KVCache(2))


def test_learned_positions_end() -> None:
    model = build("learned", context=16)
    model(tokens(1, 16))
    message = r"position 16: learned positions are defined up to 15 only \(trained at context 16\)"
    with pytest.raises(UndefinedBeyondTraining, match=message):
        model(tokens(1, 17))
    with pytest.raises(UndefinedBeyondTraining, match=message):
        model(tokens(1, 20), segments=((17, 3),))
    model(tokens(1, 20), segments=((16, 4),))  # each document starts at 0
    cache = KVCache(2)
    model(tokens(1, 16), cache=cache)
    with pytest.raises(UndefinedBeyondTraining, match=message):
        model(tokens(1, 1), cache=cache)


@pytest.mark.parametrize("place", ["pre", "post"])
def test_initialization_of_an_encoder_decoder(place: str) -> None:
    """Three parts of each of 4 decoder blocks write to its stream, two of each of 8 to the encoder's; post-norm is Xavier's."""
    fresh = build(
        "rope", architecture="encoder_decoder", n_layers=4, n_encoder_layers=8, d_model=128, n_heads=4, n_kv_heads=4,
        d_ff=512, norm_place=place, activation="relu",
    )  # fmt: skip
    fresh.initialize()
    decoder, encoder = fresh.blocks[1], fresh.encoder.blocks[1]  # type: ignore[union-attr]
    post = place == "post"
    for matrix, std in (
        (fresh.embedding, 128**-0.5 if post else 0.02),
        (decoder.cross_attention.query, 256**-0.5 * 2**0.5 if post else 0.02),
        (decoder.cross_attention.out, 256**-0.5 * 2**0.5 if post else 0.02 / 12**0.5),
        (decoder.feed_forward.down, 640**-0.5 * 2**0.5 if post else 0.02 / 12**0.5),
        (encoder.feed_forward.down, 640**-0.5 * 2**0.5 if post else 0.02 / 16**0.5),
    ):
        n = matrix.weight.numel()
        assert abs(matrix.weight.std().item() / std - 1) < 4 / (2 * n) ** 0.5
    assert (fresh.norm is None) == post
