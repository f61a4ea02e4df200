"""Our schemes and masks against the functions and models of `transformers` that compute the same."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.position.alibi import ALiBi
from ctxlab.model.position.base import POSITIONS, Position
from ctxlab.model.position.p_rope import PRope
from ctxlab.model.position.sinusoidal import sinusoids
from ctxlab.model.transformer import Transformer
from tests.conformance.test_positions import scores, weights
from tests.model.builders import build, small, tokens

transformers = pytest.importorskip("transformers")

models = transformers.models


def make(
    name: str, *, heads: int = 4, head_dim: int = 16, layers: int = 1, causal: bool = True, **settings: Any
) -> Position:
    """A scheme of random parameters."""
    kind = POSITIONS.get(name)
    model = small(n_layers=layers, n_heads=heads, n_kv_heads=heads, head_dim=head_dim)
    made = kind(kind.Config(name=name, **settings), model, 64, causal=causal)
    torch.manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def queries_and_keys(n: int, *, heads: int = 4, head_dim: int = 16, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, heads, n, head_dim, dtype=dtype) for _ in range(2)]


def our_scores(made: Position, q: Tensor, k: Tensor) -> Tensor:
    positions = torch.arange(q.shape[2])
    return scores(made, q.new_zeros(2, len(positions), made.model.d_model), q, k, positions, positions)


def masked(score: Tensor) -> Tensor:
    future = torch.ones(score.shape[-2:], dtype=torch.bool).triu(1)
    return score.masked_fill(future, -torch.inf)


@pytest.mark.parametrize("head_dim", [8, 20, 64])
@pytest.mark.parametrize("p", [0.0, 0.25, 0.3, 0.75, 0.9, 1.0])
def test_p_rope_has_the_frequencies_of_proportional_rope(p: float, head_dim: int) -> None:
    rope = {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": p}
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=rope
    )
    theirs, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["proportional"](config)
    made = make("p_rope", head_dim=head_dim, p=p, theta=500.0)
    assert isinstance(made, PRope)
    assert factor == 1.0
    torch.testing.assert_close(made.frequencies(torch.device("cpu")).float(), theirs, atol=0, rtol=1e-6)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_partial_rope_is_that_of_gpt_neox(fraction: float) -> None:
    neox = models.gpt_neox.modeling_gpt_neox
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": fraction}
    config = transformers.GPTNeoXConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    q, k = queries_and_keys(40, dtype=torch.float32)
    cos, sin = neox.GPTNeoXRotaryEmbedding(config)(q, torch.arange(40)[None])
    assert cos.shape[-1] == int(16 * fraction)
    turned_q, turned_k = neox.apply_rotary_pos_emb(q, k, cos, sin)
    ours = our_scores(make("partial_rope", fraction=fraction, layout="half"), q, k)
    torch.testing.assert_close(ours, masked(turned_q @ turned_k.mT / 4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_partial_rope_is_that_of_gpt_j(fraction: float) -> None:
    """GPT-J turns neighbours."""
    gptj = models.gptj.modeling_gptj
    q, k = queries_and_keys(40, dtype=torch.float32)
    width = int(16 * fraction)
    sin, cos = gptj.create_sinusoidal_positions(40, width)[None].chunk(2, dim=-1)

    def turned(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)  # theirs are (B,T,H,D)
        return torch.cat([gptj.apply_rotary_pos_emb(x[..., :width], sin, cos), x[..., width:]], -1).transpose(1, 2)

    ours = our_scores(make("partial_rope", fraction=fraction, layout="interleaved"), q, k)
    torch.testing.assert_close(ours, masked(turned(q) @ turned(k).mT / 4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_t5_bias_is_that_of_t5(causal: bool) -> None:
    """A decoder's and an encoder's, from the same table."""
    config = transformers.T5Config(d_model=64, d_kv=16, num_heads=4, is_decoder=causal)
    theirs = models.t5.modeling_t5.T5Attention(config, has_relative_attention_bias=True).double()
    made = make("t5", causal=causal).double()
    with torch.no_grad():
        theirs.relative_attention_bias.weight.copy_(made.weight)
        expected = theirs.compute_bias(300, 300)[0]  # (H,T,S)
        positions = torch.arange(300)
        distances = positions[:, None] - positions[None, :]
        found = made.distance_bias(torch.arange(-299, 300), None)[:, distances + 299]
    if causal:
        found, expected = found.tril(), expected.tril()
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("width", [8, 64])
def test_sinusoids_are_those_of_xlm(width: int) -> None:
    theirs = models.xlm.modeling_xlm.create_sinusoidal_embeddings(600, width, torch.empty(600, width))
    torch.testing.assert_close(sinusoids(torch.arange(600), width).float(), theirs, atol=1e-7, rtol=0)


@pytest.mark.parametrize("heads", [4, 6, 12])
@pytest.mark.parametrize("head_dim", [32, 40, 64])
@pytest.mark.parametrize("end", [4096, 131_072, 1_000_000, 2**24])
def test_alibi_far_out_has_the_slopes_of_bloom(end: int, heads: int, head_dim: int) -> None:
    """In fp32, with slopes and a scale that are no powers of two: near the diagonal the bias is small wherever it is."""
    slopes = models.bloom.modeling_bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    model = small(n_heads=heads, n_kv_heads=heads, head_dim=head_dim)
    made, positions = ALiBi(ALiBi.Config(), model, 64), torch.arange(end - 16, end)
    q, k = queries_and_keys(16, heads=heads, head_dim=head_dim, dtype=torch.float32)
    bias = slopes.double()[:, None, None] * (positions[None, :] - positions[:, None])
    expected = masked(q.double() @ k.double().mT / math.sqrt(head_dim) + bias).softmax(-1)
    found = weights(made, torch.zeros(2, 16, 32), q, k, positions, positions)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_memory", [0, 7])
@pytest.mark.parametrize("clamp", ["none", 5])
def test_transformer_xl_is_the_relative_attention_of_xlnet(clamp: str | int, n_memory: int) -> None:
    """XLNet's is Transformer-XL's with its columns of sines before those of cosines; its shift is not ours."""
    T, S = 30, 30 + n_memory
    config = transformers.XLNetConfig(
        d_model=32,
        n_head=2,
        n_layer=1,
        d_inner=8,
        attn_type="uni",
        dropout=0.0,
        clamp_len=-1 if clamp == "none" else clamp,
    )
    theirs = models.xlnet.modeling_xlnet.XLNetModel(config).double().eval()
    core = theirs.layer[0].rel_attn
    made = make("transformer_xl", heads=2, clamp=clamp).double()
    order = torch.cat([torch.arange(0, 32, 2), torch.arange(1, 32, 2)])  # sines, then cosines
    q, k = queries_and_keys(S, heads=2)
    with torch.no_grad():
        core.r_w_bias.copy_(made.u[0, :, 0])
        core.r_r_bias.copy_(made.v[0, :, 0])
        core.r.copy_(made.weight[0][:, order].T.unflatten(1, (2, 16)))
        r = torch.einsum("ibh,hnd->ibnd", theirs.relative_positional_encoding(T, S, bsz=2).double(), core.r)
        steps = torch.arange(S)
        future = (steps[None, :] > steps[n_memory:, None]).double()[:, :, None, None].expand(T, S, 2, 1)
        value = torch.zeros(S, 2, 2, 16, dtype=torch.float64)
        rows, columns = q[:, :, n_memory:].permute(2, 0, 1, 3), k.permute(2, 0, 1, 3)  # (T,B,H,D)
        _, expected = core.rel_attn_core(rows, columns, value, r, attn_mask=future, output_attentions=True)
    found = weights(made, torch.zeros(2, S, 32), q[:, :, n_memory:], k, steps[n_memory:], steps)
    torch.testing.assert_close(found, expected.permute(2, 3, 0, 1), atol=1e-5, rtol=0)  # their sinusoids are fp32


def llama_weights(theirs: nn.Module, layers: int) -> dict[str, Tensor]:
    """A model of Llama's form under our names; the head is the embedding."""
    source = theirs.state_dict()
    found = {"embedding.weight": source["model.embed_tokens.weight"], "norm.weight": source["model.norm.weight"]}
    for n in range(layers):
        block, here = f"model.layers.{n}.", f"blocks.{n}."
        for part, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj")):
            found[f"{here}attention.{part}.weight"] = source[f"{block}self_attn.{name}.weight"]
        for part in ("gate", "up", "down"):
            found[f"{here}feed_forward.{part}.weight"] = source[f"{block}mlp.{part}_proj.weight"]
        found[f"{here}attention_norm.weight"] = source[f"{block}input_layernorm.weight"]
        found[f"{here}feed_forward_norm.weight"] = source[f"{block}post_attention_layernorm.weight"]
    return found


def assert_same_logits(ours: Transformer, theirs: nn.Module, length: int) -> None:
    """On random weights, in fp32."""
    torch.manual_seed(0)
    x = tokens(2, length)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
        ours.load_state_dict(llama_weights(theirs, len(ours.blocks)))
        torch.testing.assert_close(ours(x), theirs.eval()(x).logits, atol=2e-5, rtol=1e-5)


LLAMA_FORM = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip


def test_rope_nope_is_smollm3() -> None:
    """The 4th of 5 layers has no position."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = transformers.SmolLM3Config(num_hidden_layers=5, rope_parameters=rope, **LLAMA_FORM)
    assert config.no_rope_layers == [1, 1, 1, 0, 1]
    scheme = POSITIONS.get("rope_nope").Config(name="rope_nope", theta=500.0, layout="half")
    assert_same_logits(build(scheme, n_layers=5), transformers.SmolLM3ForCausalLM(config), 48)


def test_a_sliding_window_is_mistrals() -> None:
    """11 keys, the query's own among them, at a length of 40."""
    config = transformers.MistralConfig(num_hidden_layers=2, sliding_window=11, **LLAMA_FORM)
    attention = ATTENTIONS.get("sliding_window").Config(name="sliding_window", size=11)
    scheme = POSITIONS.get("rope").Config(name="rope", theta=config.rope_parameters["rope_theta"], layout="half")
    assert_same_logits(build(scheme, attention=attention), transformers.MistralForCausalLM(config), 40)


@pytest.mark.parametrize("layer", [2, 3])
def test_rope_nope_has_the_layers_and_growing_queries_of_llama_4(layer: int) -> None:
    """One attention of each kind, over more steps of the growth than one; theirs turns neighbours."""
    llama4 = models.llama4.modeling_llama4
    config = transformers.Llama4TextConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        use_qk_norm=False,
        attn_temperature_tuning=True,
        floor_scale=8,
        attn_scale=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    theirs = llama4.Llama4TextAttention(config, layer)
    assert bool(theirs.use_rope) == (layer != 3)
    torch.manual_seed(0)
    x = torch.randn(2, 40, 32)
    positions = torch.arange(40)
    mask = torch.zeros(40, 40).masked_fill(positions[:, None] < positions[None, :], -torch.inf)[None, None]
    made = make("rope_nope", layers=4, query_scale=0.3, scale_span=8, theta=500.0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
        _, expected = theirs(x, llama4.Llama4TextRotaryEmbedding(config)(x, positions[None]), mask)
        q, k = (part(x).unflatten(-1, (4, 16)).transpose(1, 2) for part in (theirs.q_proj, theirs.k_proj))
        state, _ = made.prepare(x, layer, None)
        tables = made.tables(positions, torch.float32)
        found = (made.query(q, tables, state) @ made.key(k, tables, state).mT * made.scale + mask).softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["full", "sliding_window", "chunked"])
def test_a_sink_is_that_of_gpt_oss(name: str) -> None:
    """Their dense attention, two queries a key, under each of our masks."""
    config = ATTENTIONS.get(name).Config(**{"name": name, "sink": True} | ({} if name == "full" else {"size": 11}))
    mechanism = ATTENTIONS.get(name)(config, small(), 0).double()
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 40, 8, dtype=torch.float64) for h in (4, 2, 2))
    assert mechanism.sink is not None
    with torch.no_grad():
        mechanism.sink.normal_(std=2)
        mask = torch.zeros(40, 40, dtype=torch.float64).masked_fill(~mechanism.visible(40, 40, causal=True), -torch.inf)
        theirs = SimpleNamespace(sinks=mechanism.sink, num_key_value_groups=2, training=False)
        gpt_oss = models.gpt_oss.modeling_gpt_oss
        expected, _ = gpt_oss.eager_attention_forward(theirs, q, k, v, mask, scaling=8**-0.5)  # (B,T,H,D)
        found, _ = mechanism.attend(q, k, v, scale=8**-0.5, causal=True)
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-9, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 11, 40, 64])
def test_who_sees_whom_is_what_masks_there_say(size: int) -> None:
    """Without a causal mask their window of W is one of W + 1 here: it reaches W keys to each side."""
    masks = transformers.masking_utils
    i, j = torch.arange(40)[:, None], torch.arange(40)[None, :]

    def visible(name: str, size: int, causal: bool) -> Tensor:
        mechanism = ATTENTIONS.get(name)(ATTENTIONS.get(name).Config(name=name, size=size), small(), 0)
        return mechanism.visible(40, 40, causal=causal)

    window = masks.sliding_window_causal_mask_function(size)(0, 0, i, j)
    assert torch.equal(visible("sliding_window", size, True), window)
    both = masks.sliding_window_bidirectional_mask_function(size)(0, 0, i, j)
    assert torch.equal(visible("sliding_window", size + 1, False), both)
    chunk = masks.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))(0, 0, i, j)
    assert torch.equal(visible("chunked", size, True), chunk)
