"""Attention without a bias: torch's kernel untouched where it fits, and equal to dense attention where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ctxlab.model.attention.fused import _with_padding, fused_attention
from tests.model.attention_kernels.reference import dense_attention, error, operands


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("D", "Dv"), [(8, 8), (5, 3), (8, 16), (12, 4), (17, 9)])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 13), (2, 2), (7, 13), (13, 13)])
@pytest.mark.parametrize("Hkv", [4, 2, 1])
def test_equals_dense_attention(Hkv: int, T: int, S: int, D: int, Dv: int, causal: bool) -> None:
    q, k, v, grad = operands(2, 4, Hkv, T, S, D, Dv)
    out, lse = fused_attention(q, k, v, scale=0.3, causal=causal)
    expected, expected_lse = dense_attention(q, k, v, scale=0.3, causal=causal)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    leaves = [q, k, v]
    for found, wanted in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("D", "Dv"), [(8, 8), (5, 3), (8, 16), (12, 4)])
@pytest.mark.parametrize(("T", "S"), [(1, 13), (7, 13), (13, 13)])
def test_the_log_sum_exp_carries_a_gradient_where_asked(T: int, S: int, D: int, Dv: int, causal: bool) -> None:
    q, k, v, grad = operands(2, 4, 2, T, S, D, Dv)
    grad_lse = torch.randn(2, 4, T, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = fused_attention(q, k, v, scale=0.3, causal=causal, lse_gradient=True)
    expected = dense_attention(q, k, v, scale=0.3, causal=causal)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    leaves = [q, k, v]
    for upstream in ((grad, grad_lse), (grad, None), (torch.zeros_like(grad), grad_lse)):
        outs, tops = zip(*((i, u) for i, u in enumerate(upstream) if u is not None))
        a = torch.autograd.grad([found[i] for i in outs], leaves, tops, retain_graph=True)
        b = torch.autograd.grad([expected[i] for i in outs], leaves, tops, retain_graph=True)
        for one, other in zip(a, b):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_one_more_column_hides_padded_keys_and_nothing_else() -> None:
    """What devices without a mask for it get: products with it are those without it, or lower than any other."""
    q, k, _, _ = operands(2, 4, 2, 7, 13, 5, 5)
    wide_q, wide_k = _with_padding(torch.tensor([13, 6]), q, k)
    assert wide_q.shape == (2, 4, 7, 6)
    assert wide_k.shape == (2, 2, 13, 6)
    found = wide_q @ wide_k.repeat_interleave(2, 1).mT
    scores = q @ k.repeat_interleave(2, 1).mT
    torch.testing.assert_close(found[0], scores[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1, ..., :6], scores[1, ..., :6], rtol=0, atol=1e-12)
    assert (found[1, ..., 6:] < -1e8).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.005)])
@pytest.mark.parametrize(("T", "S"), [(200, 200), (70, 200), (1, 200)])
def test_rounding(T: int, S: int, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v, _ = operands(1, 4, 2, T, S, 16, 16, dtype=dtype)
    out, lse = fused_attention(q, k, v, scale=0.25, causal=True)
    expected, expected_lse = dense_attention(q.double(), k.double(), v.double(), scale=0.25, causal=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert error(out, expected) < tolerance
    torch.testing.assert_close(lse, expected_lse.float(), rtol=0, atol=1e-4)  # as exact as torch's kernel gives it


class Calls(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.detach.default:  # a view, made by autograd itself
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("Hkv", [4, 2])
@pytest.mark.parametrize("strided", [False, True])
def test_training_runs_torchs_kernel_and_nothing_else(strided: bool, Hkv: int) -> None:
    """The same bits as scaled_dot_product_attention, one operator each way: no copies, key-value heads not repeated."""
    q, k, v, grad = (x.detach() for x in operands(2, 4, Hkv, 32, 32, 16, 16, dtype=torch.float32))
    if strided:  # as a projection's output comes, (B,T,H,D) in memory
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with Calls() as calls:
        out, _ = fused_attention(q, k, v, scale=0.25, causal=True)
    assert calls.names == ["_scaled_dot_product_flash_attention_for_cpu.default"]
    with Calls() as calls:
        found = torch.autograd.grad(out, leaves, grad)
    assert calls.names == ["_scaled_dot_product_flash_attention_for_cpu_backward.default"]
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    assert torch.equal(out, expected)
    for one, other in zip(found, torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_last_axis_may_be_strided() -> None:
    q, k, v, _ = operands(1, 2, 2, 9, 9, 8, 8)
    q, k, v = (x.detach().mT.contiguous().mT for x in (q, k, v))
    assert q.stride(3) != 1
    out, _ = fused_attention(q, k, v, scale=0.3, causal=True)
    torch.testing.assert_close(out, dense_attention(q, k, v, scale=0.3, causal=True)[0], rtol=1e-12, atol=1e-12)


def test_chunks_equal_one_forward() -> None:
    q, k, v, _ = operands(2, 4, 2, 40, 40, 8, 8, dtype=torch.float32)
    whole, lse = fused_attention(q, k, v, scale=0.3, causal=True)
    for start, stop in ((0, 13), (13, 14), (14, 40)):
        out, part = fused_attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], scale=0.3, causal=True)
        torch.testing.assert_close(out, whole[:, :, start:stop], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(part, lse[:, :, start:stop], rtol=1e-5, atol=1e-6)


def test_autocast_computes_in_bf16_as_torch_does() -> None:
    q, k, v, _ = operands(1, 2, 2, 40, 40, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = fused_attention(q, k.bfloat16(), v, scale=0.3, causal=True)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.0125), (torch.float64, 1e-11)]
)
@pytest.mark.parametrize(("T", "S"), [(50, 50), (20, 50), (1, 50)])
@pytest.mark.parametrize("Hkv", [4, 2])
def test_cuda_equals_dense_attention(Hkv: int, T: int, S: int, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v, grad = operands(2, 4, Hkv, T, S, 16, 8, dtype=dtype)
    leaves = [x.detach().cuda().requires_grad_() for x in (q, k, v)]
    out, lse = fused_attention(*leaves, scale=0.25, causal=True)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = dense_attention(*exact, scale=0.25, causal=True)
    assert error(out.cpu(), expected) < tolerance
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(out, leaves, grad.cuda())
    for one, other in zip(found, torch.autograd.grad(expected, exact, grad.double())):
        assert error(one.cpu(), other) < tolerance


def test_refuses_shapes_that_do_not_fit() -> None:
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"more queries than keys \(4 > 3\)"):
        fused_attention(x, x[:, :, :3], x[:, :, :3], scale=1.0, causal=True)
    with pytest.raises(ValueError, match="shapes do not fit"):
        fused_attention(x, x[..., :4], x, scale=1.0, causal=True)
    with pytest.raises(ValueError, match="differ in dtype"):
        fused_attention(x, x.bfloat16(), x, scale=1.0, causal=True)
