"""Decoding: a prompt in, one token after the other out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ctxlab.errors import ConfigError
from ctxlab.model.base import Cache, Model
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
    cache: Literal["full", "streaming"] = Field(
        "full", description="streaming: of constant size, the first cache_sinks and the last cache_window tokens"
    )
    cache_sinks: int = Field(4, ge=0, description="first tokens that a streaming cache keeps")
    cache_window: int = Field(1024, ge=1, description="last tokens that a streaming cache keeps")


def generate(
    model: Model,
    tokens: Sequence[int],
    config: DecodingConfig | None = None,
    *,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yields the tokens that follow `tokens`, each as soon as it is chosen, until one of `stop_ids` (not yielded) or enough.

    The prompt is read in one forward (a streaming cache takes what does not fit it token by token) and may be longer than
    the trained context; every further token costs one forward of itself behind what is cached. The same seed gives the
    same tokens. The model is used as it stands: put it in eval mode.
    Raises ConfigError on an empty prompt (a language model predicts what follows something), and UndefinedBeyondTraining,
    after all tokens that can be had, when the scheme has no meaning for the next position.
    """
    if not tokens:
        raise ConfigError("prompt: expected at least one token, got an empty prompt")
    config = DecodingConfig() if config is None else config
    device = model.embedding.weight.device
    random = torch.Generator().manual_seed(seed)
    cache, new = _read(model, torch.tensor([list(tokens)], device=device), config)
    for _ in range(config.max_new_tokens):
        with torch.inference_mode():
            logits = model.logits(model.hidden(new, cache=cache)[0, -1])  # (V,)
            chosen = choose(logits.cpu(), config, random)
        if chosen in stop_ids:
            return
        yield chosen
        new = torch.tensor([[chosen]], device=device)


@torch.inference_mode()
def greedy(model: Model, prompts: Tensor, max_new_tokens: int, *, stop_id: int) -> Tensor:
    """The most likely token again and again behind prompts of one length (B,T): (B,n), n <= max_new_tokens.

    Ends early when every row has said `stop_id`; what a row says behind it means nothing.
    Raises UndefinedBeyondTraining when the scheme has no meaning for one of the positions.
    """
    cache = model.new_cache()
    new, said = prompts, []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    for _ in range(max_new_tokens):
        new = model.logits(model.hidden(new, cache=cache)[:, -1]).argmax(-1, keepdim=True)  # (B,1)
        said.append(new)
        ended |= new[:, 0] == stop_id
        if ended.all():
            break
    return torch.cat(said, dim=1)


def _read(model: Model, tokens: Tensor, config: DecodingConfig) -> tuple[Cache, Tensor]:
    """A cache, and the tokens (1,T) that are still to be read: what a streaming cache has no room for has been."""
    if config.cache == "full":
        return model.new_cache(), tokens
    capacity = config.cache_sinks + config.cache_window
    cache = model.new_streaming_cache(sinks=config.cache_sinks, window=config.cache_window)
    if tokens.shape[1] <= capacity:
        return cache, tokens
    with torch.inference_mode():
        for part in (tokens[:, :capacity], *tokens[:, capacity:-1].split(1, dim=1)):
            model.hidden(part, cache=cache)
    return cache, tokens[:, -1:]


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
