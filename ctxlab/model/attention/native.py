"""Blockwise attention as one compiled kernel for the CPU: native.cpp, built once a machine and torch into the user's cache.

`attention.kernel` says who computes: `torch` never comes here, `native` always does or refuses, and `auto` does where the
kernel is built (see `prepare`) and is not slower. On the CPU without a compiler everything runs as it would with `torch`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ctxlab.errors import ConfigError, DataError
from ctxlab.model.attention.bias import Bias, Compilable, Compiled, Span
from ctxlab.model.attention.visible import Visible
from ctxlab.model.kernels import has_no_numbers, kernels_of

Kernel = Literal["auto", "torch", "native"]

_HERE = Path(__file__).parent
SOURCES = (_HERE / "native.cpp", _HERE / "one_query.cpp", _HERE.parent / "decode_step.cpp")
"""What is compiled together: attention, that of one query, and what a block does between two calls of it in decoding."""

HEADERS = (_HERE / "vectors.h",)

FEWEST_QUERIES = 32
FEWEST_UNBIASED = 512
"""Under `auto`, fewer queries go to torch; in fp32 without a bias its own fused kernel is not slower below the second
(forward and backward on 2 cores with AVX2: as fast at 128 queries, up to 1.2 times as fast at 256, 0.63 times at 512)."""

PAYS_FROM = 1e13
"""Operations of a training from which on `auto` builds the kernel: minutes on two cores, against ten seconds of compiling."""

OPERATIONS_PER_SECOND = 1e11
"""What a machine of two cores does, to tell whether a run of so many seconds is worth it."""

DTYPES = (torch.float32, torch.bfloat16)


@_disable_dynamo
def native_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    bias: Bias | None,
    lengths: Tensor | None,
    visible: Visible | None,
) -> tuple[Tensor, Tensor]:
    """What `blockwise_attention` returns, from the same arguments: (out (B,H,T,Dv), lse (B,H,T)), both with gradients.

    Softmax weights and their gradients are rounded to the operands' dtype where they are multiplied, everything else is
    fp32. The same inputs give the same bits on any number of threads.
    """
    width = v.shape[3]
    if q.dtype == torch.bfloat16:  # numbers go to the products in pairs
        q, k, v = (torch.nn.functional.pad(x, (0, 1)) if x.shape[3] % 2 else x for x in (q, k, v))
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    tensors = () if bias is None else bias.tensors
    with torch.autocast("cpu", enabled=False):
        out, lse = _Native.apply(q, k, v, scale, causal, bias, lengths, visible, *tensors)
    return (out if out.shape[3] == width else out[..., :width]), lse


def takes(q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Bias | None, kernel: Kernel) -> bool:
    """Whether the native kernel computes this call. Raises ConfigError where `native` is asked for and cannot."""
    if kernel == "auto" and q.shape[2] < FEWEST_QUERIES and not torch.compiler.is_compiling():
        note(q, "torch")  # a decoded token has no time for more
        return False
    if kernel != "native" and kernels_of(q.device) != "cpu":
        return False  # at once: what torch's compiler has to step out for cuts a block into pieces
    return _takes(q, scale, bias, kernel)


@_disable_dynamo
def _takes(q: Tensor, scale: float, bias: Bias | None, kernel: Kernel) -> bool:
    problem = None if kernel == "torch" else _unsuited(q, scale, bias)
    if kernel == "native":
        if problem is not None:
            raise ConfigError(f"attention.kernel: native cannot compute {problem}; use auto or torch")
        library()
    enough = q.shape[2] >= fewest_queries(q.dtype, biased=bias is not None)
    native = kernel == "native" or (kernel == "auto" and problem is None and enough and loaded() is not None)
    note(q, "native" if native else "torch")
    return native


def fewest_queries(dtype: torch.dtype, *, biased: bool) -> int:
    """How many queries have to come at once for `auto` to run the kernel, but for one alone, which has a kernel of its own."""
    return FEWEST_QUERIES if biased or dtype != torch.float32 else FEWEST_UNBIASED


def may_read(x: Tensor) -> bool:
    """Whether compiled code may read x where it lies, and nobody misses the call: no gradient, no mode that watches."""
    return (
        x.is_cpu
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


def note(q: Tensor, ran: str) -> None:
    """Remembers what computed a call, for `ran`."""
    if kernels_of(q.device) == "cpu":
        _ran.add(ran)


_ran: set[str] = set()


def ran() -> str:
    """What computed softmax attention on the CPU since `forget`: `native`, `torch`, `native and torch`, or nothing."""
    return " and ".join(sorted(_ran))


def forget() -> None:
    _ran.clear()


def _unsuited(q: Tensor, scale: float, bias: Bias | None) -> str | None:
    if (kind := kernels_of(q.device)) != "cpu":
        return f"on {kind}"
    if q.dtype not in DTYPES:
        return f"in {str(q.dtype).removeprefix('torch.')}"
    if bias is not None and not isinstance(bias, Compilable):
        return "this position's bias"
    return None if scale > 0 else f"with a scale of {scale}"


# ---- the call


class _Problem(ctypes.Structure):
    """Field by field the struct of the same name in native.cpp."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("B", "H", "Hkv", "T", "S", "D", "Dv", "bf16", "dot_products")]
        + [("scale", ctypes.c_float)]
        + [(name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse")]
        + [(f"{name}_stride", ctypes.c_int64 * 3) for name in ("q", "k", "v", "out")]
        + [(name, ctypes.c_void_p) for name in ("low", "high", "lengths", "line")]
        + [(name, ctypes.c_int64) for name in ("line_heads", "line_length", "line_first", "tail")]
        + [(name, ctypes.c_void_p) for name in ("psi", "inverse", "knots", "straight", "bends")]
        + [(name, ctypes.c_int64) for name in ("K", "pad")]
        + [("f", ctypes.c_void_p)]
        + [(name, ctypes.c_void_p) for name in ("grad", "grad_lse", "dq", "dk", "dv")]
        + [(f"{name}_stride", ctypes.c_int64 * 3) for name in ("grad", "dq", "dk", "dv")]
        + [(name, ctypes.c_void_p) for name in ("d_line", "d_psi", "d_inverse", "d_pieces", "d_later", "d_earlier")]
    )


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, scale, causal, bias, lengths, visible, *tensors):  # type: ignore[no-untyped-def]
        out = _by_token(q, q.shape[2], v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        compiled = _compiled(q, k, causal, bias, tensors)
        _run("attention_forward", q, k, v, scale, causal, lengths, visible, compiled, out=out, lse=lse)
        ctx.save_for_backward(q, k, v, out, lse, lengths, *tensors)
        ctx.settings = (scale, causal, bias, visible)
        ctx.set_materialize_grads(False)
        return out, (lse if compiled.constant is None else lse + compiled.constant[:, None])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out, grad_lse):  # type: ignore[no-untyped-def]
        q, k, v, out, lse, lengths, *tensors = ctx.saved_tensors
        scale, causal, bias, visible = ctx.settings
        learned = any(ctx.needs_input_grad[8:])
        compiled = _compiled(q, k, causal, bias, tensors)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_out = grad_out if grad_out.stride(3) == 1 else grad_out.contiguous()
        if grad_lse is not None:
            grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0.0).contiguous()
        dq, dk, dv = (_by_token(x, x.shape[2], x.shape[3]) for x in (q, k, v))
        shapes = compiled.gradient_shapes if learned else {}
        found = {
            name: torch.zeros(
                q.shape[0], q.shape[1], *shape, dtype=torch.float64 if name == "d_pieces" else torch.float32
            )
            for name, shape in shapes.items()
        }
        _run(
            "attention_backward", q, k, v, scale, causal, lengths, visible, compiled,
            out=out, lse=lse, grad=grad_out, grad_lse=grad_lse, dq=dq, dk=dk, dv=dv, **found,
        )  # fmt: skip
        if not learned:
            return dq, dk, dv, *[None] * (5 + len(tensors))
        surplus = lse.new_zeros(q.shape[1]) if grad_lse is None else grad_lse.sum((0, 2))
        grads = compiled.gradients(found, surplus)
        wanted = [g.to(t.dtype) if n else None for g, t, n in zip(grads, tensors, ctx.needs_input_grad[8:])]
        return dq, dk, dv, None, None, None, None, None, *wanted


def _by_token(like: Tensor, n: int, width: int) -> Tensor:
    """(B,H,n,width), as a projection's output lies in memory: all heads of a token together."""
    return like.new_empty(like.shape[0], n, like.shape[1], width).transpose(1, 2)


def _compiled(q: Tensor, k: Tensor, causal: bool, bias: Bias | None, tensors: Any) -> Compiled:
    if bias is None:
        return Compiled({}, None, {}, lambda found, surplus: ())
    assert isinstance(bias, Compilable), "takes comes first"
    span = Span(q.shape[2], k.shape[2], causal, 0, torch.float32, q.device, False)
    return bias.compiled(tuple(tensors), span, _padding())


def _run(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    lengths: Tensor | None,
    visible: Visible | None,
    compiled: Compiled,
    **tensors: Tensor | None,
) -> None:
    B, H, T, D = q.shape
    Hkv, S = k.shape[1:3]
    if not q.is_cpu or has_no_numbers(q):
        return
    i = torch.arange(S - T, S)
    low = torch.zeros_like(i) if visible is None else visible.seen_by(i)[0]
    high = torch.full_like(i, S) if visible is None else visible.seen_by(i)[1].clamp(max=S)
    if causal:
        high = torch.minimum(high, i + 1)
    problem = _Problem(
        B=B, H=H, Hkv=Hkv, T=T, S=S, D=D, Dv=v.shape[3], bf16=q.dtype == torch.bfloat16, dot_products=dot_products(),
        scale=scale,
    )  # fmt: skip
    kept = {"q": q, "k": k, "v": v, "low": low, "high": high, "lengths": lengths, **tensors}
    if lengths is not None:
        kept["lengths"] = lengths.to(torch.int64).contiguous()
    for name, value in compiled.fields.items():
        if isinstance(value, Tensor):
            kept[name] = value
        else:
            setattr(problem, name, value)
    for name, x in kept.items():
        if x is None:
            continue
        setattr(problem, name, x.data_ptr())
        if hasattr(problem, f"{name}_stride"):
            setattr(problem, f"{name}_stride", (ctypes.c_int64 * 3)(*x.stride()[:3]))
    kernel = library()
    if getattr(kernel, function)(ctypes.byref(problem)):
        raise RuntimeError(f"attention, native: {kernel.attention_problem().decode()}")


# ---- building


@functools.cache
def dot_products() -> bool:
    """Whether the processor multiplies bf16 itself, by oneDNN's word; else the kernel does in fp32, from bf16 numbers."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def why_not() -> str | None:
    """Why no kernel can be built here; None where it can, or is."""
    if sys.platform != "linux":
        return f"it is built on Linux only, this is {platform.system()}"
    if _file().exists():
        return None if is_built() else f"the one that was built cannot be loaded (remove {_file()} to build it again)"
    if _failed().exists():
        return f"it could not be built ({_failed()} says why; remove it to try again)"
    try:
        compiler = _compiler()
    except ValueError as error:
        return f"CXX cannot be read as a command ({error})"
    return None if shutil.which(compiler[0]) else f"there is no C++ compiler here ({compiler[0]})"


def is_built() -> bool:
    """Whether there is a kernel, and it can be loaded."""
    return loaded() is not None


def prepare(kernel: Kernel, operations: float, say: Callable[[str], None]) -> None:
    """Builds the kernel if it is not there and is asked for, or if under `auto` a run of so many operations is worth it.

    `say` hears that it is built, or why a run that would be worth it goes without. Raises ConfigError where `native` cannot be.
    """
    if kernel == "torch" or is_built() or (kernel == "auto" and operations < PAYS_FROM):
        return
    reason = why_not()
    if reason is None:
        say("building the native attention kernel, once, about ten seconds")
        try:
            reason = _build()
        except DataError as error:  # nobody may write there
            reason = str(error)
    if reason is not None and kernel == "native":
        raise ConfigError(f"attention.kernel: no native kernel: {reason}; use auto or torch")
    if reason is not None:
        say(f"attention runs in torch, without the native kernel: {reason}")


def library() -> ctypes.CDLL:
    """The kernel, built if need be. Raises ConfigError where it cannot be."""
    found = loaded()
    if found is None:
        reason = why_not() or _build()
        found = None if reason else loaded()
        if found is None:
            raise ConfigError(f"attention.kernel: no native kernel: {reason}; use auto or torch")
    return found


_libraries: dict[Path, ctypes.CDLL | None] = {}  # what there was on the disk; None: it cannot be loaded
_last: tuple[str | None, ctypes.CDLL] | None = None  # the one that was asked for last, and of which CTXLAB_CACHE


def loaded() -> ctypes.CDLL | None:
    """The kernel, if it is built; looked for on the disk until it is found."""
    global _last
    cache = os.environ.get("CTXLAB_CACHE")
    if _last is not None and _last[0] == cache:  # every decoded token asks, and has no time for paths
        return _last[1]
    if sys.platform != "linux":
        return None
    file = _file()
    if file not in _libraries and file.exists():
        _libraries[file] = _open(file)
    found = _libraries.get(file)
    if found is not None:
        _last = cache, found
    return found


def _open(file: Path) -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL(str(file))
    except OSError:  # a disk that runs no programs, another system's file, half of a copy
        return None
    found.decode_step.restype = found.attention_of_one.restype = None
    found.attention_problem.restype = ctypes.c_char_p
    found.attention_padding.restype = ctypes.c_int64
    return found


@functools.cache
def _padding() -> int:
    return int(library().attention_padding())


@functools.cache
def _key() -> str:
    """All that the compiled code depends on: its source, torch's headers and the processor's instructions."""
    said = (
        *(file.read_bytes() for file in (*SOURCES, *HEADERS)),
        torch.__version__,
        _flags(),
        _instructions(),
        platform.machine(),
        sysconfig.get_platform(),
    )
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next(
        (" ".join(sorted(line.split(":", 1)[1].split())) for line in lines if line.startswith(("flags", "Features"))),
        "",
    )


def _file() -> Path:
    from ctxlab.cache import default_cache

    return default_cache() / "native" / f"attention-{_key()}.so"


def _failed() -> Path:
    return _file().with_suffix(".failed")


def _compiler() -> list[str]:
    """The words of CXX, which may be several (`ccache g++`), or c++. Raises ValueError where quotes stay open."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _flags() -> tuple[str, ...]:
    """For this processor, with at::vec as wide as torch's own kernels."""
    capability = torch.backends.cpu.get_cpu_capability()
    capability = capability if capability in ("AVX2", "AVX512") else "DEFAULT"
    machine = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    return (
        "-std=c++20", "-O3", machine, "-fPIC", "-shared", "-fopenmp", "-w",
        f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}",
    )  # fmt: skip


_TRANSIENT = re.compile(
    "(?i)no space left|cannot allocate|memory exhausted|out of memory|quota exceeded|signal terminated"
)
"""What a compiler says of the machine, not of what it compiles."""


def _build() -> str | None:
    """Compiles, one process at a time, and puts the result in its place at once. Returns what went wrong, if anything."""
    from ctxlab.data.lock import locked

    file = _file()
    home = Path(torch.__file__).parent
    with locked(file):
        if file.exists():
            return None
        made = file.with_suffix(f".{os.getpid()}")
        objects = [made.with_suffix(f"{made.suffix}.{source.stem}.o") for source in SOURCES]
        begin = [
            *_compiler(), *_flags(), f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f"-I{home / 'include'}", f"-I{home / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
        ]  # fmt: skip
        end = [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(made)]
        problem = _all_at_once([[*begin, "-c", str(s), "-o", str(o)] for s, o in zip(SOURCES, objects, strict=True)])
        problem = problem or _all_at_once([[*begin, *map(str, objects), *end]])
        for each in objects:
            each.unlink(missing_ok=True)
        if problem is not None:
            made.unlink(missing_ok=True)
            code, said = problem
            if _TRANSIENT.search(said) or code < 0:  # it may do another time
                return f"it could not be built: {said.strip().splitlines()[-1]}"
            _failed().write_text(said)
            return why_not()
        made.replace(file)
        _libraries.pop(file, None)
    return None


def _all_at_once(commands: Sequence[Sequence[str]]) -> tuple[int, str] | None:
    """Runs commands side by side; of the first that fails, how it ended and what it said."""
    children = [
        subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for words in commands
    ]
    said = [child.communicate()[1] for child in children]
    return next(
        (
            (child.returncode, text or f"{words[0]} ended with {child.returncode}")
            for child, text, words in zip(children, said, commands, strict=True)
            if child.returncode
        ),
        None,
    )
