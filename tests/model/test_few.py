"""Products and norms of few rows, against float64 and against those of many rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ctxlab.model.elementwise import rms_norm
from ctxlab.model.few import FEW, Projection, linear


class Calls(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, FEW), (FEW,), (FEW + 1,), (0, 1)])
@pytest.mark.parametrize("sizes", [(24, 7), (1024, 1030), (1, 1)])
def test_a_product_of_any_number_of_rows(sizes: tuple[int, int], shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    layer = Projection(*sizes, bias=biased)
    x = torch.randn(*shape, sizes[0])
    expected = x.double() @ layer.weight.double().T + (layer.bias.double() if biased else 0)
    with torch.no_grad():
        found = layer(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=5e-6)


def test_of_few_rows_by_a_large_matrix_onednn_computes_it_and_else_it_does_not() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    for rows, width, expected in ((1, 1024, True), (FEW, 1024, True), (FEW + 1, 1024, False), (1, 1023, False)):
        with torch.no_grad(), Calls() as calls:
            Projection(1024, width)(torch.randn(rows, 1024))
        assert any("mkldnn" in name for name in calls.names) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_formats_are_as_torch_has_them(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 5, dtype=dtype), torch.randn(3, 5, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(linear(x, weight), nn.functional.linear(x, weight))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x.float(), weight.float()).dtype == torch.bfloat16


def test_with_a_gradient_it_is_torchs_own() -> None:
    torch.manual_seed(0)
    mine, theirs = Projection(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 5)
    for layer in (mine, theirs):
        layer(x).square().sum().backward()
    assert torch.equal(mine.weight.grad, theirs.weight.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_the_norm_of_few_rows_is_that_of_many(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, rows, 48).to(dtype), torch.randn(48).to(dtype)
    high, factor = x.double(), weight.double()
    expected = high / (high.square().mean(-1, keepdim=True) + 1e-5).sqrt() * factor
    with torch.no_grad():
        found = rms_norm(x, weight, 1e-5, dtype)
    assert found.dtype == dtype
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)
