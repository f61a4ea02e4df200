"""Chunked cross-entropy: the values and gradients of the plain one, whatever the chunk, without its memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctxlab.model.loss import chunk_for, smoothed_nats, token_nats


def case(dtype: torch.dtype = torch.float32, n: int = 37, d: int = 16, v: int = 53) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    targets = torch.randint(0, v, (n,))
    targets[::5] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
def test_equals_plain_cross_entropy(chunk: int) -> None:
    hidden, weight, targets = case()
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    nats = token_nats(hidden, weight, targets, chunk)
    torch.testing.assert_close(nats, plain, atol=1e-5, rtol=1e-6)
    assert (nats[targets == -100] == 0).all()
    expected = torch.autograd.grad(plain.sum() / 29, (hidden, weight))
    found = torch.autograd.grad(nats.sum() / 29, (hidden, weight))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_gradient_when_tokens_weigh_differently() -> None:
    hidden, weight, targets = case(torch.float64)
    weights = torch.rand(37, dtype=torch.float64)
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    expected = torch.autograd.grad((plain * weights).sum(), (hidden, weight))
    found = torch.autograd.grad((token_nats(hidden, weight, targets, 8) * weights).sum(), (hidden, weight))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("reduce", "products"), [(Tensor.sum, 15), (Tensor.mean, 15), (lambda x: x[:-1].sum(), 30)])
def test_logits_are_computed_again_only_for_tokens_that_weigh_differently(
    reduce: Callable[[Tensor], Tensor], products: int
) -> None:
    """Three products for each of five chunks, and once more where one weight does not do for all of them."""
    hidden, weight, targets = case()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        reduce(token_nats(hidden, weight, targets, 8)).backward()
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::mm") == products


def test_no_tokens_have_no_gradient() -> None:
    hidden, weight, targets = case()
    nats = token_nats(hidden[:0], weight, targets[:0], 8)
    found = torch.autograd.grad(nats.sum(), (hidden, weight))
    assert [x.abs().sum() for x in found] == [0, 0]


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
@pytest.mark.parametrize("chunk", [8, 100])
@pytest.mark.parametrize("weighed", [False, True])
def test_label_smoothing_is_that_of_torch(smoothing: float, chunk: int, weighed: bool) -> None:
    hidden, weight, targets = case(torch.float64)
    weights = torch.rand(37, dtype=torch.float64) if weighed else torch.tensor(1 / 29, dtype=torch.float64)
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    loss, nats = smoothed_nats(hidden, weight, targets, chunk, smoothing)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(nats, F.cross_entropy(logits, targets, reduction="none"), atol=1e-12, rtol=1e-12)
    assert not nats.requires_grad
    found = torch.autograd.grad((loss * weights).sum(), (hidden, weight))
    for a, b in zip(found, torch.autograd.grad((expected * weights).sum(), (hidden, weight))):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_gradient_check_in_float64() -> None:
    hidden, weight, targets = case(torch.float64, n=6, d=4, v=7)
    assert torch.autograd.gradcheck(lambda h, w: token_nats(h, w, targets, 4), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: token_nats(h, w, targets, 4).sum() * 0.3, (hidden, weight))


def test_bf16_losses_sum_in_fp32() -> None:
    """In bf16 only the logits are rounded: given them, the nats are exact."""
    torch.manual_seed(0)
    hidden = torch.randn(2048, 64).bfloat16()
    weight = torch.randn(512, 64) * 0.2
    targets = torch.randint(0, 512, (2048,))
    rounded = F.cross_entropy((hidden @ weight.bfloat16().T).double(), targets, reduction="none")
    nats = token_nats(hidden, weight, targets, 256)
    torch.testing.assert_close(nats.double(), rounded, atol=1e-5, rtol=0)
    exact = F.cross_entropy(hidden.double() @ weight.double().T, targets)
    assert abs(nats.double().mean() - exact) < 1e-3


def test_autocast_changes_nothing_inside() -> None:
    hidden, weight, targets = case()
    outside = token_nats(hidden, weight, targets, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = token_nats(hidden, weight, targets, 8)
    assert torch.equal(inside, outside)
    assert inside.dtype == torch.float32


def test_certain_and_impossible_targets() -> None:
    """A target whose probability underflows still has its exact nats: the difference of the logits."""
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[0.0], [500.0]])
    assert token_nats(hidden, weight, torch.tensor([1]), 1).item() == 0.0
    assert token_nats(hidden, weight, torch.tensor([0]), 1).item() == 500.0


def test_nan_reaches_the_loss() -> None:
    hidden, weight, targets = case()
    broken = hidden.detach().clone()
    broken[1] = torch.nan
    assert token_nats(broken, weight, targets, 8)[1].isnan()


def test_never_holds_all_logits() -> None:
    """Of 4096 x 1000 logits, no tensor larger than one chunk of 64 rows is ever made, forward or backward."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    hidden = torch.randn(4096, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    with Watch():
        token_nats(hidden, weight, torch.zeros(4096, dtype=torch.long), 64).sum().backward()
    assert largest == 64 * 1000


@pytest.mark.parametrize(
    ("vocab_size", "device", "chunk"),
    [(2048, "cpu", 1024), (8192, "cpu", 256), (128_256, "cpu", 64), (8192, "cuda", 4096), (50_257, "cuda", 1335)],
)
def test_default_chunk(vocab_size: int, device: str, chunk: int) -> None:
    assert chunk_for(vocab_size, device) == chunk
    assert chunk_for(vocab_size, device, 7) == 7
