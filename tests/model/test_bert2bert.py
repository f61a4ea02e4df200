"""Two BERTs behind our contract: Hugging Face's own logits, ours with their weights, caches, folders of weights, refusals."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from ctxlab.errors import ConfigError, IncompatibleError, UndefinedBeyondTraining
from ctxlab.model import count
from ctxlab.model.base import build_model, read_parts
from ctxlab.model.beam import beam_search
from ctxlab.model.bert2bert import Bert2Bert, Decoder, Encoder
from ctxlab.model.bert_weights import check_folder
from ctxlab.model.config import Bert2BertConfig
from ctxlab.model.generation import DecodingConfig, decode
from tests.model.builders import tokens

transformers = pytest.importorskip("transformers")

B, S, T, V = 3, 19, 13, 61
LENGTHS = torch.tensor([S, 7, 1])
SEEN = torch.arange(S) < LENGTHS[:, None]  # (B,S)
SIZES = {"d_model": 32, "n_layers": 2, "n_encoder_layers": 3, "n_heads": 4, "d_ff": 48, "dropout": 0.0}
CONF = Path(__file__).parents[2] / "conf" / "model" / "bert2bert.yaml"


def drawn(model: nn.Module, seed: int = 0) -> Any:
    """In eval mode, everything random and large enough that what is attended to matters, biases and norms too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if name.endswith("LayerNorm.weight") else 0.0, std=0.2)
    return model.eval()


def settings(**changes: Any) -> Bert2BertConfig:
    return Bert2BertConfig(**{**SIZES, "attention_dropout": 0.0} | changes)


def build(config: Bert2BertConfig | None = None, source_vocab_size: int = V) -> Bert2Bert:
    model: Bert2Bert = drawn(
        Bert2Bert(config or settings(), vocab_size=V, context=S, source_vocab_size=source_vocab_size)
    )
    return model


def hf_config(**changes: Any) -> Any:
    return transformers.BertConfig(
        **{
            "vocab_size": V,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": S + 4,
        }
        | changes
    )


def two_berts() -> Any:
    return drawn(
        transformers.EncoderDecoderModel(
            encoder=transformers.BertModel(hf_config(num_hidden_layers=3), add_pooling_layer=False),
            decoder=transformers.BertLMHeadModel(hf_config(is_decoder=True, add_cross_attention=True)),
        ),
        seed=1,
    )


def same(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_it_has_the_logits_of_hugging_faces_own_two_berts_and_so_has_ours(tmp_path: Path) -> None:
    """From a saved folder, sources padded: the library's EncoderDecoderModel, these two halves, and our encoder-decoder."""
    theirs = two_berts()
    theirs.save_pretrained(tmp_path)
    model = build(settings(pretrained=str(tmp_path), pretrained_tokens=True))
    model.take_pretrained()
    source, x = tokens(B, S), tokens(B, T, seed=2)
    with torch.no_grad():
        expected = theirs(input_ids=source, attention_mask=SEEN.long(), decoder_input_ids=x).logits
        assert expected.std() > 0.5
        same(model(x, source=source, source_lengths=LENGTHS), expected)
        same(model.as_ours()(x, source=source, source_lengths=LENGTHS), expected)


def test_ours_with_its_weights_has_its_logits_with_another_vocabulary_for_sources() -> None:
    model = build(source_vocab_size=50)
    source, x = tokens(B, S, vocab_size=50), tokens(B, T, seed=2)
    with torch.no_grad():
        ours = model.as_ours()
        assert (ours.vocab_size, ours.source_vocab_size) == (V, 50)
        expected = model(x, source=source, source_lengths=LENGTHS)
        same(ours(x, source=source, source_lengths=LENGTHS), expected)
        same(ours(x, source=source), model(x, source=source))


def test_the_lines_of_the_books_need_a_decoders_config_and_the_sources_mask() -> None:
    """A BertModel as it comes takes an encoder's states and ignores them; the decoder here does not, and sees no padding."""
    torch.manual_seed(0)
    config = hf_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain = drawn(transformers.BertModel(config))
    encoder, decoder = drawn(Encoder(config)), drawn(Decoder(config))
    source, x = tokens(B, S), tokens(B, T, seed=2)
    other = torch.where(SEEN, (source + 1) % V, source)
    padding = torch.where(SEEN, source, (source + 1) % V)
    mask = SEEN.long()
    with torch.no_grad():
        ignored = [plain(x, encoder_hidden_states=encoder(s, mask)).last_hidden_state for s in (source, other)]
        assert torch.equal(*ignored)
        read = [decoder(x, encoder(s, mask), mask) for s in (source, other, padding)]
        assert (read[0] - read[1]).abs().amax(-1).min() > 1e-2
        same(read[2], read[0])
        unmasked = [decoder(x, encoder(s, mask)) for s in (source, padding)]
        assert (unmasked[0] - unmasked[1]).abs()[1:].max() > 1e-2, "without the mask, padding is read"
        later = x.clone()
        later[:, 8] = (later[:, 8] + 1) % V
        ahead = decoder(later, encoder(source, mask), mask)
        same(ahead[:, :8], read[0][:, :8])


def test_cached_equals_uncached() -> None:
    """In any chunks, with rows taken twice, left out and in another order."""
    model = build()
    source, x, rows = tokens(B, S), tokens(B, S, seed=2), torch.tensor([2, 0, 2, 1, 1])
    with torch.no_grad():
        encoded, cache = model.encode(source, LENGTHS), model.new_cache()
        cache.keep(torch.tensor([0, 1, 2]))
        first = torch.cat([model(part, encoded=encoded, cache=cache) for part in (x[:, :5], x[:, 5:6], x[:, 6:13])], 1)
        held = count.kv_cache_bytes(model.config, "none", "none", length=13, rows=B, source=S)
        assert (cache.length, cache.bytes) == (13, held)
        cache.keep(rows)
        kept = encoded.keep(rows)
        rest = torch.cat([model(part, encoded=kept, cache=cache) for part in x[rows, 13:].split(1, dim=1)], dim=1)
        whole = model(x, source=source, source_lengths=LENGTHS)
    same(first, whole[:, :13], 1e-4)
    same(rest, whole[rows, 13:], 1e-4)
    with pytest.raises(UndefinedBeyondTraining, match=r"position 19: BERT's positions are defined up to 18 only"):
        model(x[rows, :1], encoded=kept, cache=cache)


def test_sources_decoded_side_by_side_are_decoded_one_by_one() -> None:
    model = build()
    source, start = tokens(B, S), [[5]] * B
    with torch.no_grad():
        together = model.encode(source, LENGTHS)
        alone = [model.encode(source[r : r + 1, :n]) for r, n in enumerate(LENGTHS.tolist())]
    greedy, beam = DecodingConfig(max_new_tokens=9, temperature=0), DecodingConfig(max_new_tokens=9, num_beams=3)
    written = decode(model, start, greedy, stop_ids=[7], encoded=together)
    assert written == [decode(model, start[:1], greedy, stop_ids=[7], encoded=one)[0] for one in alone]
    assert len({tuple(one) for one in written}) > 1, "what is written depends on the source"
    found = beam_search(model, start, beam, stop_ids=[7], encoded=together)
    for row, one in zip(found, alone, strict=True):
        (expected,) = beam_search(model, start[:1], beam, stop_ids=[7], encoded=one)
        assert [h.tokens for h in row] == [h.tokens for h in expected]
        assert [h.log_p for h in row] == pytest.approx([h.log_p for h in expected], abs=1e-4)


def test_losses_are_torchs() -> None:
    """Label smoothing and the head's layer and bias, a chunk of tokens at a time; gradients too."""
    model = build()
    source, x, targets = tokens(B, S), tokens(B, T, seed=2), tokens(B, T, seed=3)
    targets[1, 4:] = -100
    model.loss_chunk = 5
    loss, nats = model.losses(model.hidden(x, source=source, source_lengths=LENGTHS), targets, 0.1)
    logits = model(x, source=source, source_lengths=LENGTHS).flatten(0, 1)
    smoothed, plain = (
        nn.functional.cross_entropy(logits, targets.flatten(), reduction="none", label_smoothing=e) for e in (0.1, 0.0)
    )
    same(loss.flatten(), smoothed, 1e-4)
    same(nats.flatten(), plain, 1e-4)
    parameters = {n: p for n, p in model.named_parameters() if "token_type" not in n}
    ours = torch.autograd.grad(loss.sum(), list(parameters.values()))
    theirs = torch.autograd.grad(smoothed.sum(), list(parameters.values()))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=name)


def test_its_size_is_counted_without_building_it_and_said_in_its_file() -> None:
    parts = read_parts({"model": yaml.safe_load(CONF.read_text()), "position": "none", "attention": "none"})
    for source in (None, 700):
        with torch.device("meta"):
            model = build_model(parts, vocab_size=500, context=40, source_vocab_size=source)
        counted = count.parameters(*parts, vocab_size=500, context=40, source_vocab_size=source)
        assert (counted.total, counted.without_embeddings) == (
            model.n_parameters(),
            model.n_parameters(embeddings=False),
        )
    said = re.search(r"without embeddings: ([\d,]+)", CONF.read_text())
    assert said is not None
    # The bias of the head's logits is one number a token.
    assert int(said[1].replace(",", "")) == counted.without_embeddings - 500


def test_a_seed_gives_the_same_weights_and_a_checkpoint_brings_back_all() -> None:
    def made(seed: int) -> Bert2Bert:
        torch.manual_seed(seed)
        return Bert2Bert(settings(), vocab_size=V, context=S)

    one, again, other = (made(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], again[name]) for name in one)
    matrices = [name for name, weight in one.items() if weight.ndim == 2]
    assert not any(torch.equal(one[name], other[name]) for name in matrices)
    assert all(0.015 < one[name].std() < 0.025 for name in matrices if one[name].numel() > 500)
    with torch.device("meta"):
        empty = Bert2Bert(settings(), vocab_size=V, context=S)
    empty.load_state_dict(one, assign=True)
    whole = made(3).eval()
    source, x = tokens(B, S), tokens(B, T, seed=2)
    with torch.no_grad():
        assert torch.equal(empty.eval()(x, source=source), whole(x, source=source))


def test_one_bert_begins_both_halves(tmp_path: Path) -> None:
    """Cross-attention stays as drawn, as do embeddings of tokens unless they are said to be the same; positions are cut."""
    theirs = drawn(transformers.BertForMaskedLM(hf_config()), seed=1)
    theirs.save_pretrained(tmp_path)
    bert = theirs.bert.state_dict()
    for same_tokens in (False, True):
        config = settings(n_encoder_layers=2, pretrained=str(tmp_path), pretrained_tokens=same_tokens)
        model = build(config)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        model.take_pretrained()
        for half in (model.encoder.bert, model.decoder.bert):
            for name, weight in half.state_dict().items():
                if "crossattention" in name:
                    assert torch.equal(weight, before[f"decoder.bert.{name}"])
                elif name == "embeddings.word_embeddings.weight":
                    assert torch.equal(weight, bert[name]) == same_tokens
                else:
                    assert torch.equal(weight, bert[name][: len(weight)]), name
        head = theirs.cls.predictions
        assert torch.equal(model.decoder.transform.dense.weight, head.transform.dense.weight)
        assert torch.equal(model.decoder.bias, head.bias) == same_tokens
    assert model.encoder.bert.embeddings.position_embeddings.weight.shape[0] == S < S + 4


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    transformers.BertModel(hf_config()).save_pretrained(folder)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"n_heads": 8}, rf"model.n_heads: the BERT in {folder} has 4, here are 8; use model.n_heads=4"),
        (
            {"n_encoder_layers": 3},
            r"model.n_encoder_layers: the BERT in .* has 2, here are 3; use model.n_encoder_layers=2",
        ),
    ]
    for changes, said in wrong:
        with pytest.raises(ConfigError, match=said):
            build(settings(**{"n_encoder_layers": 2, "pretrained": str(folder)} | changes)).take_pretrained()
    fitting = settings(n_encoder_layers=2, pretrained=str(folder))
    with pytest.raises(ConfigError, match=r"context: the BERT in .* has 23 positions, here are 24; use context=23"):
        Bert2Bert(fitting, vocab_size=V, context=24).take_pretrained()
    other = fitting.model_copy(update={"pretrained_tokens": True})
    with pytest.raises(ConfigError, match=r"model.pretrained_tokens: .* has 61 tokens and the tokenizer 50; use false"):
        Bert2Bert(other, vocab_size=V, context=S, source_vocab_size=50).take_pretrained()
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"model_type": "gpt2"}))
    with pytest.raises(
        ConfigError, match=r"model.pretrained: .* holds gpt2; expected bert, or an encoder-decoder of two"
    ):
        check_folder(folder)
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model.pretrained: .* has no .safetensors; other formats run code"):
        check_folder(folder)
    with pytest.raises(ConfigError, match=r"model.pretrained: .* has no config.json that can be read"):
        check_folder(tmp_path)


def test_what_it_is_not_made_for() -> None:
    model = build()
    with pytest.raises(IncompatibleError, match=r"decoding.cache: BERT's positions are part of the keys"):
        model.new_streaming_cache(sinks=1, window=4)
    for key, how in (
        ("trainer.compile", {"packed": False, "compiled": True, "recompute": "none"}),
        ("trainer.recompute", {"packed": False, "compiled": False, "recompute": "block"}),
    ):
        with pytest.raises(IncompatibleError, match=key):
            Bert2Bert.check_training(model.config, **how)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"d_model \(32\) must be divisible by n_heads \(6\), whose widths add up to it"
    ):
        settings(n_heads=6)
    with pytest.raises(ValueError, match=r"pretrained_tokens: there is no folder"):
        settings(pretrained_tokens=True)


def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"^model: bert2bert is made of .*; pip install 'ctxlab\[hf\]'$"):
        Bert2Bert.check_installed()
