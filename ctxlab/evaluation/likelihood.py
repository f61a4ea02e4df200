"""Nats of the ends of token sequences, many at a time: how likely a model holds a continuation, and whether it would say it.

A request is a sequence and how many of its last tokens are scored; what stands before them is their context. It is cut into
windows of at most `longest` inputs of which every scored token is the target of one, with as much context as fits:

    tokens          b 0 1 2 3 4 5 6 7 8 9, the last 10 scored, longest = 4
    inputs          b 0 1 2     3 4 5 6         5 6 7 8
    scored targets    0 1 2 3     4 5 6 7             8 9

Of a context that is longer than that the beginning is left out. Behind a beginning-of-text token this is the rolling
log-likelihood of lm-evaluation-harness (utils.get_rolling_token_windows with context_len 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctxlab.model.base import Model
from ctxlab.model.loss import chunk_for
from ctxlab.train.precision import Precision, autocast
from ctxlab.train.scoring import Window


class Request(NamedTuple):
    """Token ids (T,), and how many of the last are scored: fewer than T, since nothing predicts the first."""

    tokens: np.ndarray
    scored: int


class Likelihood(NamedTuple):
    """Nats of the scored tokens together, whether each of them is the model's first choice, whether context was left out."""

    nats: float
    greedy: bool
    cut: bool


class _Part(NamedTuple):
    """What is scored of one request behind some inputs."""

    request: int
    targets: np.ndarray


def request_windows(size: int, scored: int, longest: int) -> list[Window]:
    """The windows of a sequence of `size` tokens, in order."""
    found = []
    done = size - scored
    while done < size:
        new = min(longest, size - done)
        done += new
        start = max(0, done - 1 - longest)
        found.append(Window(start, done - 1 - start, new))
    return found


@torch.inference_mode()
def likelihoods(
    model: Model,
    requests: Sequence[Request],
    *,
    longest: int,
    device: torch.device,
    precision: Precision,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Likelihood]:
    """The likelihood of each request, in order. `advance` hears of the scored tokens.

    Windows of like width share a forward, those with the very same inputs a row of it: answers of one token to one
    question cost one pass. No tokens have no nats. The model is used as it stands: put it in eval mode.
    Raises UndefinedBeyondTraining where the model's positions end before `longest`.
    """
    nats, greedy = np.zeros(len(requests)), np.ones(len(requests), dtype=bool)
    cut = [False] * len(requests)
    rows: dict[bytes, tuple[np.ndarray, list[_Part]]] = {}
    for number, (tokens, scored) in enumerate(requests):
        windows = request_windows(len(tokens), scored, longest)
        cut[number] = bool(windows) and windows[0].start > 0
        for start, width, new in windows:
            inputs = tokens[start : start + width]
            targets = tokens[start + 1 + width - new : start + 1 + width]
            rows.setdefault(inputs.tobytes(), (inputs, []))[1].append(_Part(number, targets))
    for batch in _batches(sorted(rows.values(), key=lambda row: -len(row[0])), batch_tokens):
        parts = [part for _, several in batch for part in several]
        owners = np.repeat([part.request for part in parts], [len(part.targets) for part in parts])
        found, first_choice = _score(model, batch, device, precision)
        np.add.at(nats, owners, found)
        np.logical_and.at(greedy, owners, first_choice)
        advance(len(owners))
    return [Likelihood(float(n), bool(g), c) for n, g, c in zip(nats, greedy, cut, strict=True)]


def _batches(
    rows: Sequence[tuple[np.ndarray, list[_Part]]], batch_tokens: int
) -> Iterable[list[tuple[np.ndarray, list[_Part]]]]:
    """Rows, the widest first, in groups that stay within `batch_tokens` when padded to their widest; one at least."""
    first = 0
    while first < len(rows):
        count = max(1, batch_tokens // len(rows[first][0]))
        yield list(rows[first : first + count])
        first += count


def _score(
    model: Model, batch: list[tuple[np.ndarray, list[_Part]]], device: torch.device, precision: Precision
) -> tuple[np.ndarray, np.ndarray]:
    """Of every target of the batch, in order: its nats, float64, and whether the model's largest logit is its own."""
    width = len(batch[0][0])
    block = np.zeros((len(batch), width), dtype=np.int64)
    places, targets = [], []
    for row, (inputs, parts) in enumerate(batch):
        block[row, : len(inputs)] = inputs
        for part in parts:  # its last target is that of the row's last input
            end = row * width + len(inputs)
            places.append(np.arange(end - len(part.targets), end))
            targets.append(part.targets.astype(np.int64))
    lengths = torch.tensor([len(inputs) for inputs, _ in batch], device=device)
    wanted = torch.from_numpy(np.concatenate(targets)).to(device)  # (n,)
    with autocast(precision, device):
        hidden = model.hidden(torch.from_numpy(block).to(device), lengths=lengths)  # (B,T,d)
        picked = hidden.flatten(0, 1)[torch.from_numpy(np.concatenate(places)).to(device)]  # (n,d)
        size = chunk_for(model.vocab_size, device.type, model.loss_chunk)
        scored = [_choice(model.logits(h), t) for h, t in zip(picked.split(size), wanted.split(size), strict=True)]
    return (
        torch.cat([nats for nats, _ in scored]).double().cpu().numpy(),
        torch.cat([first for _, first in scored]).cpu().numpy(),
    )


def _choice(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-ln softmax(logits)_target in fp32 or more, and whether greedy decoding chooses the target: (n,V), (n,) -> (n,) twice."""
    first = logits.argmax(-1) == targets
    high = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return high.logsumexp(-1) - high.gather(1, targets[:, None])[:, 0], first
