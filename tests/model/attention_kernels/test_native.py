"""The native kernel equals dense attention in float64, on any shape, under any rule, on any number of threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctxlab.errors import ConfigError
from ctxlab.model.attention import native
from ctxlab.model.attention.bias import Bias, BlockBias, Difference, Toeplitz
from ctxlab.model.attention.blockwise import blockwise_attention
from ctxlab.model.attention.full import attend_to_all
from ctxlab.model.attention.native import native_attention
from ctxlab.model.attention.visible import Chunk, Remembered, Visible, Window
from ctxlab.model.position.fire import PiecewiseLinear
from tests.model.attention_kernels.reference import dense_attention, error, operands, positions

pytestmark = pytest.mark.usefixtures("native_kernel")

# B, H, Hkv, T, S, D, Dv: one tile, many, their last a row or two over; a query alone; widths that fill no vector.
SHAPES = [
    (1, 2, 2, 300, 300, 16, 16),
    (2, 4, 2, 70, 333, 20, 12),
    (1, 2, 1, 257, 257, 64, 64),
    (2, 2, 2, 1, 40, 8, 8),
    (1, 3, 3, 17, 390, 72, 64),
    (1, 2, 2, 130, 130, 5, 3),
]
RULES: list[Visible | None] = [None, Window(50), Window(200), Chunk(60), Remembered(32, 64)]
# Of fp32, and of the rounding of weights and results to bf16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.008}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert torch.equal(found.isfinite(), expected.isfinite())
    there = expected.isfinite()
    assert error(found[there], expected[there]) < tolerance if expected[there].any() else not found[there].any()


def compare(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    causal: bool,
    tail: int | None = None,
    biased: bool = True,
    rule: Visible | None = None,
    lengths: tuple[int, ...] | None = None,
) -> None:
    """out, lse and all gradients, of both, against the definition in float64 with every pair written out."""
    B, H, Hkv, T, S, D, Dv = shape
    low = [x.detach().requires_grad_() for x in operands(B, H, Hkv, T, S, D, Dv, dtype=dtype)]
    first = 0 if causal else 1 - T
    n = S - first if tail is None else min(tail, S - 1) + 1 - first
    values = normal(H, n, seed=1).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (*low[:3], values)]
    i, j = positions(T, S)
    table = exact[3][:, (i - j - first).clamp(0, n - 1)] if biased else None
    hidden = None if rule is None else ~rule.sees(i, j)
    keys = None if lengths is None else torch.tensor(lengths)
    bias = Toeplitz(values, first, tail) if biased else None
    found = native_attention(*low[:3], scale=0.3, causal=causal, bias=bias, lengths=keys, visible=rule)
    expected = dense_attention(*exact[:3], scale=0.3, causal=causal, bias=table, lengths=keys, hidden=hidden)
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    assert_near(found[0], expected[0], TOLERANCE[dtype])
    assert_near(found[1], expected[1], 1e-6)
    upstream, count = [low[3], normal(B, H, T, seed=2)], 4 if biased else 3
    if expected[1].isinf().any():  # the definition has no gradient of a log-sum-exp over nothing
        found, expected, upstream = found[:1], expected[:1], upstream[:1]
    ours = torch.autograd.grad(found, [*low[:3], values][:count], upstream)
    theirs = torch.autograd.grad(expected, exact[:count], [x.double() for x in upstream])
    for a, b in zip(ours, theirs):
        assert_near(a, b, TOLERANCE[dtype])


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
both_ways = pytest.mark.parametrize("causal", [True, False])


@dtypes
@both_ways
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("biased", "tail"), [(False, None), (True, None), (True, 30), (True, 0)])
def test_equals_dense_attention(
    shape: tuple[int, ...], biased: bool, tail: int | None, causal: bool, dtype: torch.dtype
) -> None:
    compare(shape, dtype, causal=causal, tail=tail, biased=biased)


@dtypes
@both_ways
@pytest.mark.parametrize("rule", RULES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_who_sees_whom(shape: tuple[int, ...], rule: Visible, causal: bool, dtype: torch.dtype) -> None:
    compare(shape, dtype, causal=causal, rule=rule)


@both_ways
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("lengths", [(333, 298), (100, 1), (0, 140)])
def test_padding_in_rows_of_the_batch(lengths: tuple[int, int], rule: Visible | None, causal: bool) -> None:
    compare(SHAPES[1], torch.float32, causal=causal, rule=rule, lengths=lengths)


@pytest.mark.parametrize("rule", RULES[1:], ids=str)
def test_an_interval_says_who_sees_whom(rule: Visible) -> None:
    i, j = torch.arange(500)[:, None], torch.arange(700)
    low, high = rule.seen_by(i)
    assert torch.equal((j >= low) & (j < high), rule.sees(i, j))
    assert (low.diff(dim=0) >= 0).all()
    assert (high.diff(dim=0) >= 0).all()


@dtypes
@pytest.mark.parametrize(("T", "S"), [(300, 300), (200, 450)])
def test_fire_is_exact(T: int, S: int, dtype: torch.dtype) -> None:
    """Pieces of any slope, more knots than any tile reaches, one beyond all distances, the normalizer of each query its own."""
    H, K = 3, 32
    low = [x.detach().requires_grad_() for x in operands(2, H, H, T, S, 16, 16, dtype=dtype)]
    psi = torch.log1p(torch.arange(S, dtype=torch.float64)).requires_grad_()
    normalizer = (psi.detach()[-1] * torch.logspace(0, -0.5, T, dtype=torch.float64)).requires_grad_()
    coefficients = normal(H, 2 + K, seed=3).double().requires_grad_()
    knots = torch.rand(K, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 2
    knots[5] = torch.inf
    knots.requires_grad_()
    bias = PiecewiseLinear(psi, normalizer, coefficients, knots)
    exact = [x.detach().double().requires_grad_() for x in low[:3]]
    i, j = positions(T, S)
    u = psi[(i - j).clamp(min=0)] / normalizer[:, None]
    hinges = F.relu(u[..., None] - knots).nan_to_num(0.0)
    table = coefficients[:, 0, None, None] + coefficients[:, 1, None, None] * u
    table = table + torch.einsum("tsk,hk->hts", hinges, coefficients[:, 2:])
    found = native_attention(*low[:3], scale=0.3, causal=True, bias=bias, lengths=None, visible=None)
    expected = dense_attention(*exact, scale=0.3, causal=True, bias=table)
    leaves = (psi, normalizer, coefficients, knots)
    upstream = [low[3], normal(2, H, T, seed=2)]
    ours = torch.autograd.grad(found, [*low[:3], *leaves], upstream)
    theirs = torch.autograd.grad(expected, [*exact, *leaves], [x.double() for x in upstream])
    for a, b in zip((*found, *ours), (*expected, *theirs)):
        assert_near(a, b, TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(300, 300), (200, 450), (1, 140)])
def test_differences_of_sums_are_exact(T: int, S: int, causal: bool, dtype: torch.dtype) -> None:
    """f falls from -100,000 on, where fp32 has steps of 0.008; rows of the batch have sums of their own."""
    low = [x.detach().requires_grad_() for x in operands(2, 4, 2, T, S, 16, 16, dtype=dtype)]
    f = -1e5 - torch.rand(2, 4, S, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).cumsum(2) / 20
    f.requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in low[:3]]
    found = native_attention(*low[:3], scale=0.3, causal=causal, bias=Difference(f), lengths=None, visible=None)
    expected = dense_attention(*exact, scale=0.3, causal=causal, bias=f[:, :, S - T :, None] - f[:, :, None])
    upstream = [low[3], normal(2, 4, T, seed=2)]
    ours = torch.autograd.grad(found, [*low[:3], f], upstream)
    theirs = torch.autograd.grad(expected, [*exact, f], [x.double() for x in upstream])
    for a, b in zip((*found, *ours), (*expected, *theirs)):
        assert_near(a, b, TOLERANCE[dtype])


def test_sums_that_do_not_cover_the_keys_are_refused() -> None:
    q, k, v, _ = operands(1, 2, 2, 40, 40, 8, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="f has 39 positions; needed: 40"):
        native_attention(
            q, k, v, scale=1.0, causal=True, bias=Difference(torch.zeros(1, 2, 39)), lengths=None, visible=None
        )


@dtypes
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_no_less_exact_than_torchs_own(spread: float, dtype: torch.dtype) -> None:
    q, k, v, grad = operands(1, 2, 2, 700, 700, 64, 64, dtype=dtype)
    q = (q.detach() * spread).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*exact, scale=0.125, causal=True)[0]
    wanted = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    errors = []
    for out in (
        native_attention(q, k, v, scale=0.125, causal=True, bias=None, lengths=None, visible=None)[0],
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125),
    ):
        found = (out, *torch.autograd.grad(out, [q, k, v], grad))
        errors.append([error(a, b) for a, b in zip(found, wanted)])
    for ours, theirs in zip(*errors):
        assert ours <= 1.15 * theirs  # where both are the rounding of the result, either may be ahead by a little


@pytest.mark.usefixtures("threads")
@dtypes
@pytest.mark.parametrize("heads", [(1, 4, 2), (5, 2, 2)])
def test_the_same_bits_on_any_number_of_threads(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    q, k, v, grad = operands(*heads, 300, 420, 16, 16, dtype=dtype)
    values = normal(heads[1], 420, seed=1).requires_grad_()
    runs = []
    for n in (1, 2, 5, 5):
        torch.set_num_threads(n)
        out, lse = native_attention(
            q, k, v, scale=0.25, causal=True, bias=Toeplitz(values, 0), lengths=None, visible=None
        )
        runs.append([out, lse, *torch.autograd.grad(out, [q, k, v, values], grad)])
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0]))


@dtypes
def test_the_future_has_no_influence_at_all(dtype: torch.dtype) -> None:
    q, k, v, _ = operands(1, 2, 1, 150, 150, 16, 16, dtype=dtype)
    changed = [x.detach().clone() for x in (k, v)]
    for x in changed:
        x[:, :, 97:] = 1e6
    before, after = (
        native_attention(q, *x, scale=0.5, causal=True, bias=None, lengths=None, visible=None)
        for x in ((k, v), changed)
    )
    for one, other in zip(before, after):
        assert torch.equal(one[:, :, :97], other[:, :, :97])


def test_strides_of_any_kind() -> None:
    """As projections give them, with the last axis apart, and broadcast over heads and batch."""
    q, k, v, _ = operands(2, 4, 4, 60, 60, 16, 16, dtype=torch.float32)
    by_token = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    apart = [x.detach().mT.contiguous().mT for x in (q, k, v)]
    how = {"scale": 0.3, "causal": True, "bias": None, "lengths": None, "visible": None}
    expected = native_attention(q, k, v, **how)
    for inputs in (by_token, apart):
        for one, other in zip(native_attention(*inputs, **how), expected):
            assert torch.equal(one, other)
    one_head = [q.detach(), k.detach()[:1, :1].expand(2, 4, -1, -1), v.detach()[:1, :1].expand(2, 4, -1, -1)]
    for one, other in zip(native_attention(*one_head, **how), native_attention(*(x.clone() for x in one_head), **how)):
        assert torch.equal(one, other)


@both_ways
def test_more_queries_than_keys_where_nothing_is_causal(causal: bool) -> None:
    T = 200 if not causal else 90
    compare((1, 2, 2, T, 90, 8, 8), torch.float32, causal=causal, biased=False)


def no_bias(H: int) -> None:
    return None


def distance(H: int) -> Bias:
    return Toeplitz(torch.zeros(H, 64), 0)


def by_function(H: int) -> Bias:
    return BlockBias(lambda tile: torch.zeros(()), ())


@pytest.mark.parametrize(
    ("make", "dtype", "T", "expected"),
    [
        (no_bias, torch.float32, native.FEWEST_UNBIASED - 1, "torch"),
        (no_bias, torch.float32, native.FEWEST_UNBIASED, "native"),
        (no_bias, torch.bfloat16, 64, "native"),
        (distance, torch.float32, 64, "native"),
        (distance, torch.bfloat16, 64, "native"),
        (no_bias, torch.float64, 64, "torch"),
        (by_function, torch.float32, 64, "torch"),
        (no_bias, torch.float32, 1, "torch"),
    ],
)
def test_auto_takes_what_it_can(
    make: Callable[[int], Bias | None], dtype: torch.dtype, T: int, expected: str, native_kernel: Callable[[], str]
) -> None:
    q, k, v, _ = operands(1, 2, 2, T, max(T, 64), 8, 8, dtype=dtype)
    how = {"scale": 0.3, "causal": True, "bias": make(2), "lengths": None, "lse_gradient": False}
    out, lse = attend_to_all(q, k, v, **how, kernel="auto")
    assert native_kernel() == expected
    native.forget()
    other, other_lse = attend_to_all(q, k, v, **how, kernel="torch")
    assert native_kernel() == "torch"
    torch.testing.assert_close(out, other, rtol=0, atol=1e-6 if dtype != torch.bfloat16 else 0.02)
    torch.testing.assert_close(lse, other_lse, rtol=0, atol=1e-4)


def test_native_refuses_what_it_cannot() -> None:
    q, k, v, _ = operands(1, 2, 2, 20, 20, 8, 8)
    how = {"causal": True, "kernel": "native"}
    with pytest.raises(ConfigError, match=r"attention\.kernel: native cannot compute in float64; use auto or torch"):
        blockwise_attention(q, k, v, scale=0.3, **how)
    q, k, v = q.float(), k.float(), v.float()
    with pytest.raises(ConfigError, match="native cannot compute this position's bias"):
        blockwise_attention(q, k, v, scale=0.3, bias=by_function(2), **how)
    with pytest.raises(ConfigError, match="native cannot compute with a scale of 0"):
        blockwise_attention(q, k, v, scale=0.0, **how)


# ---- building


def test_auto_builds_for_a_long_run_and_for_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXLAB_CACHE", str(tmp_path))
    built: list[str] = []
    monkeypatch.setattr(native, "_build", lambda: built.append("once"))
    said: list[str] = []
    native.prepare("auto", native.PAYS_FROM / 2, said.append)
    native.prepare("torch", native.PAYS_FROM * 2, said.append)
    assert not built
    assert not said
    native.prepare("auto", native.PAYS_FROM, said.append)
    native.prepare("native", 0.0, said.append)
    assert built == ["once", "once"]
    assert said == ["building the native attention kernel, once, about ten seconds"] * 2


def test_without_a_compiler_torch_runs_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXLAB_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    said: list[str] = []
    native.prepare("auto", native.PAYS_FROM, said.append)
    assert said == [
        "attention runs in torch, without the native kernel: there is no C++ compiler here (no-such-compiler)"
    ]
    q, k, v, _ = operands(1, 2, 2, 64, 64, 8, 8, dtype=torch.float32)
    native.forget()
    blockwise_attention(q, k, v, scale=0.3, causal=True, kernel="auto")
    assert native.ran() == "torch"
    with pytest.raises(ConfigError, match=r"attention\.kernel: no native kernel: there is no C\+\+ compiler here"):
        native.prepare("native", 0.0, said.append)


def test_a_compiler_may_be_several_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXLAB_CACHE", str(tmp_path))
    (tmp_path / "my tools").mkdir()
    for name, does in (("ccache", f'echo "$@" > {tmp_path}/words; shift; exec "$@"'), ("my tools/g++", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CXX", f"{tmp_path}/ccache '{tmp_path}/my tools/g++' -pipe")
    assert native.why_not() is None
    native.prepare("auto", native.PAYS_FROM, lambda _: None)
    assert (tmp_path / "words").read_text().startswith(f"{tmp_path}/my tools/g++ -pipe -std=c++20 ")
    monkeypatch.setenv("CXX", "no-such-cache g++")
    monkeypatch.setenv("CTXLAB_CACHE", str(tmp_path / "other"))
    assert native.why_not() == "there is no C++ compiler here (no-such-cache)"
    monkeypatch.setenv("CXX", "'g++")
    assert native.why_not() == "CXX cannot be read as a command (No closing quotation)"


def test_a_build_that_fails_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXLAB_CACHE", str(tmp_path))
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\necho x >> {tmp_path}/calls\necho 'no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    said: list[str] = []
    for _ in range(2):
        native.prepare("auto", native.PAYS_FROM, said.append)
    (reason,) = (tmp_path / "native").glob("*.failed")
    assert reason.read_text() == "no such header\n"
    assert [line for line in said if "could not be built" in line and str(reason) in line] == said[1:]
    assert len(said) == 3
    assert (tmp_path / "calls").read_text() == "x\n" * len(native.SOURCES)


def test_a_build_that_fails_for_want_of_room_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXLAB_CACHE", str(tmp_path))
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\necho 'fatal error: error writing to /tmp/x.s: No space left on device' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    said: list[str] = []
    for _ in range(2):
        native.prepare("auto", native.PAYS_FROM, said.append)
    assert said[0] == said[2] == "building the native attention kernel, once, about ten seconds"
    assert said[1] == said[3]
    assert "could not be built: fatal error: error writing to /tmp/x.s: No space left on device" in said[1]
    assert not list((tmp_path / "native").glob("*.failed"))


@pytest.mark.parametrize("kind", ["unloadable", "unwritable"])
def test_a_kernel_that_cannot_be_had_leaves_auto_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("CTXLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_libraries", {})
    if kind == "unloadable":
        native._file().parent.mkdir(parents=True)
        native._file().write_bytes(b"\x7fELF, and no more")
    else:
        (tmp_path / "cache").write_text("a file where a folder should be")
    said: list[str] = []
    native.prepare("auto", native.PAYS_FROM, said.append)
    expected = "the one that was built cannot be loaded" if kind == "unloadable" else "cannot be written"
    assert expected in said[-1]
    assert said[-1].startswith("attention runs in torch, without the native kernel: ")
    q, k, v, _ = operands(1, 2, 2, 64, 64, 8, 8, dtype=torch.float32)
    native.forget()
    blockwise_attention(q, k, v, scale=0.3, causal=True, kernel="auto")
    assert native.ran() == "torch"
    with pytest.raises(ConfigError, match=expected):
        native.prepare("native", 0.0, said.append)


def test_processes_that_come_at_once_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the compiler counts how often it is called, and takes its time."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\necho x >> {tmp_path}/calls\nsleep 0.5\nfor last; do :; done\necho made > "$last"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("CTXLAB_CACHE", str(tmp_path))
    code = "from ctxlab.model.attention import native; assert native._build() is None; assert native._file().exists()"
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert (tmp_path / "calls").read_text() == "x\n" * (len(native.SOURCES) + 1)  # each compiled, and all linked
