"""Decoding one token at a time: ours against Hugging Face's `generate`, with the same weights.

Their Llama is given the weights of our decoder with RoPE, drawn wide enough that the likeliest tokens change. Both decode
256 tokens greedily behind the same prompts, in turns, and have to say the same.

    python experiments/speed/decode.py [fp32|bf16] [NEW_TOKENS] [ROUNDS]

Without a precision it is the machine's own. Prints a JSON object a line.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence

from ctxlab.cli.environment import set_process_defaults

set_process_defaults()  # before torch is imported

import torch
from contestants import N_LAYERS, VOCAB, new_llama, ours
from torch import Tensor

from ctxlab.model.attention import native
from ctxlab.model.generation import DecodingConfig, generate
from ctxlab.model.transformer import Transformer
from ctxlab.study.script import run_script
from ctxlab.train.precision import autocast, resolve_device, resolve_precision

PROMPTS, NEW, ROUNDS = (16, 512), 256, 5
STD = 0.05  # of the weights, but those of the embedding
PARTS = {
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj", "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}  # fmt: skip
"""Ours to theirs, of a block."""


def as_llama(weights: dict[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """The weights of our decoder under the names of Hugging Face's Llama.

    Theirs rotates column k of a head with column k + D/2, ours with the next one: rows of queries and keys change places.
    """
    tokens = weights["embedding.weight"]
    found = {"model.embed_tokens.weight": tokens, "lm_head.weight": tokens, "model.norm.weight": weights["norm.weight"]}
    for layer in range(N_LAYERS):
        for mine, theirs in PARTS.items():
            matrix = weights[f"blocks.{layer}.{mine}.weight"]
            if mine in ("attention.query", "attention.key"):
                pairs = matrix.unflatten(0, (-1, head_dim // 2, 2))  # (H,D/2,2,d)
                matrix = pairs.transpose(1, 2).reshape(matrix.shape)
            found[f"model.layers.{layer}.{theirs}.weight"] = matrix
    return found


def alike(context: int) -> tuple[Transformer, torch.nn.Module]:
    """Our decoder and their Llama, of the same weights, both to be read from only."""
    torch.manual_seed(0)
    model, _ = ours("rope", context)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name != "embedding.weight":
                parameter.normal_(std=STD)
    theirs = new_llama(context)
    theirs.load_state_dict(as_llama(model.state_dict(), model.config.head_dim))
    return model.eval(), theirs.eval()


def timed(decode: Callable[[], list[int]]) -> tuple[float, list[int]]:
    start = time.perf_counter()
    said = decode()
    return time.perf_counter() - start, said


def main(words: Sequence[str]) -> None:
    more = list(words)
    asked = more.pop(0) if more and more[0] in ("fp32", "bf16") else "auto"
    new, rounds = (int(word) for word in (*more, *(str(n) for n in (NEW, ROUNDS)[len(more) :])))
    device = resolve_device("cpu")
    precision = resolve_precision(asked, device)
    native.prepare("auto", math.inf, lambda line: print(line, file=sys.stderr))
    kernel = "native" if native.is_built() else "torch"
    model, llama = alike(max(PROMPTS) + new)
    for length in PROMPTS:
        prompt = torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(1))
        greedy = DecodingConfig(max_new_tokens=new, temperature=0)

        def mine(prompt: Tensor = prompt, greedy: DecodingConfig = greedy) -> list[int]:
            with autocast(precision, device):
                return list(generate(model, prompt[0].tolist(), greedy))

        def theirs(prompt: Tensor = prompt) -> list[int]:
            with torch.no_grad(), autocast(precision, device):  # inference mode would cast all weights at each token
                said = llama.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False
                )
            return said[0, prompt.shape[1] :].tolist()

        first, second = mine(), theirs()
        seconds: dict[str, list[float]] = {"ctxlab": [], "HF generate": []}
        for _ in range(rounds):
            for name, decode in (("ctxlab", mine), ("HF generate", theirs)):
                seconds[name].append(timed(decode)[0])
        here = {"prompt": length, "new_tokens": new, "precision": precision, "kernel": kernel}
        for name, each in seconds.items():
            rates = {"best": new / min(each), "median": new / statistics.median(each), "lowest": new / max(each)}
            print(json.dumps({"decoder": name, **here, **rates}), flush=True)
        ratios = [b / a for a, b in zip(seconds["ctxlab"], seconds["HF generate"])]
        print(json.dumps({
            "compared": "decoding", **here, "same_tokens": first == second, "different_tokens": len(set(first)),
            "best_ratio": min(seconds["HF generate"]) / min(seconds["ctxlab"]),
            "median_ratio": statistics.median(seconds["HF generate"]) / statistics.median(seconds["ctxlab"]),
            "lowest_ratio": min(ratios), "highest_ratio": max(ratios),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    run_script(main)
