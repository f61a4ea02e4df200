"""What becomes of another run's weights: rows found again by their tokens, another scheme's parameters, what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch

from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.byte import Byte
from ctxlab.data.tokenizers.sides import Tokenizers
from ctxlab.errors import ConfigError
from ctxlab.model.attention.full import Full
from ctxlab.model.base import ARCHITECTURES, Model, build_model, read_parts
from ctxlab.model.config import Bert2BertConfig
from ctxlab.model.encoder_decoder import EncoderDecoder
from ctxlab.model.position import sinusoidal
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.position.rope import Rope
from ctxlab.model.transformer import Transformer
from ctxlab.train.initial import Begun, Initial, begin, shared_rows
from tests.model.builders import build, small, tokens

BYTES = Byte(Byte.Config())
JOINT_BYTES = Tokenizers.joint(BYTES)


class Listed(Tokenizer):
    """Pieces as they are listed behind pad, bos, eos and mask."""

    def __init__(self, *pieces: bytes, sentinels: int = 0, special: Sequence[int] = (0, 1, 2, 3)) -> None:
        pad, bos, eos, mask = special
        config = Tokenizer.Config(name="listed", sentinels=sentinels)
        super().__init__(config, [b""] * 4 + list(pieces), pad=pad, bos=bos, eos=eos, mask=mask)

    @classmethod
    def make(cls, config: Any, sample: Iterable[str]) -> Tokenizer:
        raise NotImplementedError

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError

    def files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def restore(cls, config: Any, files: dict[str, bytes]) -> Tokenizer:
        raise NotImplementedError


OLD = Listed(b"a", b"b", b"a", b"ab", sentinels=2)  # ids 4 to 7, sentinel 0 is 9 and sentinel 1 is 8


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (OLD, None),
        (Listed(b"a", b"b", b"a", b"ab", sentinels=4), [0, 1, 2, 3, 4, 5, 6, 7, -1, -1, 8, 9]),
        (Listed(b"ab", b"c", b"a", b"b"), [0, 1, 2, 3, 7, -1, 4, 5]),
        (Listed(b"a", b"a", b"a", b"b"), [0, 1, 2, 3, 4, 6, -1, 5]),
        (Listed(b"a", b"b", special=(3, 2, 1, 0)), [3, 2, 1, 0, 4, 5]),
    ],
    ids=["the same", "more sentinels", "another order", "the third of its kind", "other special ids"],
)
def test_a_token_is_found_again_by_its_piece_or_its_part(new: Tokenizer, expected: list[int] | None) -> None:
    found = shared_rows(OLD, new)
    assert (found if found is None else found.tolist()) == expected


def test_sentinels_of_real_tokenizers_keep_their_numbers() -> None:
    some, more = BYTES.with_sentinels(3), BYTES.with_sentinels(5)
    assert (some.vocab_size, more.vocab_size, more.config.sentinels) == (263, 265, 5)
    assert more.with_sentinels(5) is more
    index = shared_rows(some, more)
    assert index is not None
    assert index.tolist() == [*range(260), -1, -1, 260, 261, 262]
    assert [int(index[more.sentinel_id(k)]) for k in range(3)] == [some.sentinel_id(k) for k in range(3)]


@pytest.mark.parametrize("tied", [True, False])
def test_rows_go_with_their_tokens_and_new_ones_are_the_mean(tied: bool) -> None:
    """Logits over the old tokens are those of the old model; a new token has the mean of all old logits."""
    new = Listed(b"ab", b"c", b"a", b"b", b"a", b"d", sentinels=3)
    theirs = build(vocab_size=OLD.vocab_size, tie_embeddings=tied)
    model = build(vocab_size=new.vocab_size, tie_embeddings=tied, seed=5)
    begun = begin(model, Initial(theirs.state_dict(), "rope", Tokenizers.joint(OLD)), Tokenizers.joint(new))
    assert begun.rows == {"kept": 10, "new": 3, "dropped": 0}
    index = torch.tensor([0, 1, 2, 3, 7, -1, 4, 5, 6, -1, -1, 8, 9])
    kept = index >= 0
    old_ids = tokens(2, 9, vocab_size=OLD.vocab_size)
    new_ids = torch.stack([torch.nonzero(index == int(token))[0, 0] for token in old_ids.flatten()]).view_as(old_ids)
    expected, found = theirs(old_ids), model(new_ids)
    torch.testing.assert_close(found[..., kept], expected[..., index[kept]], atol=1e-5, rtol=0)
    for fresh in torch.nonzero(~kept)[:, 0]:
        torch.testing.assert_close(found[..., fresh], expected.mean(-1), atol=1e-5, rtol=0)
    head = "embedding.weight" if tied else "embedding.weight and head.weight"
    assert begun.lines == [
        f"init: of {head} 10 rows kept by their tokens, 3 new, each the mean of the run's"
    ]  # fmt: skip


def test_a_tokenizer_with_little_in_common_is_refused() -> None:
    said = r"init: of the 4 pieces that the run has learned, only 1 are among the 3 of tokenizer=listed; leave the tokenizer out"
    with pytest.raises(ConfigError, match=said):
        begin(
            build(vocab_size=7),
            Initial(build(vocab_size=10).state_dict(), "rope", Tokenizers.joint(OLD)),
            Tokenizers.joint(Listed(b"b", b"x", b"y")),
        )


@pytest.mark.parametrize(
    ("before", "now", "dropped", "new"),
    [
        ("rope", "nope", {}, {}),
        ("rope", "alibi", {}, {}),
        ("rope", "t5", {}, {"position.weight": (32, 4)}),
        ("learned", "rope", {"position.weight": (64, 32)}, {}),
        ("t5", "learned", {"position.weight": (32, 4)}, {"position.weight": (64, 32)}),
        ("kerple", "fox", {"position.a": (4,), "position.p": (4,)},
         {"position.offset": (2, 4), "position.weight": (2, 4, 32)}),
    ],
)  # fmt: skip
def test_another_scheme_begins_afresh_and_all_else_is_as_it_was(
    before: str, now: str, dropped: dict[str, Any], new: dict[str, Any]
) -> None:
    theirs, model, fresh = build(before), build(now, seed=3), build(now, seed=3)
    begun = begin(model, Initial(theirs.state_dict(), before, Tokenizers.joint(BYTES)), Tokenizers.joint(BYTES))
    assert (begun.dropped, begun.new, begun.rows) == (dropped, new, {})
    for name, weight in model.state_dict().items():
        source = fresh if name.startswith("position.") else theirs
        assert torch.equal(weight, source.state_dict()[name]), name
    assert [line.partition(" position")[0] for line in begun.lines] == [
        *(["init: left behind"] if dropped else []),
        *(["init: new, and drawn as in a fresh model,"] if new else []),
    ]


def test_the_buckets_of_t5_begin_afresh_where_they_mean_other_distances() -> None:
    theirs = Initial(build("t5").state_dict(), "t5", Tokenizers.joint(BYTES), causal=True)
    assert begin(build("t5"), theirs, Tokenizers.joint(BYTES)) == Begun()
    for model in (build("t5", prefix=True, seed=3), build("t5", architecture="encoder", seed=3)):
        assert list(begin(model, theirs, Tokenizers.joint(BYTES)).new) == ["position.weight"]
        assert not torch.equal(model.position.weight, theirs.weights["position.weight"])
    assert (
        begin(
            build("rope", prefix=True),
            Initial(build().state_dict(), "rope", Tokenizers.joint(BYTES), causal=True),
            Tokenizers.joint(BYTES),
        )
        == Begun()
    )


def test_both_stacks_of_an_encoder_decoder_change_their_scheme() -> None:
    settings: dict[str, Any] = {"architecture": "encoder_decoder"}
    theirs, model = build("t5", **settings), build("rope", **settings)
    begun = begin(model, Initial(theirs.state_dict(), "t5", None), Tokenizers.joint(BYTES))
    assert sorted(begun.dropped) == ["encoder.position.weight", "position.weight"]


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ({"n_layers": 1}, r"init: the weights do not fit this model: blocks.1.attention.key.weight is 16 x 32 there, absent"),
        ({"d_ff": 64}, r"blocks.0.feed_forward.down.weight is 32 x 48 there, 32 x 64 here, and 5 more differ"),
        ({"context": 128},
         r"^context: the positions that the run has learned end at 64; use context=64 or position=rope$"),
    ],
)  # fmt: skip
def test_what_would_be_lost_in_silence_is_refused(here: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        begin(
            build("learned", **here),
            Initial(build("learned").state_dict(), "learned", Tokenizers.joint(BYTES)),
            Tokenizers.joint(BYTES),
        )


def test_nothing_is_said_where_all_was_taken_over() -> None:
    begun = begin(
        build(seed=2), Initial(build().state_dict(), "rope", Tokenizers.joint(BYTES)), Tokenizers.joint(BYTES)
    )
    assert (begun, begun.facts, begun.lines) == (Begun(), {}, [])


def translator(said: Tokenizers, seed: int) -> EncoderDecoder:
    torch.manual_seed(seed)
    config = small(architecture="encoder_decoder", share_embeddings=False)
    sizes = {"vocab_size": said.target.vocab_size, "source_vocab_size": said.source.vocab_size}
    return EncoderDecoder(config, Rope.Config(), Full.Config(), **sizes, context=64)


def test_each_side_finds_its_own_tokens_again() -> None:
    """Vocabularies of their own, of one size: the same pieces mean nothing from one side to the other."""
    before = Tokenizers(OLD, Listed(b"b", b"a", b"c", b"d", sentinels=2))
    ours = Tokenizers(Listed(b"ab", b"a", b"b", b"a"), Listed(b"a", b"new", b"b", b"d"))
    theirs, model = translator(before, 0), translator(ours, 1)
    begun = begin(model, Initial(theirs.state_dict(), "rope", before), ours)
    assert begun.rows == {"kept": 8 + 7, "new": 1, "dropped": 2 + 3}
    assert set(begun.rows_of) == {"embedding.weight", "encoder.embedding.weight"}
    found, moved = theirs.state_dict(), model.state_dict()
    sources, targets = found["encoder.embedding.weight"], found["embedding.weight"]
    assert torch.equal(moved["encoder.embedding.weight"], sources[[0, 1, 2, 3, 7, 4, 5, 6]])
    assert torch.equal(moved["embedding.weight"][[0, 1, 2, 3, 4, 6, 7]], targets[[0, 1, 2, 3, 5, 4, 7]])
    torch.testing.assert_close(moved["embedding.weight"][5], targets.mean(0), atol=1e-7, rtol=0)


def test_two_matrices_of_one_vocabulary_are_moved_alike() -> None:
    before, ours = Tokenizers.joint(OLD), Tokenizers.joint(Listed(b"ab", b"a", b"b", b"a"))
    theirs, model = translator(before, 0), translator(ours, 1)
    begun = begin(model, Initial(theirs.state_dict(), "rope", before), ours)
    assert begun.rows == {"kept": 8, "new": 0, "dropped": 2}
    for name in ("embedding.weight", "encoder.embedding.weight"):
        assert torch.equal(model.state_dict()[name], theirs.state_dict()[name][[0, 1, 2, 3, 7, 4, 5, 6]])


def two_berts(vocab_size: int, seed: int, context: int = 16) -> Model:
    """Every weight drawn: a bias and a norm too."""
    pytest.importorskip("transformers")
    from ctxlab.model.bert2bert import Bert2Bert

    torch.manual_seed(seed)
    config = Bert2BertConfig(d_model=16, n_layers=1, n_encoder_layers=1, n_heads=2, d_ff=24)
    model = Bert2Bert(config, vocab_size=vocab_size, context=context).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("fresh", [(), (b"c", b"d")], ids=["of one size", "two more"])
def test_two_berts_find_their_tokens_again(fresh: tuple[bytes, ...]) -> None:
    """The same text in other ids, read and written, has the logits that it had; a new token has the mean of all."""
    new = Listed(b"ab", b"b", b"a", b"a", *fresh, sentinels=2)
    index = torch.tensor([0, 1, 2, 3, 7, 5, 4, 6, *[-1] * len(fresh), 8, 9])
    theirs, model = two_berts(OLD.vocab_size, 0), two_berts(new.vocab_size, 1)
    begun = begin(model, Initial(theirs.state_dict(), None, Tokenizers.joint(OLD)), Tokenizers.joint(new))
    assert begun.rows == {"kept": 10, "new": len(fresh), "dropped": 0}
    kept = index >= 0
    here = {int(index[token]): token for token in range(len(index))}
    source, target = tokens(3, 7, vocab_size=OLD.vocab_size), tokens(3, 5, vocab_size=OLD.vocab_size, seed=2)
    lengths = torch.tensor([7, 4, 1])
    expected = theirs(target, source=source, source_lengths=lengths)
    found = model(target.clone().apply_(here.get), source=source.clone().apply_(here.get), source_lengths=lengths)
    torch.testing.assert_close(found[..., kept], expected[..., index[kept]], atol=1e-5, rtol=0)
    for token in torch.nonzero(~kept)[:, 0]:
        torch.testing.assert_close(found[..., token], expected.mean(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("decoder", {}),
        ("decoder", {"tie_embeddings": False}),
        ("encoder", {"head_layer": True, "activation": "gelu"}),
        ("encoder_decoder", {"share_embeddings": False, "tie_embeddings": False}),
        ("lstm", {}),
        ("bert2bert", {}),
    ],
)
def test_a_model_knows_which_of_its_weights_have_a_row_for_each_token_or_position(
    architecture: str, settings: dict[str, Any]
) -> None:
    """They are those whose shapes are others with another vocabulary, or with another context."""

    def model(target: int, source: int, context: int = 16) -> Model:
        if architecture in ("lstm", "bert2bert"):
            sizes = {"architecture": architecture, "d_model": 16, "n_layers": 1} | (
                {"n_heads": 2} if architecture == "bert2bert" else {}
            )
            parts = {"model": sizes, "position": "none", "attention": "none"}
        else:
            parts = {
                "model": small(architecture=architecture, **settings).model_dump(mode="json"),
                "position": {"name": "learned"},
                "attention": {"name": "full"},
            }
        return build_model(read_parts(parts), vocab_size=target, source_vocab_size=source, context=context)

    if architecture == "bert2bert":
        pytest.importorskip("transformers")
    reads = ARCHITECTURES.get(architecture).reads_source
    before, own = shapes(model(40, 40)), model(40, 40).token_rows
    target = {name for name, shape in shapes(model(41, 40 if reads else 41)).items() if shape != before[name]}
    source = {name for name, shape in shapes(model(40, 43)).items() if shape != before[name]} if reads else set()
    assert {name for name, side in own.items() if side == "target"} == target
    assert {name for name, side in own.items() if side == "source"} == source
    positions = {name for name, shape in shapes(model(40, 40, context=17)).items() if shape != before[name]}
    assert set(model(40, 40).position_rows) == positions


def shapes(model: Model) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def test_tokens_whose_rows_nobody_knows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that did not say so would be given each row at another token's id."""
    ours, new = Tokenizers.joint(OLD), Tokenizers.joint(Listed(b"ab", b"b", b"a", b"a", sentinels=2))
    given = Initial(build(vocab_size=OLD.vocab_size).state_dict(), "rope", ours)
    model = build(vocab_size=OLD.vocab_size)
    monkeypatch.setattr(type(model), "_of_tokens", lambda self: iter(()))
    with pytest.raises(
        ConfigError, match="init: tokens have other ids than in the run, and no weight of this model is"
    ):
        begin(model, given, new)
    monkeypatch.undo()
    with pytest.raises(
        ConfigError, match=r"init: embedding.weight of the run has 61 rows, and its tokenizer 10 tokens"
    ):
        begin(model, Initial(build().state_dict(), "rope", ours), new)


APART = Tokenizers(Listed(b"b", b"a", b"ab", b"a"), Listed(b"a", b"c", b"b", sentinels=2))  # sources, targets
JOINT = Tokenizers.joint(OLD)


@pytest.mark.parametrize(
    ("before", "now", "sources", "targets", "rows"),
    [
        (JOINT, APART, [0, 1, 2, 3, 5, 4, 7, 6], [0, 1, 2, 3, 4, -1, 5, 8, 9], {"kept": 16, "new": 1, "dropped": 4}),
        (APART, JOINT, [0, 1, 2, 3, 5, 4, 7, 6, -1, -1], [0, 1, 2, 3, 4, 6, -1, -1, 7, 8],
         {"kept": 16, "new": 4, "dropped": 1}),
    ],
    ids=["one for both becomes two", "two become one for both"],
)  # fmt: skip
def test_a_side_that_leaves_or_joins_the_other_finds_its_own_tokens(
    before: Tokenizers, now: Tokenizers, sources: list[int], targets: list[int], rows: dict[str, int]
) -> None:
    theirs, model = translator(before, 0), translator(now, 1)
    begun = begin(model, Initial(theirs.state_dict(), "rope", before), now)
    assert begun.rows == rows
    for name, ids in (("encoder.embedding.weight", sources), ("embedding.weight", targets)):
        old, new = theirs.state_dict()[name], model.state_dict()[name]
        expected = torch.stack([old[id] if id >= 0 else old.mean(0) for id in ids])
        torch.testing.assert_close(new, expected, atol=1e-7, rtol=0)


def started(model: Any, run: Transformer, position: str = "rope", **how: Any) -> Begun:
    given = Initial(run.state_dict(), position, JOINT_BYTES, architecture=run.config.architecture, **how)
    return begin(model, given, JOINT_BYTES)


def without_crossing(model: Transformer) -> Transformer:
    """What cross-attention says to the residual stream is nothing."""
    for block in model.blocks:
        torch.nn.init.zeros_(block.cross_attention.out.weight)  # type: ignore[union-attr, arg-type]
    return model


CROSSING = ("query", "key", "value", "out")


@pytest.mark.parametrize("shared", [True, False], ids=["one matrix", "two matrices"])
@pytest.mark.parametrize("before", ["decoder", "encoder"])
def test_both_halves_begin_as_the_one_stack_of_the_run(before: str, shared: bool) -> None:
    """The source is read as an encoder with the run's weights would read it; where nothing crosses, the target is written as a
    decoder with them would."""
    run = build(architecture=before, seed=1)
    model: Any = build(architecture="encoder_decoder", share_embeddings=shared, seed=2)
    fresh = {name: weight.clone() for name, weight in model.state_dict().items()}
    begun = started(model, run, causal=before == "decoder")
    reader, writer = build(architecture="encoder"), build(architecture="decoder")
    for alone in (reader, writer):
        alone.load_state_dict(run.state_dict())
    source, target, lengths = tokens(3, 9), tokens(3, 7, seed=2), torch.tensor([9, 4, 1])
    read, expected = model.encode(source, lengths).hidden, reader.hidden(source, lengths=lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(read[row, :length], expected[row, :length], atol=1e-5, rtol=0)
    crossing = {name: weight for name, weight in model.state_dict().items() if "cross_attention" in name}
    assert len(crossing) == 2 * 5
    assert all(torch.equal(weight, fresh[name]) for name, weight in crossing.items())
    assert (set(begun.new), begun.dropped, begun.rows) == (set(crossing), {}, {})
    assert begun.facts["stacks"] == {"encoder": before, "decoder": before}
    assert begun.lines == [
        f"init: the encoder begins as the run's {before}",
        f"init: the decoder begins as the run's {before}",
        "init: new, and drawn as in a fresh model, "
        "blocks.*.cross_attention_norm (2 weights), blocks.*.cross_attention (8 weights)",
    ]
    written = without_crossing(model)(target, source=source, source_lengths=lengths)
    torch.testing.assert_close(written, writer(target), atol=1e-5, rtol=0)


def test_the_decoder_of_a_run_goes_on_without_its_source() -> None:
    run, model = build(architecture="encoder_decoder", share_embeddings=False, seed=1), build(seed=2)
    begun = started(model, run)
    assert begun.facts["stacks"] == {"decoder": "decoder"}
    assert not begun.new
    there, taken = set(run.state_dict()), set(model.state_dict())
    assert set(begun.dropped) == there - taken
    assert begun.lines[0] == "init: the decoder begins as the run's decoder"
    assert begun.lines[1].startswith("init: left behind ")
    for said in (
        "blocks.*.cross_attention (8 weights)",
        "encoder.blocks.*.feed_forward (6 weights)",
        "encoder.norm (1 weight)",
    ):
        assert said in begun.lines[1]
    target = tokens(3, 7)
    expected = without_crossing(run)(target, source=tokens(3, 9, seed=5))
    torch.testing.assert_close(model(target), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shared", [True, False], ids=["one matrix", "two matrices"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_encoder_of_a_run_goes_on_without_what_it_read_for(shared: bool, tied: bool) -> None:
    run: Any = build(architecture="encoder_decoder", share_embeddings=shared, tie_embeddings=tied, seed=1)
    model = build(architecture="encoder", tie_embeddings=tied, seed=2)
    fresh = {name: weight.clone() for name, weight in model.state_dict().items()}
    begun = started(model, run)
    source, lengths = tokens(3, 9), torch.tensor([9, 4, 1])
    found, expected = model.hidden(source, lengths=lengths), run.encode(source, lengths).hidden
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, :length], expected[row, :length], atol=1e-5, rtol=0)
    assert begun.facts["stacks"] == {"encoder": "encoder"}
    assert list(begun.new) == ([] if tied else ["head.weight"])
    if not tied:
        assert torch.equal(model.state_dict()["head.weight"], fresh["head.weight"])
    stayed = {name for name in run.state_dict() if not name.startswith("encoder.")} - (
        {"embedding.weight"} if shared else set()
    )
    assert set(begun.dropped) == stayed


def test_the_half_that_goes_on_finds_the_tokens_of_its_side() -> None:
    now = Tokenizers.joint(Listed(b"a", b"ab", b"b", sentinels=2))
    run, model = translator(APART, 0), build(architecture="encoder", vocab_size=9)
    begun = begin(model, Initial(run.state_dict(), "rope", APART, architecture="encoder_decoder"), now)
    old = run.state_dict()["encoder.embedding.weight"]
    ids = [0, 1, 2, 3, 5, 6, 4, -1, -1]  # of b a ab a
    expected = torch.stack([old[id] if id >= 0 else old.mean(0) for id in ids])
    torch.testing.assert_close(model.state_dict()["embedding.weight"], expected, atol=1e-7, rtol=0)
    assert begun.rows == {"kept": 7, "new": 2, "dropped": 1}


def test_a_matrix_for_both_sides_becomes_one_a_side() -> None:
    run = build(architecture="encoder_decoder", vocab_size=10, seed=1)
    model = translator(APART, 2)
    begin(model, Initial(run.state_dict(), "rope", JOINT, architecture="encoder_decoder"), APART)
    old = run.state_dict()["embedding.weight"]
    assert torch.equal(model.state_dict()["encoder.embedding.weight"], old[[0, 1, 2, 3, 5, 4, 7, 6]])
    assert torch.equal(model.state_dict()["embedding.weight"][[4, 6]], old[[4, 5]])


DECODER, ENCODER = "position.weight", "encoder.position.weight"


@pytest.mark.parametrize(
    ("before", "now", "origin"),
    [
        ("decoder", "encoder_decoder", {DECODER: DECODER, ENCODER: None}),
        ("encoder", "encoder_decoder", {DECODER: None, ENCODER: DECODER}),
        ("encoder_decoder", "decoder", {DECODER: DECODER}),
        ("encoder_decoder", "encoder", {DECODER: ENCODER}),
        ("encoder_decoder", "prefix", {DECODER: None}),
        ("decoder", "encoder", {DECODER: None}),
    ],
)
def test_buckets_go_on_where_a_stack_looks_the_same_way(before: str, now: str, origin: dict[str, str | None]) -> None:
    run = build("t5", architecture=before, seed=1)
    model = build("t5", prefix=True, seed=2) if now == "prefix" else build("t5", architecture=now, seed=2)
    fresh = {name: weight.clone() for name, weight in model.state_dict().items()}
    started(model, run, "t5", causal={"decoder": True, "encoder": False}.get(before))
    for name, there in origin.items():
        expected = fresh[name] if there is None else run.state_dict()[there]
        assert torch.equal(model.state_dict()[name], expected), name


@pytest.mark.parametrize(
    ("before", "now"), [("lstm", "decoder"), ("decoder", "lstm"), ("bert2bert", "encoder_decoder")]
)
def test_architectures_of_other_blocks_are_refused_in_one_line(before: str, now: str) -> None:
    if now == "lstm":
        sizes = {"architecture": "lstm", "d_model": 16, "n_layers": 1}
        parts = read_parts({"model": sizes, "position": "none", "attention": "none"})
        model: Model = build_model(parts, vocab_size=260, context=16)
    else:
        model = build(architecture=now, vocab_size=260)
    said = f"init: {now} has no weights that a run of {before} could have trained; start from another run, or with model.arch"
    with pytest.raises(ConfigError, match=said):
        begin(model, Initial({"embedding.weight": torch.zeros(260, 16)}, None, None, architecture=before), JOINT_BYTES)


def test_a_table_of_positions_is_cut_to_a_shorter_context() -> None:
    """What the run says of a text that fits is what it said before."""
    run, model = build("learned"), build("learned", context=32, seed=3)
    begun = started(model, run, "learned")
    ids = tokens(2, 32)
    assert torch.equal(model(ids), run(ids))
    assert begun.facts == {"positions": {"position.weight": {"kept": 32, "dropped": 32}}}
    assert begun.lines == ["init: of position.weight the first 32 rows kept, 32 left behind"]
    assert started(build("rope", context=128), build("rope")) == Begun()
    changed = started(build("rope", context=128), run, "learned")
    assert (changed.cut, list(changed.dropped)) == ({}, ["position.weight"])


def test_the_tables_of_two_berts_are_cut_too() -> None:
    run, model = two_berts(20, 0), two_berts(20, 1, context=9)
    begun = begin(model, Initial(run.state_dict(), None, None), JOINT_BYTES)
    source, target = tokens(2, 9, vocab_size=20), tokens(2, 8, vocab_size=20)
    assert torch.equal(model(target, source=source), run(target, source=source))
    assert list(begun.cut.values()) == [{"kept": 9, "dropped": 7}] * 2
    said = r"^context: the positions that the run has learned end at 16; use context=16$"
    with pytest.raises(ConfigError, match=said):
        begin(two_berts(20, 1, context=17), Initial(run.state_dict(), None, None), JOINT_BYTES)


@pytest.mark.parametrize("architecture", ["encoder", "encoder_decoder"])
@pytest.mark.parametrize(
    ("before", "now", "factor"), [("sinusoidal", "nope", 32**0.5), ("nope", "sinusoidal", 32**-0.5)]
)
def test_tokens_enter_as_large_as_they_did(
    monkeypatch: pytest.MonkeyPatch, architecture: str, before: str, now: str, factor: float
) -> None:
    """But for the sines a model with sinusoidal positions is one with none: the same function, whichever began the other."""
    monkeypatch.setattr(sinusoidal, "sinusoids", lambda positions, width: torch.zeros(*positions.shape, width))
    monkeypatch.setattr(POSITIONS.get("nope"), "bidirectional", True)  # all that it lacks is order
    how: dict[str, Any] = {"architecture": architecture, "share_embeddings": False, "tie_embeddings": False}
    run, model = build(before, **how), build(now, seed=3, **how)
    begun = started(model, run, before)
    more = {"source": tokens(2, 7, seed=4)} if architecture == "encoder_decoder" else {}
    ids = tokens(2, 9)
    torch.testing.assert_close(model(ids, **more), run(ids, **more), atol=2e-5, rtol=1e-5)
    names = ["embedding.weight", *(["encoder.embedding.weight"] if more else [])]
    assert begun.facts == {"multiplied": dict.fromkeys(names, pytest.approx(factor))}
    assert f"multiplied by {factor:.4g}: tokens enter as large" in begun.lines[0]


def test_an_embedding_that_the_head_shares_stays_and_that_is_said() -> None:
    run, model = build("sinusoidal"), build("rope", seed=3)
    begun = started(model, run, "sinusoidal")
    assert torch.equal(model.state_dict()["embedding.weight"], run.state_dict()["embedding.weight"])
    assert begun.facts == {"entering": {"embedding.weight": pytest.approx(32**-0.5)}}
    assert begun.lines == [
        "init: tokens enter 0.1768 times as large as in the run: its positions scale them in another way, and embedding.weight, "
        "which the head reads too, is left as it was"
    ]
    assert started(build("sinusoidal", seed=4), run, "sinusoidal") == Begun()
