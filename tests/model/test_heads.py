"""Heads for fine-tuning: their losses are torch's, and what stands behind a row's end changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctxlab.model.heads import LabelHead, SpanHead, TaskHead

D = 6
LENGTHS = torch.tensor([5, 3, 1])


def hidden() -> Tensor:
    return torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))


def heads() -> list[Any]:
    torch.manual_seed(1)
    made: list[TaskHead] = [SpanHead(D)]
    made += [LabelHead(D, ("a", "b", "c", "d"), pooling, 0.0) for pooling in ("first", "mean", "last")]  # type: ignore[arg-type]
    for head in made:
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("head", heads(), ids=["span", "first", "mean", "last"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_torchs_of_the_row_alone(head: Any, smoothing: float) -> None:
    targets = torch.tensor([[4, 2], [0, 2], [0, 0]])[:, : 2 if isinstance(head, SpanHead) else 1].clamp(max=3)
    loss, nats = head.losses(hidden(), targets, LENGTHS, smoothing)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = head.scores(hidden()[row : row + 1, :length], LENGTHS[row : row + 1])[0]  # (k,C)
        expected = F.cross_entropy(alone, targets[row], reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(loss[row], expected)
        torch.testing.assert_close(nats[row], F.cross_entropy(alone, targets[row], reduction="none"))
    assert not nats.requires_grad


@pytest.mark.parametrize("head", heads(), ids=["span", "first", "mean", "last"])
def test_padding_changes_nothing_and_gets_no_gradient(head: Any) -> None:
    spoilt = hidden()
    for row, length in enumerate(LENGTHS.tolist()):
        spoilt[row, length:] = torch.nan
    clean, spoilt = hidden().requires_grad_(), spoilt.requires_grad_()
    targets = torch.zeros(3, 2 if isinstance(head, SpanHead) else 1, dtype=torch.int64)
    for given in (clean, spoilt):
        head.losses(given, targets, LENGTHS, 0.1)[0].sum().backward()
    assert clean.grad is not None
    assert spoilt.grad is not None
    for row, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(spoilt.grad[row, :length], clean.grad[row, :length])
        assert (clean.grad[row, length:] == 0).all()


def test_what_is_read_of_a_text() -> None:
    first, mean, last = heads()[1:]
    for row, length in enumerate(LENGTHS.tolist()):
        for head, read in (
            (first, hidden()[row, 0]),
            (mean, hidden()[row, :length].mean(0)),
            (last, hidden()[row, length - 1]),
        ):
            torch.testing.assert_close(head.scores(hidden(), LENGTHS)[row, 0], head.choose(read))


def test_targets_that_are_not_scored_count_nothing() -> None:
    head = heads()[0]
    targets = torch.tensor([[1, -100], [-100, -100], [0, 0]])
    loss, nats = head.losses(hidden(), targets, LENGTHS, 0.2)
    assert (loss[targets == -100] == 0).all()
    assert (nats[targets == -100] == 0).all()
    assert (nats[0, 0] > 0).item()
