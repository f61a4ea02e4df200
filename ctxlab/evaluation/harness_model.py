"""A run as lm-evaluation-harness asks for one: text in, log-likelihoods and answers out. Imported where that is installed.

What a text begins with: nothing is added to it. A beginning-of-text token stands where otherwise nothing would: before an
empty context, and before a document whose every token is scored. That is how `ctxlab generate` reads a prompt, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from pydantic import ValidationError

from ctxlab.data.progress import Progress
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.until import Until
from ctxlab.errors import ConfigError
from ctxlab.evaluation.likelihood import Request, likelihoods
from ctxlab.model.base import Model
from ctxlab.model.generation import DecodingConfig, generate
from ctxlab.train.precision import Precision, autocast

MAX_NEW_TOKENS = 256  # of an answer, where a task does not say: what the harness's own models take
# What tasks call the most tokens of an answer; the first of them that is there counts, as in the harness.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass
class Counts:
    """What had to give way to the longest length that a request may have."""

    requests: int = 0
    cut: int = 0  # whose context lost its beginning
    shortened: int = 0  # answers that ended because no position was left


class HarnessModel(LM):
    """Answers the harness's three kinds of requests with a model of ours, on one process and one device.

    max_length: inputs of one forward, and of prompt and answer together. `failed` is set when one of the methods below
    raises: then the model failed, and not what a task makes of its answers.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        device: torch.device,
        precision: Precision,
        batch_tokens: int,
        seed: int,
        progress: Progress,
    ) -> None:
        super().__init__()  # rank 0 of 1
        self._device = device
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.precision = precision
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.progress = progress
        self.counts = Counts()
        self.failed = False

    def tok_encode(self, string: str) -> list[int]:
        """The run's own tokens of a text, and nothing else."""
        return self.tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(ln p(continuation | context), whether greedy decoding would say it) of each (context, continuation)."""
        with self._answering(requests):
            found = self._score([self._continuation(*instance.args) for instance in requests], "continuations")
            self.counts.cut += sum(cut for _, _, cut in found)
            return [(-nats, greedy) for nats, greedy, _ in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """ln p of each text, every token scored once, in windows of max_length (`evaluation/likelihood.py`)."""
        with self._answering(requests):
            ids = [self.tok_encode(instance.args[0]) for instance in requests]
            found = self._score([_request([self.tokenizer.bos_id, *text], len(text)) for text in ids], "texts")
            return [-nats for nats, _, _ in found]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each (context, generation_kwargs), up to the first of its stop strings."""
        with self._answering(requests):
            advance = self.progress("generating answers", len(requests))
            answers = []
            for number, instance in enumerate(requests):
                context, asked = instance.args
                answers.append(self._answer(context, *decoding_of(asked), seed=self.seed + number))
                advance(1)
            return answers

    def _continuation(self, context: str, continuation: str) -> Request:
        """Context and continuation, tokenized together: what is scored begins where their tokens part from the context's own.

        Spaces that end a context are the continuation's, since they are part of its first word's token. A token that
        reaches from one into the other is scored.
        """
        whole, alone = self.tok_encode(context + continuation), self.tok_encode(context.rstrip())
        shared = next((i for i, (a, b) in enumerate(zip(whole, alone)) if a != b), min(len(whole), len(alone)))
        if shared == 0:
            return _request([self.tokenizer.bos_id, *whole], len(whole))
        return _request(whole, len(whole) - shared)

    def _score(self, requests: Sequence[Request], what: str) -> Sequence[tuple[float, bool, bool]]:
        advance = self.progress(f"scoring {what}", sum(request.scored for request in requests))
        return likelihoods(
            self.model, requests, longest=self.max_length, device=self._device, precision=self.precision,
            batch_tokens=self.batch_tokens, advance=advance,
        )  # fmt: skip

    def _answer(self, context: str, decoding: DecodingConfig, until: Sequence[str], *, seed: int) -> str:
        """Generates until a stop string, the end of the text, enough tokens, or the last position.

        A context that leaves too little room for its answer loses its beginning, but keeps half of the positions.
        """
        ids = self.tok_encode(context) or [self.tokenizer.bos_id]
        kept = ids[-max(1, self.max_length - decoding.max_new_tokens, self.max_length // 2) :]
        room = self.max_length - len(kept) + 1  # nothing is predicted from the last token
        new: list[int] = []
        with autocast(self.precision, self._device):
            tokens = generate(
                self.model, kept, decoding.model_copy(update={"max_new_tokens": min(decoding.max_new_tokens, room)}),
                seed=seed, stop_ids=(self.tokenizer.eos_id,),
            )  # fmt: skip
            pieces = Until(self.tokenizer.stream(_kept(tokens, new.append)), until)
            text = "".join(pieces)
        self.counts.shortened += not pieces.stopped and room < decoding.max_new_tokens and len(new) == room
        self.counts.cut += len(kept) < len(ids)
        return text

    @contextmanager
    def _answering(self, requests: Sequence[Instance]) -> Iterator[None]:
        self.counts.requests += len(requests)
        try:
            yield
        except BaseException:
            self.failed = True
            raise


def decoding_of(asked: dict[str, Any]) -> tuple[DecodingConfig, list[str]]:
    """A task's generation_kwargs as our settings, and its stop strings.

    As in the harness: greedy unless it says `do_sample: true`, or gives a temperature and does not say `do_sample: false`.
    Raises ConfigError for what our decoding does not have: an answer found in another way is another score.
    """
    left = dict(asked)
    until = left.pop("until", None) or []
    limits = [left.pop(name, None) for name in _LIMITS]
    sample, temperature = left.pop("do_sample", None), left.pop("temperature", None)
    if sample is None:
        sample = bool(temperature)
    settings: dict[str, Any] = {
        "max_new_tokens": int(next((limit for limit in limits if limit is not None), MAX_NEW_TOKENS)),
        "temperature": (1.0 if temperature is None else float(temperature)) if sample else 0.0,
    }
    settings |= {name: kind(left.pop(name)) for name, kind in (("top_k", int), ("top_p", float)) if name in left}
    if left.get("num_beams") == 1:
        del left["num_beams"]
    if left:
        raise ConfigError(f"its generation_kwargs ask for {', '.join(sorted(left))}, which decoding here does not have")
    try:
        return DecodingConfig(**settings), [until] if isinstance(until, str) else [stop for stop in until if stop]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(
            f"its generation_kwargs ask for {first['loc'][0]}={first['input']}: {first['msg']}"
        ) from error


def _request(tokens: Sequence[int], scored: int) -> Request:
    return Request(np.array(tokens, dtype=np.uint32), scored)


def _kept(tokens: Iterator[int], keep: Callable[[int], None]) -> Iterator[int]:
    """The same tokens, each handed to `keep` as it passes."""
    for token in tokens:
        keep(token)
        yield token
