"""A sentencepiece model that there is already."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from google.protobuf.message import DecodeError
from pydantic import Field
from sentencepiece import sentencepiece_model_pb2

from ctxlab.data.tokenizers.base import TOKENIZERS, Tokenizer
from ctxlab.data.tokenizers.pieces import Pieces
from ctxlab.errors import DataError

# What a model that changes text gives away: letters that look alike, spaces in a row and at the ends, every script.
_PROBE = "  a  b\tc \n\u2581 \u00e9 e\u0301 \ufb01 \u2460 \u4e2d\u6587 \U0001f600 "


@TOKENIZERS.register("file")
class File(Pieces):
    """A .model file of sentencepiece's, if it keeps every text as it is: bits per byte would mean nothing otherwise.

    Where it has no pad or bos, eos stands in for them.
    """

    source = "your own sentencepiece .model: tokenizer.path=FILE"

    class Config(Tokenizer.Config):
        name: Literal["file"] = "file"
        path: str = Field(min_length=1, description="a sentencepiece .model file")

    @classmethod
    def make(cls, config: Any, sample: Iterable[str]) -> Tokenizer:
        path = Path(config.path).expanduser()
        try:
            proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
            tokenizer = cls(config, _leaving_spaces(proto))
        except OSError as error:
            raise DataError(f"tokenizer.path: {path} cannot be read: {error.strerror or error}") from error
        except (RuntimeError, DecodeError) as error:
            raise DataError(f"tokenizer.path: {path} is not a sentencepiece model") from error
        if tokenizer.eos_id < 0:
            raise DataError(f"tokenizer.path: {path} has no end-of-text piece")
        if not _keeps_text(proto) or tokenizer.decode(tokenizer.encode(_PROBE)) != _PROBE:
            raise DataError(
                f"tokenizer.path: {path} changes text (it normalizes, or has no byte pieces): "
                "bits per byte would count other bytes than the text's"
            )
        return tokenizer


def _keeps_text(proto: Any) -> bool:
    """Whether the model replaces no character by another and has a piece for every byte."""
    n_bytes = sum(piece.type == sentencepiece_model_pb2.ModelProto.SentencePiece.BYTE for piece in proto.pieces)
    return not proto.normalizer_spec.precompiled_charsmap and n_bytes == 256


def _leaving_spaces(proto: Any) -> bytes:
    """The model, told neither to put a space before a text nor to take spaces out of it."""
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return bytes(proto.SerializeToString())
