"""Decoders of one size, ours and other people's: 6 layers, width 384, 6 heads, vocabulary 8,192, about 13.8M parameters.

Each is a name and a function that builds it for a context: the model, and the mean loss of its tokens: ours as ctxlab trains,
the others' by torch's cross-entropy of their logits. All embeddings are tied; no dropout. Only what is built is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.config import ModelConfig
from ctxlab.model.offload import OffloadSetting, offloading
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.remake import Recompute
from ctxlab.model.transformer import Transformer

D_MODEL, N_LAYERS, N_HEADS, VOCAB = 384, 6, 6, 8192
GATED, PLAIN = 1024, 1536  # feed-forward widths with as many weights: three matrices of the one, two of the other
SIZES = ModelConfig(
    d_model=D_MODEL, n_layers=N_LAYERS, n_heads=N_HEADS, n_kv_heads=N_HEADS, head_dim=D_MODEL // N_HEADS, d_ff=GATED
)

Loss = Callable[[Tensor, Tensor], Tensor]
"""(tokens, targets), both (B,T), to the mean nats of a target."""


def ours(
    position: str, context: int, *, recompute: Recompute = "none", offload: OffloadSetting = "none"
) -> tuple[Transformer, Loss]:
    scheme, mechanism = POSITIONS.config({"name": position}), ATTENTIONS.config({"name": "full"})
    model = Transformer(SIZES, scheme, mechanism, vocab_size=VOCAB, context=context)
    model.recompute = recompute

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        with offloading(offload, model.parameters()):
            hidden = model.hidden(tokens)
        return model.nats(hidden, targets).mean()

    return model, loss


class GPT2Block(nn.Module):
    """GPT-2's block (Radford et al. 2019, section 2.3) as nanoGPT trains it: LayerNorm before each part, one projection for
    q, k and v, torch's fused attention, GELU, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
        self.qkv, self.out = nn.Linear(D_MODEL, 3 * D_MODEL), nn.Linear(D_MODEL, D_MODEL)
        self.up, self.down = nn.Linear(D_MODEL, PLAIN), nn.Linear(PLAIN, D_MODEL)

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            part.unflatten(-1, (N_HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.before_attention(x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(*heads, is_causal=True)  # (B,H,T,D)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class GPT2(nn.Module):
    """Learned positions, blocks, a last norm, the embedding as the head: tokens (B,T) -> logits (B,T,V)."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCAB, D_MODEL), nn.Embedding(context, D_MODEL)
        self.blocks = nn.Sequential(*(GPT2Block() for _ in range(N_LAYERS)))
        self.norm = nn.LayerNorm(D_MODEL)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return F.linear(self.norm(self.blocks(x)), self.embedding.weight)


def nanogpt(context: int) -> tuple[nn.Module, Loss]:
    model = GPT2(context)
    return model, lambda tokens, targets: _nats(model(tokens), targets)


def new_llama(context: int) -> Any:
    """Hugging Face's Llama of the sizes of ours, in train mode, that no token ends."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, intermediate_size=GATED, num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS, max_position_embeddings=context, tie_word_embeddings=True,
        attn_implementation="sdpa", rms_norm_eps=SIZES.norm_eps, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def llama(context: int, *, checkpoints: bool = False) -> tuple[nn.Module, Loss]:
    model = new_llama(context)
    model.config.use_cache = False
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, lambda tokens, targets: _nats(model(input_ids=tokens).logits, targets)


def litgpt(context: int) -> tuple[nn.Module, Loss]:
    from litgpt import GPT, Config

    model = GPT(
        Config(
            block_size=context, vocab_size=VOCAB, padded_vocab_size=VOCAB, n_layer=N_LAYERS, n_head=N_HEADS, n_embd=D_MODEL,
            rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP", intermediate_size=GATED,
        )
    )  # fmt: skip
    model.lm_head.weight = model.transformer.wte.weight
    return model, lambda tokens, targets: _nats(model(tokens), targets)


def x_transformers(position: str, context: int) -> tuple[nn.Module, Loss]:
    from x_transformers import Decoder, TransformerWrapper

    # Its T5 bias refuses its fused attention.
    settings = {
        "rope": {"rotary_pos_emb": True, "attn_flash": True},
        "alibi": {"alibi_pos_bias": True, "attn_flash": True},
        "t5": {"rel_pos_bias": True},
    }
    layers = Decoder(dim=D_MODEL, depth=N_LAYERS, heads=N_HEADS, attn_dim_head=D_MODEL // N_HEADS, **settings[position])
    model = TransformerWrapper(
        num_tokens=VOCAB, max_seq_len=context, use_abs_pos_emb=False, tie_embedding=True, attn_layers=layers
    )
    return model, lambda tokens, targets: _nats(model(tokens), targets)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


Build = Callable[[int], tuple[nn.Module, Loss]]
OURS: dict[str, Build] = {f"ctxlab {name}": partial(ours, name) for name in ("rope", "alibi", "t5")}
PEERS: dict[str, Build] = {
    "nanoGPT's recipe": nanogpt,
    "HF Llama": llama,
    "litgpt": litgpt,
    **{f"x-transformers {name}": partial(x_transformers, name) for name in ("rope", "alibi", "t5")},
}
CONTESTANTS = {**OURS, **PEERS}
WAYS: dict[str, dict[str, Build]] = {
    "none": CONTESTANTS,
    "recompute": {
        "ctxlab rope": partial(ours, "rope", recompute="block"),
        "HF Llama": partial(llama, checkpoints=True),
    },
    "disk": {"ctxlab rope": partial(ours, "rope", offload="disk")},
}
"""As they are; with blocks that are made again; with what backward needs in a file. And who can."""
