"""What `model:` in a config says: the sizes and the settings of a model, every derived number resolved."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ctxlab.fields import OrNone
from ctxlab.registry import ComponentConfig

_GATED = ("swiglu", "geglu_tanh")
BERT_EPS = 1e-12  # of every norm in BERT
_FF_MULTIPLE = 128  # widths that are multiples of this keep matmul kernels at full speed


class ModelConfig(ComponentConfig):
    """Sizes and settings of a Transformer. GPT-2, BLOOM, Llama, BERT, T5 and the original are settings of it.

    What T5 leaves out, the scale 1 / sqrt(head_dim) of scores, and what it puts in, the same of d_model before a tied head,
    are a matter of the weights: of the queries times sqrt(head_dim), of the last norm over sqrt(d_model).

    `n_encoder_layers`, `n_kv_heads`, `head_dim` and `d_ff` may be given as `auto`; what is stored is always the number:
    n_encoder_layers = n_layers, n_kv_heads = n_heads (every head has its own keys), head_dim = d_model / n_heads, and d_ff =
    8/3 d_model with a gate (three matrices; Shazeer 2020, arXiv:2002.05202, section 3, keeps the parameters of two of
    4 d_model), 4 d_model otherwise, to the nearest multiple of 128.
    Raises (as a validation error) when n_heads is no multiple of n_kv_heads, or d_model none of n_heads with head_dim auto.
    """

    name: str = Field("custom", description="the size's name, for people")
    architecture: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    d_model: int = Field(gt=0, description="width of the residual stream")
    n_layers: int = Field(gt=0, description="blocks; of an encoder-decoder, those of the decoder")
    n_encoder_layers: int = Field(gt=0, description="blocks of an encoder-decoder's encoder; or auto")
    n_heads: int = Field(gt=0, description="query heads")
    n_kv_heads: int = Field(gt=0, description="key-value heads, each shared by n_heads / n_kv_heads queries; or auto")
    head_dim: int = Field(gt=0, description="width of a head, free of d_model; or auto")
    d_ff: int = Field(gt=0, description="width of the feed-forward layer; or auto")
    activation: Literal["swiglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"] = "swiglu"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_place: Literal["pre", "post"] = Field(
        "pre", description="pre: before each part and at the end; post: after each addition, as in the original"
    )
    norm_eps: float = Field(1e-5, gt=0)
    bias: bool = Field(False, description="biases in every linear layer, and in layernorm")
    embedding_norm: bool = Field(False, description="a norm after the embedding, as in BLOOM")
    tie_embeddings: bool = Field(True, description="the output head is the embedding's matrix")
    share_embeddings: bool = Field(True, description="an encoder-decoder embeds source and target by one matrix")
    head_layer: bool = Field(
        False, description="a dense layer, the activation and a norm before the head, and a bias behind it, as in BERT"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="of the embedding and of each block's outputs; attention weights are never dropped"
    )

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a third matrix, whose output multiplies the second's."""
        return self.activation in _GATED

    def of_encoder(self) -> ModelConfig:
        """The sizes of an encoder-decoder's encoder, as those of a stack by itself."""
        return self.model_copy(update={"n_layers": self.n_encoder_layers})

    @model_validator(mode="before")
    @classmethod
    def _resolve_auto(cls, values: Any) -> Any:
        """Replaces `auto` by its number. Where that number needs a field that is itself wrong, that field's error says so."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        d_model, n_heads = _size(values.get("d_model")), _size(values.get("n_heads"))
        if values.get("n_encoder_layers", "auto") == "auto":
            values["n_encoder_layers"] = _size(values.get("n_layers")) or 1
        if values.get("n_kv_heads", "auto") == "auto":
            values["n_kv_heads"] = n_heads or 1
        if values.get("head_dim", "auto") == "auto":
            if d_model and n_heads and d_model % n_heads:
                raise ValueError(
                    f"d_model ({d_model}) must be divisible by n_heads ({n_heads}), or head_dim given as a number"
                )
            values["head_dim"] = d_model // n_heads if d_model and n_heads else 1
        if values.get("d_ff", "auto") == "auto":
            wanted = 8 * d_model / 3 if values.get("activation", "swiglu") in _GATED else 4 * d_model
            values["d_ff"] = max(1, round(wanted / _FF_MULTIPLE)) * _FF_MULTIPLE
        return values

    @model_validator(mode="after")
    def _heads_in_groups(self) -> ModelConfig:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be divisible by n_kv_heads ({self.n_kv_heads})")
        return self

    @model_validator(mode="after")
    def _one_activation_in_head(self) -> ModelConfig:
        if self.head_layer and self.gated:
            raise ValueError(
                f"head_layer: {self.activation} has a gate, which a head's layer has not; use gelu or relu"
            )
        return self


class LSTMConfig(ComponentConfig):
    """Sizes and settings of the recurrent baseline. No positional scheme and no attention go with it.

    `d_hidden` may be given as `auto`, and is d_model then. Where the two differ, a matrix leads from the last layer's state
    to the width of the embedding, so that the head can be the embedding's matrix whatever the state's width.
    """

    name: str = Field("custom", description="the size's name, for people")
    architecture: Literal["lstm"] = "lstm"
    d_model: int = Field(gt=0, description="width of the embedding, and of what the head reads")
    d_hidden: int = Field(gt=0, description="width of each layer's state; or auto")
    n_layers: int = Field(gt=0)
    carry_state: bool = Field(
        False,
        description="rows of a training step go on with the state that the step before has left, without its gradient",
    )
    tie_embeddings: bool = Field(True, description="the output head is the embedding's matrix")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="of the embedding and of each layer's outputs, never from one token to the next"
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve_auto(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("d_hidden", "auto") == "auto":
            return {**values, "d_hidden": _size(values.get("d_model")) or 1}
        return values


class Bert2BertConfig(ComponentConfig):
    """Sizes and settings of two Hugging Face BERTs, an encoder and a decoder that attends to it; positions and attention are
    BERT's own.

    `n_encoder_layers` and `d_ff` may be given as `auto`: n_layers and 4 d_model. A head is d_model / n_heads wide, since a
    BertModel has no other.
    """

    name: str = Field("custom", description="the size's name, for people")
    architecture: Literal["bert2bert"] = "bert2bert"
    d_model: int = Field(gt=0, description="width of the residual stream")
    n_layers: int = Field(gt=0, description="layers of the decoder")
    n_encoder_layers: int = Field(gt=0, description="layers of the encoder; or auto")
    n_heads: int = Field(gt=0, description="heads, whose widths add up to d_model")
    d_ff: int = Field(gt=0, description="width of the feed-forward layer; or auto")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the embedding and of each layer's outputs")
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="of attention weights")
    pretrained: OrNone | str = Field(
        "none", description="a folder of safetensors: a BERT for both halves, or a saved EncoderDecoderModel of two"
    )
    pretrained_tokens: bool = Field(
        False, description="the folder's vocabulary is this tokenizer's: embeddings of tokens are taken from it too"
    )

    def as_ours(self) -> ModelConfig:
        """The sizes of the encoder-decoder of ours that computes the same, with position=learned and attention=full."""
        return ModelConfig.model_validate(
            {
                "name": self.name,
                "architecture": "encoder_decoder",
                **{
                    name: getattr(self, name) for name in ("d_model", "n_layers", "n_encoder_layers", "n_heads", "d_ff")
                },
                "n_kv_heads": "auto",
                "head_dim": "auto",
                "activation": "gelu",
                "norm": "layernorm",
                "norm_place": "post",
                "norm_eps": BERT_EPS,
                "bias": True,
                "embedding_norm": True,
                "share_embeddings": False,
                "head_layer": True,
                "dropout": self.dropout,
            }
        )

    @model_validator(mode="before")
    @classmethod
    def _resolve_auto(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if values.get("n_encoder_layers", "auto") == "auto":
            values["n_encoder_layers"] = _size(values.get("n_layers")) or 1
        if values.get("d_ff", "auto") == "auto":
            values["d_ff"] = 4 * (_size(values.get("d_model")) or 1)
        return values

    @model_validator(mode="after")
    def _heads_fill_the_width(self) -> Bert2BertConfig:
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model ({self.d_model}) must be divisible by n_heads ({self.n_heads}), whose widths add up to it in BERT"
            )
        return self

    @model_validator(mode="after")
    def _tokens_of_a_folder(self) -> Bert2BertConfig:
        if self.pretrained_tokens and self.pretrained == "none":
            raise ValueError("pretrained_tokens: there is no folder to take them from; give model.pretrained=FOLDER")
        return self


SizesConfig = ModelConfig | LSTMConfig | Bert2BertConfig


def _size(value: Any) -> int:
    """The value where it is a valid size, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
