"""BERT, T5, two BERTs with cross-attention and torch.nn.Transformer are settings of ours: random weights, the same numbers.

Sources are padded throughout. What T5 scales differently is folded into the copied weights: its queries are not divided by
sqrt(head_dim), its tied head is by sqrt(d_model). BERT's token types are one constant, added to the table of positions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctxlab.model.encoder_decoder import EncoderDecoder
from ctxlab.model.position.t5 import T5
from tests.model.builders import build, tokens
from tests.model.test_oracles import randomised

B, S, T = 3, 19, 13
LENGTHS = torch.tensor([S, 7, 1])
SEEN = torch.arange(S) < LENGTHS[:, None]  # (B,S)
BERT = {
    "norm": "layernorm",
    "norm_place": "post",
    "norm_eps": 1e-12,
    "activation": "gelu",
    "bias": True,
    "embedding_norm": True,
    "n_kv_heads": 4,
}


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def bert_weights(theirs: nn.Module, cross: bool = False) -> dict[str, Tensor]:
    """The stack of a BertModel under our names."""
    source = theirs.state_dict()
    table = source["embeddings.position_embeddings.weight"] + source["embeddings.token_type_embeddings.weight"][0]
    weights = {"embedding.weight": source["embeddings.word_embeddings.weight"], "position.weight": table}
    for end in ("weight", "bias"):
        weights[f"embedding_norm.{end}"] = source[f"embeddings.LayerNorm.{end}"]
        for n in range(theirs.config.num_hidden_layers):
            block, here = f"encoder.layer.{n}.", f"blocks.{n}."
            kinds = {"attention": "attention"} | ({"cross_attention": "crossattention"} if cross else {})
            for mine, theirs_name in kinds.items():
                for part in ("query", "key", "value"):
                    weights[f"{here}{mine}.{part}.{end}"] = source[f"{block}{theirs_name}.self.{part}.{end}"]
                weights[f"{here}{mine}.out.{end}"] = source[f"{block}{theirs_name}.output.dense.{end}"]
                weights[f"{here}{mine}_norm.{end}"] = source[f"{block}{theirs_name}.output.LayerNorm.{end}"]
            weights[f"{here}feed_forward.up.{end}"] = source[f"{block}intermediate.dense.{end}"]
            weights[f"{here}feed_forward.down.{end}"] = source[f"{block}output.dense.{end}"]
            weights[f"{here}feed_forward_norm.{end}"] = source[f"{block}output.LayerNorm.{end}"]
    return weights


def head_weights(theirs: nn.Module) -> dict[str, Tensor]:
    """BERT's head under our names; its matrix is the embedding's."""
    source = theirs.state_dict()
    weights = {"head_layer.bias": source["cls.predictions.bias"]}
    for end in ("weight", "bias"):
        weights[f"head_layer.dense.{end}"] = source[f"cls.predictions.transform.dense.{end}"]
        weights[f"head_layer.norm.{end}"] = source[f"cls.predictions.transform.LayerNorm.{end}"]
    return weights


def bert_config(**settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=S,
        **settings,
    )


@pytest.mark.parametrize("packed", [False, True])
def test_bert(packed: bool) -> None:
    """Its masked language model: hidden states and logits of every token that is none of padding, alone and packed."""
    transformers = pytest.importorskip("transformers")
    theirs = randomised(transformers.BertForMaskedLM(bert_config()))
    ours = build("learned", context=S, architecture="encoder", head_layer=True, **BERT)
    ours.load_state_dict(bert_weights(theirs.bert) | head_weights(theirs))
    x = tokens(B, S)
    with torch.no_grad():
        out = theirs(x, attention_mask=SEEN.long(), output_hidden_states=True)
        if packed:
            row = torch.cat([x[0, :7], x[1, :7], x[2, :1], x[0, :3]])[None]
            hidden = ours.hidden(row, segments=((7, 7, 1),))
            same(hidden[0, 7:15], torch.cat([out.hidden_states[-1][1, :7], out.hidden_states[-1][2, :1]]))
        else:
            hidden = ours.hidden(x, lengths=LENGTHS)
            same(hidden[SEEN], out.hidden_states[-1][SEEN])
            same(ours.logits(hidden)[SEEN], out.logits[SEEN])
            nats = ours.nats(hidden, x)
            expected = nn.functional.cross_entropy(out.logits.flatten(0, 1), x.flatten(), reduction="none")
            same(nats[SEEN], expected.view(B, S)[SEEN])


def test_two_berts_with_cross_attention() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = randomised(
        transformers.EncoderDecoderModel(
            encoder=transformers.BertModel(bert_config(), add_pooling_layer=False),
            decoder=transformers.BertLMHeadModel(bert_config(is_decoder=True, add_cross_attention=True)),
        )
    )
    ours = build("learned", context=S, architecture="encoder_decoder", share_embeddings=False, head_layer=True, **BERT)
    weights = bert_weights(theirs.decoder.bert, cross=True) | head_weights(theirs.decoder)
    ours.load_state_dict(weights | {f"encoder.{k}": v for k, v in bert_weights(theirs.encoder).items()})
    source, x = tokens(B, S), tokens(B, T, seed=2)
    with torch.no_grad():
        expected = theirs(input_ids=source, attention_mask=SEEN.long(), decoder_input_ids=x).logits
        same(ours(x, source=source, source_lengths=LENGTHS), expected)
        assert (ours(x, source=source.flip(1), source_lengths=LENGTHS) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("gated", [False, True])
def test_t5(gated: bool) -> None:
    """T5 with its tied head and ReLU, and T5 1.1 with gated GELU and a head of its own; 3 layers write what 2 have read."""
    transformers = pytest.importorskip("transformers")
    theirs = randomised(
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=61,
                d_model=24,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_decoder_layers=3,
                num_heads=4,
                relative_attention_num_buckets=8,
                relative_attention_max_distance=12,
                feed_forward_proj="gated-gelu" if gated else "relu",
                tie_word_embeddings=not gated,
                scale_decoder_outputs=not gated,
            )
        )
    )
    ours = build(
        T5.Config(buckets=8, max_distance=12),
        architecture="encoder_decoder",
        d_model=24,
        head_dim=8,
        n_layers=3,
        n_encoder_layers=2,
        n_kv_heads=4,
        norm_eps=1e-6,
        activation="geglu_tanh" if gated else "relu",
        tie_embeddings=not gated,
    )
    source = theirs.state_dict()
    weights = {"embedding.weight": source["shared.weight"]}
    if gated:
        weights["head.weight"] = source["lm_head.weight"]
    for half, here, n_layers in (("encoder", "encoder.", 2), ("decoder", "", 3)):
        last = f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        weights[f"{here}position.weight"] = source[last]
        weights[f"{here}norm.weight"] = source[f"{half}.final_layer_norm.weight"]
        for n in range(n_layers):
            kinds = [("attention", "SelfAttention")]
            kinds += [("cross_attention", "EncDecAttention")] if half == "decoder" else []
            block = f"{half}.block.{n}.layer."
            for place, (mine, name) in enumerate(kinds):
                for part, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
                    scale = 8**0.5 if part == "query" else 1.0
                    weights[f"{here}blocks.{n}.{mine}.{part}.weight"] = (
                        source[f"{block}{place}.{name}.{letter}.weight"] * scale
                    )
                weights[f"{here}blocks.{n}.{mine}_norm.weight"] = source[f"{block}{place}.layer_norm.weight"]
            dense = f"{block}{len(kinds)}.DenseReluDense."
            for part, name in (
                (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")) if gated else (("up", "wi"), ("down", "wo"))
            ):
                weights[f"{here}blocks.{n}.feed_forward.{part}.weight"] = source[f"{dense}{name}.weight"]
            weights[f"{here}blocks.{n}.feed_forward_norm.weight"] = source[f"{block}{len(kinds)}.layer_norm.weight"]
    if not gated:
        weights["norm.weight"] = weights["norm.weight"] * 24**-0.5
    ours.load_state_dict(weights)
    read, x = tokens(B, S), tokens(B, T, seed=2)
    with torch.no_grad():
        expected = theirs(input_ids=read, attention_mask=SEEN.long(), decoder_input_ids=x).logits
        same(ours(x, source=read, source_lengths=LENGTHS), expected)


@pytest.mark.parametrize("place", ["pre", "post"])
def test_torch_transformer(place: str) -> None:
    """torch's adds a norm behind post-norm stacks, which the original has not: it is taken off there."""
    theirs = nn.Transformer(32, 4, 2, 3, 48, dropout=0.1, batch_first=True, norm_first=place == "pre")
    ours = build(
        "nope",
        architecture="encoder_decoder",
        n_layers=3,
        n_encoder_layers=2,
        n_kv_heads=4,
        norm="layernorm",
        norm_place=place,
        activation="relu",
        bias=True,
    )
    assert isinstance(ours, EncoderDecoder)
    theirs.encoder.use_nested_tensor = False  # whose padding comes back as zeros
    if place == "post":
        theirs.encoder.norm = theirs.decoder.norm = None
    randomised(theirs)
    source = theirs.state_dict()
    weights = {"embedding.weight": ours.embedding.weight}
    for end in ("weight", "bias"):
        for half, here, n_layers in (("encoder", "encoder.", 2), ("decoder", "", 3)):
            if place == "pre":
                weights[f"{here}norm.{end}"] = source[f"{half}.norm.{end}"]
            for n in range(n_layers):
                block, mine = f"{half}.layers.{n}.", f"{here}blocks.{n}."
                kinds = [("attention", "self_attn")]
                kinds += [("cross_attention", "multihead_attn")] if half == "decoder" else []
                for place_of, (kind, name) in enumerate(kinds, 1):
                    thirds = source[f"{block}{name}.in_proj_{end}"].chunk(3)
                    for part, value in zip(("query", "key", "value"), thirds):
                        weights[f"{mine}{kind}.{part}.{end}"] = value
                    weights[f"{mine}{kind}.out.{end}"] = source[f"{block}{name}.out_proj.{end}"]
                    weights[f"{mine}{kind}_norm.{end}"] = source[f"{block}norm{place_of}.{end}"]
                weights[f"{mine}feed_forward.up.{end}"] = source[f"{block}linear1.{end}"]
                weights[f"{mine}feed_forward.down.{end}"] = source[f"{block}linear2.{end}"]
                weights[f"{mine}feed_forward_norm.{end}"] = source[f"{block}norm{len(kinds) + 1}.{end}"]
    ours.load_state_dict(weights)
    read, x = tokens(B, S), tokens(B, T, seed=2)
    with torch.no_grad():
        expected = theirs(
            ours.embedding(read),
            ours.embedding(x),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(T),
            src_key_padding_mask=~SEEN,
            memory_key_padding_mask=~SEEN,
            tgt_is_causal=True,
        )
        same(ours.hidden(x, source=read, source_lengths=LENGTHS), expected)
