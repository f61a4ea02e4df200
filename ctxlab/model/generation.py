"""Decoding: prompts in, one token a step out, sampled or the most likely.

One loop serves one prompt that is streamed and many that are decoded side by side. Prompts of a batch begin together: all
rows read what the shortest has in one forward, and a row whose prompt goes on is given its next token where another's
is chosen. So no row is padded, positions and caches are shared, and a row's tokens are those it has alone. A model that
reads a prompt both ways reads it at once: prompts of one length begin together there. What searches instead of drawing is
in beam.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ctxlab.errors import ConfigError, IncompatibleError, RunError
from ctxlab.model.base import Cache, Model
from ctxlab.registry import ComponentConfig

_ESCAPES = {"\\n": "\n", "\\t": "\t"}  # as a command line has them
_NUCLEUS = 64  # of the likeliest tokens, sorted first to see whether they are enough
_DRAWING = {"temperature": (0.0, 1.0), "top_k": (0,), "top_p": (1.0,), "min_p": (0.0,)}  # values that cut nothing


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
    min_p: float = Field(
        0.0, ge=0, le=1, description="sample from tokens at least this times as likely as the likeliest; 0: from all"
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        description="logits of tokens already there are divided by it, multiplied where below 0; 1: as they are",
    )
    stop_strings: tuple[str, ...] = Field((), description="the text ends before the first of them; \\n is a line's end")
    num_beams: int = Field(1, ge=1, description="hypotheses that are followed in search of the likeliest; 1: no search")
    length_penalty: float = Field(
        0.6, description="a in the score of a beam's hypothesis, ln p / ((5 + length) / 6)^a; 0: ln p itself"
    )
    cache: Literal["full", "streaming"] = Field(
        "full", description="streaming: of constant size, the first cache_sinks and the last cache_window tokens"
    )
    cache_sinks: int = Field(4, ge=0, description="first tokens that a streaming cache keeps")
    cache_window: int = Field(1024, ge=1, description="last tokens that a streaming cache keeps")

    @model_validator(mode="after")
    def _search_or_draw(self) -> DecodingConfig:
        if "" in self.stop_strings:
            raise ValueError("stop_strings: an empty one is everywhere")
        if self.num_beams == 1:
            return self
        for name, neutral in _DRAWING.items():
            if getattr(self, name) not in neutral:
                raise ValueError(f"num_beams: a search draws nothing; leave out {name}={getattr(self, name)}")
        if self.cache == "streaming":
            raise ValueError("num_beams: a search keeps all tokens; leave out cache=streaming")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, with line ends and tabs where a command line can only say `\\n` and `\\t`."""
        found = self.stop_strings
        for said, meant in _ESCAPES.items():
            found = tuple(stop.replace(said, meant) for stop in found)
        return found


class Reader:
    """Sequences that a model reads side by side, one a row, each token given all before it.

    Their beginnings have one length, and are the prefix of a model that has one; with a streaming cache, what does not fit it
    is read token by token.
    `encoded`: what an encoder-decoder has read of each row's source.
    """

    def __init__(self, model: Model, config: DecodingConfig, *, encoded: Any = None) -> None:
        self.model = model
        self.device = model.embedding.weight.device
        self.cache: Cache = (
            model.new_streaming_cache(sinks=config.cache_sinks, window=config.cache_window)
            if config.cache == "streaming"
            else model.new_cache()
        )
        self.capacity = config.cache_sinks + config.cache_window if config.cache == "streaming" else None
        self.more = {} if encoded is None else {"encoded": encoded}
        self.prefix: dict[str, Any] = {"prefix": "all"} if model.prefix else {}  # of what is read first

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Tokens (R,T) behind what is read already; the logits of what follows each row, (R,V) on the CPU, fp32 at least.

        Not in inference mode, where autocast keeps no weight that it has cast, and would cast all of them for every token.
        """
        tokens = tokens.to(self.device)
        prefix, self.prefix = self.prefix, {}
        if self.capacity is not None and tokens.shape[1] > self.capacity:
            if prefix:
                raise IncompatibleError(
                    f"decoding.cache: a prefix of {tokens.shape[1]} tokens is read at once, and the cache holds "
                    f"{self.capacity}; use full, or a larger cache_window"
                )
            self.model.hidden(tokens[:, : self.capacity], cache=self.cache, **self.more)
            for at in range(self.capacity, tokens.shape[1] - 1):
                self.model.hidden(tokens[:, at : at + 1], cache=self.cache, **self.more)
            tokens = tokens[:, -1:]
        hidden = self.model.hidden(tokens, cache=self.cache, **self.more, **prefix)
        logits = self.model.logits(hidden[:, -1])
        return logits.to("cpu", torch.promote_types(logits.dtype, torch.float32))

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows (n,), in this order; one may be there several times."""
        rows = rows.to(self.device)
        self.cache.keep(rows)
        if self.more:
            self.more = {"encoded": self.more["encoded"].keep(rows)}


def generate(
    model: Model,
    tokens: Sequence[int],
    config: DecodingConfig | None = None,
    *,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    encoded: Any = None,
) -> Iterator[int]:
    """Yields the tokens that follow `tokens`, each as soon as it is chosen, until one of `stop_ids` (not yielded) or enough.

    The prompt is read in one forward (a streaming cache takes what does not fit it token by token) and may be longer than
    the trained context; every further token costs one forward of itself behind what is cached. The same seed gives the
    same tokens. The model is used as it stands: put it in eval mode.
    Raises ConfigError on an empty prompt (a language model predicts what follows something), and UndefinedBeyondTraining,
    after all tokens that can be had, when the scheme has no meaning for the next position.
    """
    config = DecodingConfig() if config is None else config
    for _, token in _choices(model, [tokens], config, [seed], stop_ids, encoded):
        yield token


def decode(
    model: Model,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    stop_ids: Collection[int] = (),
    limits: Sequence[int] | None = None,
    is_over: Callable[[list[int]], bool] = lambda _: False,
    encoded: Any = None,
) -> list[list[int]]:
    """What follows each of several prompts, decoded side by side: each as `generate` has it alone with its seed (0 on).

    limits: the most new tokens of each, in place of max_new_tokens. A row also ends with the token after which `is_over`
    says so of its new tokens. Raises as `generate` does, of any row.
    """
    config = DecodingConfig() if config is None else config
    found: list[list[int]] = [[] for _ in prompts]
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(groups := begun_together(model, prompts)) > 1:
        for rows in groups:
            said = decode(
                model, [prompts[i] for i in rows], config, seeds=[seeds[i] for i in rows], stop_ids=stop_ids,
                limits=None if limits is None else [limits[i] for i in rows], is_over=is_over,
            )  # fmt: skip
            for i, new in zip(rows, said, strict=True):
                found[i] = new
        return found
    choices = _choices(model, prompts, config, seeds, stop_ids, encoded, limits)
    over = False
    try:
        while True:
            row, token = choices.send(over) if over else next(choices)
            found[row].append(token)
            over = is_over(found[row])
    except StopIteration:
        return found


def _choices(
    model: Model,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    seeds: Sequence[int],
    stop_ids: Collection[int],
    encoded: Any,
    limits: Sequence[int] | None = None,
) -> Generator[tuple[int, int], bool | None]:
    """(row, token) of everything that is chosen, step by step; a row that ends, or is told to, is not read on."""
    check_prompts(prompts)
    reader = Reader(model, config, encoded=encoded)
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
    texts = [list(prompt) for prompt in prompts]  # with what has been chosen
    rows = list(range(len(prompts)))  # that are still read
    left = [config.max_new_tokens for _ in prompts] if limits is None else list(limits)
    read = min(len(text) for text in texts)
    new = torch.tensor([text[:read] for text in texts])
    while rows:
        logits = reader.read(new)  # (R,V)
        ended = set()
        for place, row in enumerate(rows):
            if read < len(texts[row]):  # the prompt goes on
                continue
            token = choose(penalized(logits[place], texts[row], config), config, randoms[row])
            if token in stop_ids:
                ended.add(row)
                continue
            is_over = yield row, token
            texts[row].append(token)
            left[row] -= 1
            if is_over or not left[row]:
                ended.add(row)
        if ended:
            kept = [place for place, row in enumerate(rows) if row not in ended]
            rows = [rows[place] for place in kept]
            if rows:
                reader.keep(torch.tensor(kept))
        new = torch.tensor([[texts[row][read]] for row in rows])
        read += 1


def begun_together(model: Model, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Which prompts can be read side by side: all, but for a model that reads them both ways, those of one length."""
    alike: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        alike.setdefault(len(prompt) if model.prefix else 0, []).append(row)
    return list(alike.values())


def room(model: Model, read: int, config: DecodingConfig) -> int:
    """How many tokens can come behind `read` of them: max_new_tokens, or fewer where positions end; below 1: they end before.

    The last is not read, so of n positions n - read + 1 can be had. A streaming cache counts within itself: as long as all of
    it has positions, they do not end.
    """
    ends = model.n_positions
    if ends is None or (config.cache == "streaming" and config.cache_sinks + config.cache_window <= ends):
        return config.max_new_tokens
    return min(config.max_new_tokens, ends - read + 1)


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Raises ConfigError where one of them is empty."""
    if not all(len(prompt) for prompt in prompts):
        raise ConfigError("prompt: expected at least one token, got an empty prompt")


def penalized(logits: Tensor, text: Sequence[int], config: DecodingConfig) -> Tensor:
    """Logits (V,) in which every token of the text so far is less likely: x / p where x > 0, x p elsewhere.

    Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1, for scores of either sign as Hugging Face has it.
    """
    p = config.repetition_penalty
    if p == 1.0:
        return logits
    there = torch.tensor(sorted(set(text)))
    x = logits[there]
    return logits.scatter(0, there, torch.where(x > 0, x / p, x * p))


def choose(logits: Tensor, config: DecodingConfig, random: torch.Generator) -> int:
    """Draws a token from its `chances`: the first whose sum of chances so far reaches a uniform number. logits (V,).

    Sums are of float64, the number above 0: what has no chance is never drawn.
    """
    if config.temperature == 0:
        return int(logits.argmax())
    p, ids = chances(logits, config)
    sums = p.cumsum(-1, dtype=torch.float64)
    drawn = (1 - torch.rand((), generator=random, dtype=torch.float64)) * sums[-1]  # in (0, sums[-1]]
    if not drawn > 0:
        raise RunError("the model's logits are no numbers: nothing can be drawn from them")
    at = int(torch.searchsorted(sums, drawn))
    return at if ids is None else int(ids[at])


def chances(logits: Tensor, config: DecodingConfig) -> tuple[Tensor, Tensor | None]:
    """softmax(logits / temperature), cut to top_k, then to top_p, then to min_p: what is left of each token's (n,), not adding
    up to 1, and which tokens they are, (n,), where they are not all of the vocabulary in its order.

    Nucleus sampling: Holtzman et al. 2020, arXiv:1904.09751, section 3.1; the token that crosses p belongs to the nucleus.
    Min-p: Nguyen et al. 2024, arXiv:2407.01082, section 3; a token at least min_p times as likely as the likeliest stays.
    """
    scores, ids = logits.to(torch.float32), None
    # What is at most 0, divided in float64 by any number above 0, is at worst -inf, which is no chance and no NaN.
    scores = ((scores - scores.max()).double() / config.temperature).float()
    if 0 < config.top_k < scores.shape[0]:
        scores, ids = scores.topk(config.top_k)
    p = scores.softmax(-1)
    most = p.max()
    if config.top_p < 1:
        p = _nucleus(p, config.top_p)
    if config.min_p > 0:
        p = p.masked_fill(p < config.min_p * most, 0.0)
    return p, ids


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """p (n,) without all but the fewest of its largest that add up to top_p; of equal ones the first stay.

    Sorts only as many as that takes.
    """
    n = min(_NUCLEUS, len(p))
    while True:
        largest = p.topk(n).values
        inside = int((largest.cumsum(-1) - largest < top_p).sum())
        if inside < n or n == len(p):
            break
        n = min(8 * n, len(p))
    least = largest[inside - 1]
    above, level = p > least, p == least
    kept = above | (level & (level.cumsum(-1) <= inside - above.sum()))
    return p.masked_fill(~kept, 0.0)
