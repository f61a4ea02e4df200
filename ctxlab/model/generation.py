"""Decoding: a prompt in, one token after the other out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from ctxlab.errors import ConfigError
from ctxlab.model.cache import KVCache
from ctxlab.model.transformer import Transformer
from ctxlab.registry import ComponentConfig


class DecodingConfig(ComponentConfig):
    """How the next token is chosen, in the words of Hugging Face's generation config."""

    max_new_tokens: int = Field(256, ge=1, description="tokens after the prompt, at most")
    temperature: float = Field(1.0, ge=0, description="logits are divided by it; 0 always takes the most likely token")
    top_k: int = Field(0, ge=0, description="sample from the k most likely tokens; 0: from all")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="sample from the fewest most likely tokens whose probabilities add up to p; 1: from all",
    )


def generate(
    model: Transformer,
    tokens: Sequence[int],
    config: DecodingConfig | None = None,
    *,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yields the tokens that follow `tokens`, each as soon as it is chosen, until one of `stop_ids` (not yielded) or enough.

    The prompt is read in one forward and may be longer than the trained context; every further token costs one forward of
    itself over the cached keys. The same seed gives the same tokens. The model is used as it stands: put it in eval mode.
    Raises ConfigError on an empty prompt (a language model predicts what follows something), and UndefinedBeyondTraining,
    after all tokens that can be had, when the scheme has no meaning for the next position.
    """
    if not tokens:
        raise ConfigError("prompt: expected at least one token, got an empty prompt")
    config = DecodingConfig() if config is None else config
    device = model.embedding.weight.device
    random = torch.Generator().manual_seed(seed)
    cache = KVCache(model.config.n_layers)
    new = torch.tensor([list(tokens)], device=device)  # (1,T)
    for _ in range(config.max_new_tokens):
        with torch.inference_mode():
            logits = model.logits(model.hidden(new, cache=cache)[0, -1])  # (V,)
            chosen = choose(logits.cpu(), config, random)
        if chosen in stop_ids:
            return
        yield chosen
        new = torch.tensor([[chosen]], device=device)


def choose(logits: Tensor, config: DecodingConfig, random: torch.Generator) -> int:
    """Draws a token from softmax(logits / temperature), cut to the top_k and then to the top_p most likely (V,).

    Nucleus sampling: Holtzman et al. 2020, arXiv:1904.09751, section 3.1; the token that crosses p belongs to the nucleus.
    """
    if config.temperature == 0:
        return int(logits.argmax())
    scores = logits.to(torch.float32) / config.temperature
    if 0 < config.top_k < scores.shape[0]:
        scores, ids = scores.topk(config.top_k)  # in falling order
    else:
        scores, ids = scores.sort(descending=True)
    p = scores.softmax(-1)
    if config.top_p < 1:
        before = p.cumsum(-1) - p
        p = p.masked_fill(before >= config.top_p, 0.0)
    return int(ids[torch.multinomial(p, 1, generator=random)])
