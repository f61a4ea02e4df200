"""The weights of a BertModel: under the names of a stack of ours, and out of a folder that Hugging Face's library saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctxlab.errors import ConfigError
from ctxlab.model.config import BERT_EPS, Bert2BertConfig


def under_our_names(bert: Any, crosses: bool = False) -> dict[str, Tensor]:
    """The weights of a BertModel under the names that a stack of ours has: the first type of tokens is a part of positions."""
    embeddings = bert.embeddings
    found = {
        "embedding.weight": embeddings.word_embeddings.weight,
        "position.weight": embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0],
    }
    for end in ("weight", "bias"):
        found[f"embedding_norm.{end}"] = getattr(embeddings.LayerNorm, end)
        for number, layer in enumerate(bert.encoder.layer):
            here = f"blocks.{number}"
            attending = {"attention": layer.attention} | ({"cross_attention": layer.crossattention} if crosses else {})
            for name, part in attending.items():
                for projection in ("query", "key", "value"):
                    found[f"{here}.{name}.{projection}.{end}"] = getattr(getattr(part.self, projection), end)
                found[f"{here}.{name}.out.{end}"] = getattr(part.output.dense, end)
                found[f"{here}.{name}_norm.{end}"] = getattr(part.output.LayerNorm, end)
            found[f"{here}.feed_forward.up.{end}"] = getattr(layer.intermediate.dense, end)
            found[f"{here}.feed_forward.down.{end}"] = getattr(layer.output.dense, end)
            found[f"{here}.feed_forward_norm.{end}"] = getattr(layer.output.LayerNorm, end)
    return found


# What of a folder's config has to be what the model's settings say.
_SAME = {"d_model": "hidden_size", "n_heads": "num_attention_heads", "d_ff": "intermediate_size"}


def check_folder(folder: Path) -> dict[str, Any]:
    """The config.json of a folder of weights. Raises ConfigError, one line, where it is no BERT's, or has no safetensors."""
    try:
        said: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.pretrained: {folder} has no config.json that can be read ({error})") from error
    halves = (
        [said.get("encoder", {}), said.get("decoder", {})] if said.get("model_type") == "encoder-decoder" else [said]
    )
    kinds = {half.get("model_type") for half in halves}
    if kinds != {"bert"}:
        raise ConfigError(
            f"model.pretrained: {folder} holds {' and '.join(sorted(map(str, kinds)))}; expected bert, or an encoder-decoder of "
            "two"
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model.pretrained: {folder} has no .safetensors; other formats run code and are not read")
    return said


def read_folder(
    folder: Path, config: Bert2BertConfig, context: int
) -> tuple[tuple[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]:
    """The weights of a folder for the encoder and the decoder, by a BertModel's names, and for the head by `Decoder`'s."""
    import transformers

    said = check_folder(folder)
    pair = said["model_type"] == "encoder-decoder"
    halves = {"n_encoder_layers": said["encoder"] if pair else said, "n_layers": said["decoder"] if pair else said}
    for layers, half in halves.items():
        for ours, theirs in {layers: "num_hidden_layers", **_SAME}.items():
            if half[theirs] != getattr(config, ours):
                raise ConfigError(
                    f"model.{ours}: the BERT in {folder} has {half[theirs]}, here are {getattr(config, ours)}; use "
                    f"model.{ours}={half[theirs]}"
                )
        if half["max_position_embeddings"] < context:
            raise ConfigError(
                f"context: the BERT in {folder} has {half['max_position_embeddings']} positions, here are {context}; use "
                f"context={half['max_position_embeddings']}"
            )
        for setting, known in (("hidden_act", "gelu"), ("layer_norm_eps", BERT_EPS)):
            if half.get(setting, known) != known:
                raise ConfigError(
                    f"model.pretrained: the BERT in {folder} has {setting}={half[setting]}; expected {known}"
                )
    # Hugging Face's loaders know what files of all ages call things; what a file lacks they draw, and say so.
    kind = transformers.EncoderDecoderModel if pair else transformers.BertForMaskedLM
    with torch.random.fork_rng(devices=[]):
        theirs, report = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    lacks = set(report["missing_keys"])
    encoder, writer = (theirs.encoder, theirs.decoder) if pair else (theirs.bert, theirs)
    start = "decoder." if pair else ""

    def there(module: Any, prefix: str) -> dict[str, Tensor]:
        return {name: weight for name, weight in module.state_dict().items() if prefix + name not in lacks}

    head = there(writer.cls.predictions, f"{start}cls.predictions.")
    return (
        there(encoder, "encoder." if pair else "bert."),
        there(writer.bert, f"{start}bert."),
    ), {
        name: weight for name, weight in head.items() if not name.startswith("decoder.")
    }  # the matrix is the embeddings'


def take(mine: Any, theirs: dict[str, Tensor], tokens: bool, folder: str) -> None:
    """Copies a half's weights: the first rows of its table of positions, those of tokens only where they are the same.

    Cross-attention, which a BERT by itself has not, may be absent. Raises ConfigError where something else is.
    """
    for name, weight in mine.named_parameters():
        if name == "embeddings.word_embeddings.weight" and not tokens:
            continue
        if name in theirs:
            weight.data.copy_(theirs[name][: len(weight)])
        elif "crossattention" not in name:
            raise ConfigError(f"model.pretrained: {folder} has no {name}")
