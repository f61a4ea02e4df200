"""GPT-2, BLOOM and Llama of `transformers` are settings of ours: their random weights give the same logits here.

The golden tables of rope, alibi and t5 come from the same library.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ctxlab.model.config import ModelConfig
from ctxlab.model.position.alibi import ALiBi, slopes
from ctxlab.model.position.rope import Rope, inverse_frequencies
from ctxlab.model.position.t5 import bucket, bucket_starts
from ctxlab.model.transformer import Transformer
from tests.model.builders import build, tokens

transformers = pytest.importorskip("transformers")


def randomised(model: nn.Module) -> nn.Module:
    """Everything random, biases and norms too, so that nothing is left out unseen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name or "ln_" in name else 0.0, std=0.2)
    return model.eval()


def assert_same(ours: Transformer, theirs: nn.Module, weights: dict[str, Tensor]) -> None:
    ours.load_state_dict(weights)  # strict: every parameter of ours has its counterpart
    x = tokens(2, 32, vocab_size=ours.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-5, rtol=0)


def test_gpt2() -> None:
    theirs = randomised(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=3, resid_pdrop=0.1)
        )
    )
    ours = build(
        "learned", context=32, d_model=24, n_heads=3, n_kv_heads=3, d_ff=96, activation="gelu_tanh", norm="layernorm", bias=True
    )  # fmt: skip
    source = theirs.transformer.state_dict()
    weights = {"embedding.weight": source["wte.weight"], "position.weight": source["wpe.weight"]}
    weights |= {f"norm.{end}": source[f"ln_f.{end}"] for end in ("weight", "bias")}
    for n in range(2):
        block, here = f"h.{n}.", f"blocks.{n}."
        for end in ("weight", "bias"):  # their Conv1D holds matrices the other way round
            parts = source[f"{block}attn.c_attn.{end}"].t().chunk(3, dim=0)
            weights |= {f"{here}attention.{part}.{end}": value for part, value in zip(("query", "key", "value"), parts)}
            weights[f"{here}attention.out.{end}"] = source[f"{block}attn.c_proj.{end}"].t()
            weights[f"{here}feed_forward.up.{end}"] = source[f"{block}mlp.c_fc.{end}"].t()
            weights[f"{here}feed_forward.down.{end}"] = source[f"{block}mlp.c_proj.{end}"].t()
            weights[f"{here}attention_norm.{end}"] = source[f"{block}ln_1.{end}"]
            weights[f"{here}feed_forward_norm.{end}"] = source[f"{block}ln_2.{end}"]
    assert_same(ours, theirs, weights)


@pytest.mark.parametrize("n_heads", [4, 6])
def test_bloom(n_heads: int) -> None:
    width = 8 * n_heads
    theirs = randomised(
        transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=61, hidden_size=width, n_layer=2, n_head=n_heads)
        )
    )
    ours = build(
        "alibi", d_model=width, n_heads=n_heads, n_kv_heads=n_heads, d_ff=4 * width, activation="gelu_tanh",
        norm="layernorm", bias=True, embedding_norm=True,
    )  # fmt: skip
    source = theirs.transformer.state_dict()
    weights = {"embedding.weight": source["word_embeddings.weight"]}
    for end in ("weight", "bias"):
        weights[f"embedding_norm.{end}"] = source[f"word_embeddings_layernorm.{end}"]
        weights[f"norm.{end}"] = source[f"ln_f.{end}"]
        for n in range(2):
            block, here = f"h.{n}.", f"blocks.{n}."
            mixed = source[f"{block}self_attention.query_key_value.{end}"]
            parts = mixed.unflatten(0, (n_heads, 3, 8)).unbind(1)  # q, k and v of each head side by side
            for part, value in zip(("query", "key", "value"), parts):
                weights[f"{here}attention.{part}.{end}"] = value.flatten(0, 1)
            weights[f"{here}attention.out.{end}"] = source[f"{block}self_attention.dense.{end}"]
            weights[f"{here}feed_forward.up.{end}"] = source[f"{block}mlp.dense_h_to_4h.{end}"]
            weights[f"{here}feed_forward.down.{end}"] = source[f"{block}mlp.dense_4h_to_h.{end}"]
            weights[f"{here}attention_norm.{end}"] = source[f"{block}input_layernorm.{end}"]
            weights[f"{here}feed_forward_norm.{end}"] = source[f"{block}post_attention_layernorm.{end}"]
    assert_same(ours, theirs, weights)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_llama(layout: str) -> None:
    theirs = randomised(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=61,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                rms_norm_eps=1e-5,
                rope_theta=500.0,
                tie_word_embeddings=False,
            )
        )
    )
    ours = build(Rope.Config(theta=500.0, layout=layout), head_dim=16, tie_embeddings=False)  # type: ignore[arg-type]
    source = theirs.state_dict()
    weights = {
        "embedding.weight": source["model.embed_tokens.weight"],
        "norm.weight": source["model.norm.weight"],
        "head.weight": source["lm_head.weight"],
    }
    for n in range(2):
        block, here = f"model.layers.{n}.", f"blocks.{n}."
        for part, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj")):
            weights[f"{here}attention.{part}.weight"] = source[f"{block}self_attn.{name}.weight"]
        for part in ("query", "key"):
            if layout == "interleaved":  # their pairs (k, k + D/2) become neighbours
                halves = weights[f"{here}attention.{part}.weight"].unflatten(0, (-1, 2, 8))
                weights[f"{here}attention.{part}.weight"] = halves.transpose(1, 2).flatten(0, 2)
        for part in ("gate", "up", "down"):
            weights[f"{here}feed_forward.{part}.weight"] = source[f"{block}mlp.{part}_proj.weight"]
        weights[f"{here}attention_norm.weight"] = source[f"{block}input_layernorm.weight"]
        weights[f"{here}feed_forward_norm.weight"] = source[f"{block}post_attention_layernorm.weight"]
    assert_same(ours, theirs, weights)


def test_rope_angles() -> None:
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=64, rope_theta=10_000.0)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    positions = torch.arange(512)
    cos, sin = theirs(torch.zeros(1), positions[None])  # float32 angles: good to 512 * 2^-24
    model = ModelConfig(d_model=64, n_layers=1, n_heads=1)
    turns = Rope(Rope.Config(), model, 512).tables(positions, torch.float32)
    torch.testing.assert_close(
        inverse_frequencies(64, 1e4, torch.device("cpu")).float(), theirs.inv_freq, atol=0, rtol=1e-6
    )
    torch.testing.assert_close(turns.real.repeat(1, 2), cos[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(turns.imag.repeat(1, 2), sin[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 8, 12, 16, 20])
def test_alibi_slopes_and_bias(n_heads: int) -> None:
    bloom = transformers.models.bloom.modeling_bloom
    theirs = bloom.build_alibi_tensor(torch.ones(1, 64), n_heads, torch.float32)[:, 0]  # (H,S): slope * key position
    torch.testing.assert_close(torch.tensor(slopes(n_heads)), theirs[:, 1], atol=0, rtol=1e-6)
    scheme = ALiBi(ALiBi.Config(), ModelConfig(d_model=8 * n_heads, n_layers=1, n_heads=n_heads), 64)
    positions = torch.arange(64)
    q, k = scheme.tables(positions, torch.float32)
    zero = torch.zeros(1, n_heads, 64, 8)
    product = scheme.query(zero, (q, k), None) @ scheme.key(zero, (q, k), None).mT * scheme.scale  # (1,H,T,S)
    rows = (theirs[:, None, :] - theirs[:, :, None])[None]
    torch.testing.assert_close(product, rows, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (64, 256)])
def test_t5_buckets(buckets: int, max_distance: int, bidirectional: bool) -> None:
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    distances = torch.arange(-4096, 4097)
    expected = theirs(-distances, bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance)
    starts = bucket_starts(buckets, max_distance, bidirectional=bidirectional)
    assert torch.equal(bucket(distances, starts, bidirectional), expected)
