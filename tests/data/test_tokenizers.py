"""Tokenizers: no text loses anything, it can be encoded in parts, and what is learned is a function of it."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from ctxlab.data.tokenizers.base import SETTINGS, TOKENIZERS, Tokenizer, load_tokenizer
from ctxlab.data.tokenizers.file import _PROBE, File
from ctxlab.data.tokenizers.pieces import MODEL, train
from ctxlab.errors import DataError
from tests.data.builders import prose, trained

KINDS = ("unigram", "bpe", "byte", "file")
AWKWARD = (
    " ", "  ", "\t", "\n", "\n\n", "\r\n", "\r", "\0", "\u2581", "\u2581\u2581 ", "\u2585", "\u2047", "\u2028",
    "\u0085", "\x0c", "\ufeff", "\uffff", "\u200b", "e\u0301", "é", "ﬁ", "①", "中文字符", "😀", "👩‍👩‍👧",
    "<s>", "</s>", "<pad>", "<unk>", "<mask>", "<0x41>", "the ", "mountain", "  river",
)  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=6)), max_size=12).map("".join)


def external(sample: list[str] | None = None, **options: Any) -> bytes:
    """A model as sentencepiece trains one for others: a space before every text, spaces in a row made one."""
    words = {
        "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity", "hard_vocab_limit": False,
        "minloglevel": 2,
    } | options  # fmt: skip
    writer = io.BytesIO()
    lines = sample or prose(1, 300).splitlines()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=writer, **words)
    return writer.getvalue()


def from_file(path: Path, model: bytes) -> Tokenizer:
    path.write_bytes(model)
    return File.make(File.Config(path=str(path)), ())


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "file":
        return from_file(tmp_path_factory.mktemp("model") / "own.model", external())
    return trained(request.param)


@given(text=TEXTS)
@settings(deadline=None, max_examples=80, database=None)
def test_any_text_comes_back_and_its_tokens_stand_for_its_bytes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.pieces[token] for token in ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes[ids].all()  # no special id, which would stand for no bytes


@given(lines=st.lists(TEXTS, max_size=6), cut=st.lists(st.booleans(), min_size=6, max_size=6))
@settings(deadline=None, max_examples=50, database=None)
def test_parts_cut_after_newlines_have_the_tokens_of_the_whole(
    tokenizer: Tokenizer, lines: list[str], cut: list[bool]
) -> None:
    parts = [""]
    for line, ends in zip(lines, cut):
        parts[-1] += f"{line}\n"
        if ends:
            parts.append("")
    assert [token for part in parts for token in tokenizer.encode(part)] == tokenizer.encode("".join(parts))


def test_a_newline_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the river\n\n  stone\n")
    assert [tokenizer.pieces[token] for token in ids].count(b"\n") == 3
    assert [piece for piece in tokenizer.pieces if b"\n" in piece] == [b"\n"]


def test_special_ids_are_silent_and_half_a_character_is_marked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("river")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == "river"
    assert tokenizer.decode(tokenizer.encode("😀")[:-1]) == "\ufffd"


@given(text=TEXTS)
@settings(deadline=None, max_examples=25, database=None)
def test_a_saved_tokenizer_is_the_same_tokenizer(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    tokenizer.save(folder)
    loaded = load_tokenizer(folder)
    assert (loaded.config, loaded.sha256, loaded.pieces) == (tokenizer.config, tokenizer.sha256, tokenizer.pieces)
    assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    assert loaded.encode(text) == tokenizer.encode(text)


def test_bytes_by_hand() -> None:
    byte = trained("byte")
    assert byte.encode("é\nA") == [4 + 0xC3, 4 + 0xA9, 4 + 0x0A, 4 + 0x41]
    assert (byte.vocab_size, byte.pad_id, byte.bos_id, byte.eos_id) == (260, 0, 1, 2)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_trained_model_is_what_its_name_says(kind: str) -> None:
    tokenizer = trained(kind)
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.files()[MODEL])
    kinds = sentencepiece_model_pb2.TrainerSpec.ModelType
    assert proto.trainer_spec.model_type == {"unigram": kinds.UNIGRAM, "bpe": kinds.BPE}[kind]
    assert [piece.piece for piece in proto.pieces[:5]] == ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert sum(piece.type == piece.BYTE for piece in proto.pieces) == 256
    assert len(proto.pieces) == tokenizer.vocab_size == (512 if kind == "bpe" else len(proto.pieces)) <= 512
    assert len(tokenizer.encode("the mountain river")) == 3  # words of the sample, each with the space before it


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_same_text_gives_the_same_model(kind: str) -> None:
    lines = prose(2, 200).splitlines(keepends=True)
    assert train(kind, 400, lines) == train(kind, 400, ["".join(lines)])  # however it is cut at newlines
    assert train(kind, 400, lines) != train(kind, 400, lines[1:])


def test_the_sha256_is_of_the_name_and_the_model() -> None:
    tokenizer = trained("bpe")
    content = b"bpe" + MODEL.encode() + b"\0" + tokenizer.files()[MODEL]
    assert tokenizer.sha256 == hashlib.sha256(content).hexdigest()


@functools.cache
def chinese() -> str:
    """A small text without a space, whose sentences come in many versions."""
    rng = random.Random(3)
    who = ["老师", "孩子们", "研究人员", "我的朋友", "船长"]
    where = ["在图书馆里", "在河边", "在实验室中", "沿着山路", "在海上"]
    what = ["训练语言模型", "阅读很长的文章", "记录每一次实验", "讨论上下文的长度", "观察天上的星星"]
    return "".join(f"{rng.choice(who)}{rng.choice(where)}{rng.choice(what)}。" for _ in range(400))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_chinese_without_spaces_is_learned_in_words(kind: str) -> None:
    cls = TOKENIZERS.get(kind)
    tokenizer = cls.make(cls.Config(name=kind, vocab_size=512), [chinese()])
    text = "研究人员在河边训练语言模型。船长沿着山路阅读很长的文章。"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) * 3 < len(text) * 2
    assert max(len(tokenizer.pieces[token]) for token in ids) >= 3 * 3  # three characters in one
    assert len(tokenizer.encode("龘")) == 3  # a character that it never saw: its bytes


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_an_alphabet_beyond_the_vocabulary_keeps_its_common_characters(kind: str) -> None:
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 600)))
    common = prose(4, 400)  # 24 kinds; 600 others are 4% of the text
    cls = TOKENIZERS.get(kind)
    tokenizer = cls.make(cls.Config(name=kind, vocab_size=400), [rare, common])
    letters = {text for piece in tokenizer.pieces if len(text := piece.decode(errors="ignore")) == 1}
    assert letters & set(rare) == set(
        rare[: (400 - 256 - 5) // 2 - len(set(common))]
    )  # the most frequent, then by code point
    assert tokenizer.decode(tokenizer.encode(rare)) == rare
    assert len(tokenizer.encode(common)) < len(common) / 2  # the rest of the vocabulary went to its words


@pytest.mark.parametrize("sample", [[], [""], ["\n\n", "\n"]])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_no_text_trains_nothing(kind: str, sample: list[str]) -> None:
    with pytest.raises(DataError, match=r"^tokenizer: .*(no text to train it on|cannot be trained on this)[^\n]*$"):
        train(kind, 400, sample)


LOWER = "".join(f"{ord(letter):x}\t{ord(letter) + 32:x}\n" for letter in "ABCXYZ")


def lowercasing(folder: Path) -> bytes:
    rules = folder / "rules.tsv"
    rules.write_text(LOWER)
    return external(normalization_rule_tsv=str(rules))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda _: external(normalization_rule_name="nfkc"), "own.model changes text"),
        (lambda _: external(normalization_rule_name="nmt_nfkc"), "own.model changes text"),
        (lowercasing, "own.model changes text"),
        (lambda _: external(byte_fallback=False), "own.model changes text"),
        (lambda _: external([_PROBE, *"ab c"] * 50, byte_fallback=False), "own.model changes text"),
        (lambda _: external(eos_id=-1), "own.model has no end-of-text piece"),
        (lambda _: b"", "own.model is not a sentencepiece model"),
        (lambda _: b"once upon a time", "own.model is not a sentencepiece model"),
        (lambda _: external()[:-100], "own.model is not a sentencepiece model"),
    ],
    ids=["nfkc", "nmt_nfkc", "lowercase", "no-bytes", "no-bytes-but-the-probe", "no-eos", "empty", "text", "torn"],
)
def test_a_model_that_cannot_be_used_is_refused(tmp_path: Path, model: Callable[[Path], bytes], message: str) -> None:
    with pytest.raises(DataError, match=rf"^tokenizer\.path: \S*{message}[^\n]*$"):
        from_file(tmp_path / "own.model", model(tmp_path))


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.path: \S*none\.model cannot be read: No such file or directory"):
        File.make(File.Config(path=str(tmp_path / "none.model")), ())


def test_eos_stands_in_for_a_missing_bos_and_pad(tmp_path: Path) -> None:
    tokenizer = from_file(tmp_path / "own.model", external(bos_id=-1, unk_id=0, eos_id=1))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (1, 1, 1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (MODEL, b""),
        (MODEL, b"garbage"),
        (MODEL, None),
        (SETTINGS, b""),
        (SETTINGS, b"[]"),
        (SETTINGS, b"{}"),
        (SETTINGS, b"\xff\xfe"),
        (SETTINGS, b'{"name": ["bpe"]}'),
        (SETTINGS, json.dumps({"name": "bpe", "vocab_size": "many", "more": 1}).encode()),
        (SETTINGS, None),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes | None) -> None:
    trained("bpe").save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"^tokenizer: \S+ holds no whole tokenizer \([^\n]+\)$"):
        load_tokenizer(tmp_path)
