"""Closed forms against what is really built, run and kept; the sizes that conf/model/ states."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ctxlab.errors import IncompatibleError
from ctxlab.model import count
from ctxlab.model.attention.full import Full
from ctxlab.model.attention.sliding_window import SlidingWindow
from ctxlab.model.base import ARCHITECTURES
from ctxlab.model.cache import KVCache
from ctxlab.model.config import LSTMConfig, ModelConfig
from ctxlab.model.encoder_decoder import EncoderDecoder
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.remake import POLICIES, Recompute
from ctxlab.model.transformer import Transformer
from ctxlab.profiling.trace import Live
from tests.model.builders import build, small, tokens

CONF = Path(__file__).parents[2] / "conf" / "model"
SIZES = ["pico", "micro", "nano", "tiny", "mini", "small", "medium", "large", "1b", "vaswani_base", "chapter_example"]
FOREIGN = ["bert2bert"]  # of another library's parts: test_bert2bert.py
RECURRENT = {"lstm": "tiny", "lstm_nano": "nano"}  # and the decoder whose parameters it has


def read(name: str, **changes: Any) -> ModelConfig:
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    settings.pop("defaults", None)
    return ModelConfig(**settings | changes)


def on_meta(config: ModelConfig, position: str, vocab_size: int, context: int) -> Transformer:
    kind: Any = ARCHITECTURES.get(config.architecture)
    with torch.device("meta"):
        return kind(
            config, POSITIONS.get(position).Config(name=position), Full.Config(), vocab_size=vocab_size, context=context
        )


def test_every_size_is_there() -> None:
    assert sorted(path.stem for path in CONF.glob("*.yaml")) == sorted([*SIZES, *RECURRENT, *FOREIGN])


@pytest.mark.parametrize("name", SIZES)
def test_a_size_has_the_parameters_that_its_file_states(name: str) -> None:
    text = (CONF / f"{name}.yaml").read_text()
    config = read(name)
    assert config.name == name
    stated = re.search(r"Parameters without embeddings: ([\d,]+)\.", text)
    assert stated is not None
    expected = int(stated[1].replace(",", ""))
    counted = count.parameters(
        config, POSITIONS.get("nope").Config(name="nope"), Full.Config(), vocab_size=1000, context=256
    )
    assert counted.without_embeddings == expected
    assert on_meta(config, "nope", 1000, 256).n_parameters(embeddings=False) == expected


@pytest.mark.parametrize(("name", "like"), RECURRENT.items())
def test_a_recurrent_model_has_the_parameters_that_its_file_states_and_nearly_those_of_a_decoder(
    name: str, like: str
) -> None:
    text = (CONF / f"{name}.yaml").read_text()
    config = LSTMConfig(**yaml.safe_load(text))
    assert config.name == name
    counted = count.parameters(config, "none", "none", vocab_size=1000, context=256)
    decoder = count.parameters(
        read(like), POSITIONS.get("rope").Config(name="rope"), Full.Config(), vocab_size=1000, context=256
    )
    assert f"Parameters without embeddings: {counted.without_embeddings:,}.\n" in text
    assert f"{like} has {decoder.without_embeddings:,}: " in text
    assert counted.without_embeddings == pytest.approx(decoder.without_embeddings, rel=0.02)
    assert counted.embeddings == decoder.embeddings


@pytest.mark.parametrize("name", ["small", "medium", "large", "1b"])
def test_a_stated_total_names_its_vocabulary(name: str) -> None:
    stated = re.search(r"([\d,]+) tokens: ([\d,]+) parameters", (CONF / f"{name}.yaml").read_text())
    assert stated is not None
    vocab_size, total = (int(number.replace(",", "")) for number in stated.groups())
    assert on_meta(read(name), "rope", vocab_size, 256).n_parameters() == total


def test_small_becomes_gpt2_by_settings() -> None:
    """124,439,808: the size of the released GPT-2 small."""
    config = read("small", activation="gelu_tanh", norm="layernorm", bias=True)
    assert on_meta(config, "learned", 50_257, 1024).n_parameters() == 124_439_808
    counted = count.parameters(
        config, POSITIONS.get("learned").Config(name="learned"), Full.Config(), vocab_size=50_257, context=1024
    )
    assert (counted.total, counted.embeddings) == (124_439_808, (50_257 + 1024) * 768)


def test_the_original_has_65_million() -> None:
    """Table 3 of the paper gives 65M; its about 37,000 tokens by 512, counted out, are 63.1M (65M would be 40,700 tokens).

    Written out: attention with its biases, feed-forward and norms of 6 + 6 layers of 512, the matrix once.
    """
    config = read("vaswani_base")
    attention = 4 * (512 * 512 + 512)
    feed_forward = 512 * 2048 + 2048 + 2048 * 512 + 512
    encoder, decoder = attention + feed_forward + 2 * 1024, 2 * attention + feed_forward + 3 * 1024
    expected = 6 * encoder + 6 * decoder + 37_000 * 512
    assert expected == 63_082_496
    assert on_meta(config, "sinusoidal", 37_000, 512).n_parameters() == expected
    counted = count.parameters(
        config, POSITIONS.get("sinusoidal").Config(name="sinusoidal"), Full.Config(), vocab_size=37_000, context=512
    )
    assert counted.total == expected
    assert expected == pytest.approx(65e6, rel=0.03)
    assert f"{expected:,} parameters" in (CONF / "vaswani_base.yaml").read_text()


POST = {"norm": "layernorm", "norm_place": "post"}
BOTH_WAYS = ["learned", "nope", "p_rope", "partial_rope", "pope", "rope", "sinusoidal", "t5"]


@pytest.mark.parametrize("position", BOTH_WAYS)
@pytest.mark.parametrize(
    "settings",
    [
        {"architecture": "encoder"},
        {"architecture": "encoder", "head_layer": True, "activation": "gelu", "bias": True, **POST},
        {"architecture": "encoder_decoder", "n_encoder_layers": 3},
        {"architecture": "encoder_decoder", "share_embeddings": False, "activation": "geglu_tanh", "tie_embeddings": False},
        {"architecture": "encoder_decoder", "activation": "relu", "bias": True, "embedding_norm": True, **POST},
    ],
)  # fmt: skip
def test_parameters_of_encoders_are_those_built(position: str, settings: dict[str, Any]) -> None:
    attention = Full.Config(sink="bias" in settings)
    model = build(position, attention=attention, **settings)
    config = POSITIONS.get(position).Config(name=position)
    counted = count.parameters(model.config, config, attention, vocab_size=model.vocab_size, context=model.context)
    assert counted.total == model.n_parameters()
    assert counted.without_embeddings == model.n_parameters(embeddings=False)


def test_a_vocabulary_of_the_source() -> None:
    config = small(architecture="encoder_decoder", share_embeddings=False)
    rope = POSITIONS.get("rope").Config(name="rope")
    model = EncoderDecoder(config, rope, Full.Config(), vocab_size=50, context=8, source_vocab_size=70)
    counted = count.parameters(config, rope, Full.Config(), vocab_size=50, context=8, source_vocab_size=70)
    assert (counted.total, counted.embeddings) == (model.n_parameters(), 120 * 32)
    with pytest.raises(IncompatibleError, match=r"^model.share_embeddings: the source has 70 tokens and the target 50"):
        EncoderDecoder(
            small(architecture="encoder_decoder"), rope, Full.Config(), vocab_size=50, context=8, source_vocab_size=70
        )


@pytest.mark.parametrize("position", ["rope", "t5", "pope"])
def test_cache_bytes_of_an_encoder_decoder(position: str) -> None:
    """63 tokens behind a source of 20: the source's keys and values count from the first token on."""
    model: Any = build(position, architecture="encoder_decoder", n_encoder_layers=1)
    cache = model.new_cache()
    with torch.no_grad():
        encoded = model.encode(tokens(3, 20))
        for start in range(0, 63, 7):
            model(tokens(3, 63)[:, start : start + 7], encoded=encoded, cache=cache)
    expected = count.kv_cache_bytes(model.config, model.position.config, Full.Config(), length=63, rows=3, source=20)
    assert cache.bytes == expected


@pytest.mark.parametrize("position", POSITIONS.names())
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation": "gelu", "norm": "layernorm", "bias": True, "embedding_norm": True},
        {"tie_embeddings": False, "head_dim": 10, "n_kv_heads": 1, "bias": True, "norm": "rmsnorm"},
    ],
)
def test_parameters_are_those_built(position: str, settings: dict[str, Any]) -> None:
    attention = Full.Config(sink="bias" in settings)
    model = build(position, attention=attention, **settings)
    counted = count.parameters(
        model.config, model.position.config, attention, vocab_size=model.vocab_size, context=model.context
    )
    assert counted.total == model.n_parameters()
    assert counted.without_embeddings == model.n_parameters(embeddings=False)


@pytest.mark.parametrize("position", POSITIONS.names())
def test_cache_bytes_are_those_held(position: str) -> None:
    model = build(position)
    cache = KVCache(model.config.n_layers)
    with torch.no_grad():
        for start in range(0, 63, 7):
            model(tokens(3, 63)[:, start : start + 7], cache=cache)
    expected = count.kv_cache_bytes(model.config, model.position.config, Full.Config(), length=63, rows=3)
    assert cache.bytes == expected


def test_flops_by_hand() -> None:
    """1 layer, d 4, 2 heads of 2 in 1 group, d_ff 3, vocabulary 5, context 7, written out product by product."""
    config = ModelConfig(d_model=4, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=2, d_ff=3)
    q, k, v, out = 4 * 4, 4 * 2, 4 * 2, 4 * 4
    feed_forward, head = 3 * 4 * 3, 4 * 5
    scores_and_sums = 2 * (2 * 2 * 7)  # two products of 2 heads x 2 columns with 7 tokens
    forward = 2 * (q + k + v + out + feed_forward + head) + 2 * scores_and_sums
    assert count.flops_per_token(config, Full.Config(), vocab_size=5, context=7) == 3 * forward


def test_flops_of_an_encoder_decoder_by_hand() -> None:
    """2 + 1 layers of the same blocks as above, 14 source tokens for 7 target tokens: product by product, over 7 tokens."""
    config = ModelConfig(
        architecture="encoder_decoder", d_model=4, n_layers=1, n_encoder_layers=2, n_heads=2, n_kv_heads=1, head_dim=2, d_ff=3
    )  # fmt: skip
    q, k, v, out = 4 * 4, 4 * 2, 4 * 2, 4 * 4
    feed_forward, head = 3 * 4 * 3, 4 * 5
    encoder = 2 * 14 * (2 * (q + k + v + out + feed_forward) + 2 * 2 * (2 * 2 * 14))
    decoder = 7 * (2 * (q + k + v + out + feed_forward) + 2 * 2 * (2 * 2 * 7))
    cross = 7 * 2 * (q + out) + 14 * 2 * (k + v) + 7 * 2 * 2 * (2 * 2 * 14)
    forward = encoder + decoder + cross + 7 * 2 * head
    found = count.flops_per_token(config, Full.Config(), vocab_size=5, context=7, source=14)
    assert found * 7 == pytest.approx(3 * forward, rel=1e-12)


@pytest.mark.parametrize("size", [1, 3, 40])
def test_flops_of_a_window_that_looks_both_ways(size: int) -> None:
    config, context = small(architecture="encoder"), 24
    window = SlidingWindow.Config(size=size)
    mechanism = SlidingWindow(window, config, 0)
    most = int(mechanism.visible(context, context, causal=False).sum(1).max())
    found = SlidingWindow.flops(window, config, context, 0, causal=False)
    assert found == 4 * config.n_heads * config.head_dim * most


def kept_per_layer_and_token(position: str, precision: count.Precision, policy: Recompute, **settings: Any) -> float:
    """Bytes alive behind the forward pass, the casts of weights left out.

    From models of 1 and 3 layers, so that what stands around the blocks falls out; of a decoder's layers, an encoder's too.
    """
    sizes = []
    for n_layers in (1, 3):
        model = build(position, n_layers=n_layers, d_model=64, d_ff=96, **settings).train()
        model.recompute = policy
        source: Any = {"source": tokens(2, 128, seed=2)} if model.reads_source else {}
        cast = re.compile({"none": r"^blocks\.", "selective": r"^blocks\..*attention\.", "block": r"^$"}[policy])
        casts = 2 * sum(p.numel() for name, p in model.named_parameters() if cast.search(name) and p.ndim == 2)
        with Live() as live, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            weights = [p.detach() for p in model.parameters()]  # seen now, so that they fall out too
            before = sum(live.now.values())
            hidden = model.hidden(tokens(2, 128), **source)
        sizes.append(sum(live.now.values()) - before - (casts if precision == "bf16" else 0))
        del weights
        del hidden
    return (sizes[1] - sizes[0]) / 2 / (2 * 128)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation": "gelu", "norm": "layernorm", "bias": True, "dropout": 0.1, "n_kv_heads": 4},
        {"norm_place": "post", "norm": "layernorm", "bias": True, "activation": "relu"},
        {"norm_place": "post", "activation": "gelu_tanh"},
        {"architecture": "encoder", "activation": "geglu_tanh"},
        {"architecture": "encoder_decoder", "n_encoder_layers": 2},
    ],
)
@pytest.mark.parametrize("position", ["nope", "rope"])
def test_kept_bytes_are_what_autograd_keeps(
    position: str, settings: dict[str, Any], precision: count.Precision, policy: Recompute
) -> None:
    config = small(d_model=64, d_ff=96, **settings)
    crosses = config.architecture == "encoder_decoder"
    expected = count.kept_bytes_per_token(
        config, POSITIONS.get(position).Config(name=position), precision, crosses=crosses, recompute=policy
    )
    if crosses and policy != "block":  # with a source as long
        expected += 2 * config.n_kv_heads * config.head_dim * (4 if precision == "fp32" else 2)
    assert kept_per_layer_and_token(position, precision, policy, context=128, **settings) == expected


FREE = 1 << 20  # of a memory that is judged by


def chosen(memory: float, *, rows: int = 1, standing: int = 0, setting: Any = "auto") -> Recompute:
    """What `auto` becomes for `rows` of 64 tokens of a small model where `memory` bytes may be needed."""
    return count.chosen_recompute(
        setting, small(d_model=64, d_ff=96), POSITIONS.get("nope").Config(name="nope"), Full.Config(), vocab_size=64,
        context=64, rows=rows, precision="fp32", loss_chunk=64, standing=standing, memory=memory / count.JUDGED_SHARE,
    )  # fmt: skip


def needed(policy: Recompute, rows: int = 1) -> int:
    nope = POSITIONS.get("nope").Config(name="nope")
    sizes: Any = {"vocab_size": 64, "context": 64, "rows": rows, "recompute": policy, "loss_chunk": 64}
    return count.activation_bytes(small(d_model=64, d_ff=96), nope, Full.Config(), **sizes)


def test_auto_is_the_cheapest_policy_that_fits_beside_what_stands() -> None:
    sizes = [needed(policy) for policy in POLICIES]
    assert sizes == sorted(sizes, reverse=True)
    for policy, size in zip(POLICIES, sizes, strict=True):
        assert chosen(size + 1) == policy
        assert chosen(size + FREE + 1, standing=FREE) == policy  # what stands takes its part of the memory
        assert chosen(needed(policy, rows=3) + 1, rows=3) == policy
    assert chosen(sizes[0] + 1, standing=FREE) == chosen(sizes[0] + 1, rows=3) == "block"  # where nothing fits
    assert chosen(1, setting="selective") == "selective"  # what is asked for is not judged


def test_bytes_that_stand_by_hand() -> None:
    assert count.standing_bytes(100, 100, states=2) == 100 * (4 + 4 + 8)  # pure fp32 and AdamW: 16 a weight
    assert count.standing_bytes(100, 10, states=1) == 400 + 10 * (4 + 4)


def test_rows_at_once_are_those_asked_for_that_a_step_has() -> None:
    assert [count.rows_at_once(4, 4096, context) for context in (512, 1024, 2048, 8192)] == [4, 4, 2, 1]
    assert count.rows_at_once("auto", 4096, 64) == 1
