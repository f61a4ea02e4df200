"""FlexAttention against the blockwise function: the same arguments, the same results."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from ctxlab.model.attention import flex
from ctxlab.model.attention.bias import Bias, BlockBias, Difference, Toeplitz
from ctxlab.model.attention.blockwise import blockwise_attention
from ctxlab.model.attention.flex import can_flex, flexible_attention
from ctxlab.model.attention.visible import Chunk, Remembered, Visible, Window

RULES = {"all": None, "window": Window(50), "chunk": Chunk(60), "remembered": Remembered(20, 40)}


@pytest.fixture
def backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has no backward for a CPU and refuses."""
    monkeypatch.setattr(sys.modules[flex_attention.__module__], "_validate_device", lambda *_: None)


@pytest.fixture
def by_formula(monkeypatch: pytest.MonkeyPatch, backward_on_cpu: None) -> None:
    """Not compiled: torch's formula, all scores at once."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)


def problem(
    T: int, S: int, *, bidirectional_bias: bool, dtype: torch.dtype, device: str = "cpu", width: int = 16
) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    inputs = [torch.randn(2, h, n, width, dtype=dtype, device=device) for h, n in ((4, T), (2, S), (2, S))]
    values = torch.randn(4, 2 * S - 1 if bidirectional_bias else S, dtype=torch.float32, device=device)
    return [x.requires_grad_() for x in inputs], values.requires_grad_()


def both(
    inputs: list[Tensor], values: Tensor, causal: bool, visible: Visible | None, lengths: Tensor | None, **how: Any
) -> None:
    first, constant_from = 0 if causal else 1 - inputs[1].shape[2], how.pop("constant_from", None)
    compare(inputs, values, lambda x: Toeplitz(x, first, constant_from), causal, visible, lengths, **how)


def compare(
    inputs: list[Tensor], values: Tensor, bias: Callable[[Tensor], Bias], causal: bool, visible: Visible | None,
    lengths: Tensor | None, tolerance: float = 2e-5,
) -> None:  # fmt: skip
    common: dict[str, Any] = {"scale": 0.25, "causal": causal, "visible": visible}
    found = flexible_attention(*inputs, bias=bias(values), lengths=lengths, **common)
    expected = blockwise_attention(
        *(x.cpu() for x in inputs),
        bias=bias(values.cpu()),
        lengths=None if lengths is None else lengths.cpu(),
        **common,
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.cpu(), b, atol=tolerance, rtol=tolerance)
    upstream = [torch.randn(x.shape) for x in expected]
    upstream[1] = upstream[1].masked_fill(expected[1] == -torch.inf, 0.0)
    leaves = [*inputs, values]
    ours = torch.autograd.grad(found, leaves, [g.to(a) for g, a in zip(upstream, found)])
    theirs = torch.autograd.grad(expected, leaves, [g.to(a.dtype) for g, a in zip(upstream, expected)])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.cpu(), b.cpu(), atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.usefixtures("by_formula")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(300, 300), (130, 300), (1, 300)])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_blockwise_with_gradients(rule: str, causal: bool, T: int, S: int, padded: bool) -> None:
    inputs, values = problem(T, S, bidirectional_bias=not causal, dtype=torch.float32)
    lengths = torch.tensor([S, S - 35]) if padded else None
    both(inputs, values, causal, RULES[rule], lengths)


@pytest.mark.usefixtures("by_formula")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False])
def test_a_bias_that_is_constant_from_a_distance_on_gets_its_whole_gradient(causal: bool) -> None:
    inputs, values = problem(200, 200, bidirectional_bias=not causal, dtype=torch.float32)
    both(inputs, values, causal, None, None, constant_from=70)


def sums(S: int, device: str = "cpu") -> Tensor:
    """Of gates, (2,4,S) float64, that begin far from 0."""
    gates = torch.nn.functional.logsigmoid(torch.randn(2, 4, S, dtype=torch.float64, device=device))
    return (gates.cumsum(-1) - 1e5).requires_grad_()


@pytest.mark.usefixtures("by_formula")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("T", "S"), [(300, 300), (130, 300), (1, 300)])
def test_differences_equal_blockwise_with_gradients(rule: str, T: int, S: int) -> None:
    inputs, _ = problem(T, S, bidirectional_bias=False, dtype=torch.float32)
    compare(inputs, sums(S), Difference, True, RULES[rule], None)


def test_sums_that_do_not_cover_the_keys_are_refused() -> None:
    inputs, _ = problem(140, 140, bidirectional_bias=False, dtype=torch.float32)
    with pytest.raises(ValueError, match="f has 139 positions; needed: 140"):
        compare(inputs, sums(139), Difference, True, None, None)


def test_copies_are_made_only_of_what_is_learned() -> None:
    values = torch.randn(4, 300)
    seen = []
    for learned in (False, True):
        _, read = flex._added(Toeplitz(values.requires_grad_(learned), 0), 300, 300)
        seen.append(read[0].shape)
        with torch.no_grad():
            _, read = flex._added(Toeplitz(values, 0), 300, 300)
        assert read[0].shape == (1, 4, 300)
    assert seen == [(1, 4, 300), (flex.COPIES, 4, 300)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(700, 700), (130, 700)])
@pytest.mark.parametrize(("most", "side"), [(flex.MOST_BLOCKS, flex.BLOCK), (3, 2 * flex.BLOCK)])
def test_visits_the_blocks_that_somebody_sees_and_no_other(
    rule: str, causal: bool, T: int, S: int, most: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "MOST_BLOCKS", most)
    visible = RULES[rule]
    mask = flex._block_mask(T, S, causal, None, visible, torch.device("cpu"))
    i, j = torch.arange(S - T, S)[:, None], torch.arange(S)[None, :]
    seen = (j <= i) if causal else torch.ones(T, S, dtype=torch.bool)
    seen = seen if visible is None else seen & visible.sees(i, j)
    if mask is None:
        assert seen.all()
        return

    assert set(mask.BLOCK_SIZE) == {side}

    def blocks(pairs: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(pairs, (0, -S % side, 0, -T % side))
        return padded.unflatten(0, (-1, side)).unflatten(2, (-1, side))

    parts = blocks(seen)
    visited = mask.to_dense()[0, 0].bool()
    assert torch.equal(visited, parts.any(3).any(1))
    full = torch.zeros_like(visited)
    for row, n in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        full[row, mask.full_kv_indices[0, 0, row, :n].long()] = True
    assert (
        (parts | ~blocks(torch.ones_like(seen))).all(3).all(1)[full].all()
    )  # nothing is hidden in a block that counts as whole


def test_a_mask_of_a_long_text_is_a_list_of_blocks() -> None:
    mask = flex._block_mask(2**17, 2**17, True, None, Window(4096), torch.device("cpu"))
    assert mask is not None
    assert mask.kv_indices.numel() == (2**17 // flex.BLOCK) ** 2
    assert int((mask.kv_num_blocks + mask.full_kv_num_blocks).max()) == 4096 // flex.BLOCK + 1


@pytest.mark.slow
@pytest.mark.usefixtures("backward_on_cpu")
def test_however_many_kinds_of_call_a_process_makes_all_of_them_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules, batches, lengths with and without gradients, as training and the evaluation behind it bring them."""
    ran = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        def run(*inputs: Any) -> Any:
            nonlocal ran
            ran += 1
            return graph(*inputs)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, backend=counting)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    calls = 0
    for T, S, rows, with_gradient in [
        (160, 160, 2, True), (160, 160, 1, False), (130, 130, 2, False), (256, 256, 1, False), (300, 300, 2, False),
        (1, 200, 1, False), (1, 201, 1, False), (40, 300, 1, True),
    ]:  # fmt: skip
        for rule in (None, Window(50), Chunk(60)):
            q, k, v = (torch.randn(rows, 2, n, 16, requires_grad=with_gradient) for n in (T, S, S))
            flexible_attention(
                q, k, v, scale=0.25, causal=True, bias=Toeplitz(torch.randn(2, S), 0), lengths=None, visible=rule
            )  # fmt: skip
            calls += 1
    assert ran == calls


def test_a_list_of_blocks_is_made_once_and_serves_training_after_inference() -> None:
    rule, cpu = Window(50), torch.device("cpu")
    with torch.inference_mode():
        first = flex._kept_mask(300, 300, True, rule, cpu)
    assert first is flex._kept_mask(300, 300, True, Window(50), cpu)
    assert first is not flex._kept_mask(300, 300, True, Window(51), cpu)
    assert first is not None
    assert not first.kv_indices.is_inference()


def test_what_it_cannot_state_goes_blockwise() -> None:
    on = "cuda" if torch.cuda.is_available() else "meta"
    q = torch.empty(1, 2, flex.BLOCK, 64, dtype=torch.bfloat16, device=on)
    assert can_flex(q, q, None) == (on == "cuda")
    assert not can_flex(q[:, :, 1:], q, None)
    cpu = torch.empty(1, 2, flex.BLOCK, 64)
    assert not can_flex(cpu, cpu, None)
    assert not can_flex(q.double(), q.double(), None)
    assert not can_flex(q, q, BlockBias(lambda tile: cpu, ()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(300, 300), (130, 300), (1, 300)])
def test_compiled_on_cuda_it_is_the_same_with_gradients(rule: str, causal: bool, T: int, S: int) -> None:
    inputs, values = problem(T, S, bidirectional_bias=not causal, dtype=torch.float32, device="cuda", width=64)
    both(inputs, values, causal, RULES[rule], None, tolerance=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("T", "S"), [(300, 300), (130, 300)])
def test_compiled_on_cuda_differences_are_the_same_with_gradients(T: int, S: int) -> None:
    inputs, _ = problem(T, S, bidirectional_bias=False, dtype=torch.float32, device="cuda", width=64)
    compare(inputs, sums(S, "cuda"), Difference, True, None, None, tolerance=2e-3)
