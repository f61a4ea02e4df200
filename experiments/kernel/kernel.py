"""The native attention kernel against torch's own causal attention: time, memory, and errors against float64.

6 heads of 64, batch 1. All ways run in turns, a round each; `none` is the native kernel without a bias, `sdpa` is torch's
scaled_dot_product_attention, and the others are schemes on the native kernel, with all that their bias costs.

    python experiments/kernel/kernel.py [fp32|bf16] [ROUNDS]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ctxlab.cli.environment import set_process_defaults

set_process_defaults()  # before torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxlab.model.attention import native
from ctxlab.model.attention.blockwise import blockwise_attention
from ctxlab.model.attention.full import attend_to_all
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS
from ctxlab.train.precision import resolve_device, resolve_precision

CONTEXTS, CHECKED, WAYS = (2048, 8192), 1024, ("sdpa", "none", "t5", "kerple", "alibi", "fire")
MODEL = ModelConfig(d_model=384, n_layers=1, n_heads=6, n_kv_heads=6, head_dim=64, d_ff=1024)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHILD = "--memory"


class Way:
    """One way to compute attention, on inputs of its own; each is the same numbers."""

    def __init__(self, name: str, T: int, dtype: torch.dtype) -> None:
        self.name, self.T = name, T
        scheme = "rope" if name in ("sdpa", "none") else name
        torch.manual_seed(0)
        self.scheme = POSITIONS.get(scheme)(POSITIONS.config({"name": scheme}), MODEL, T)
        self.scheme.initialize()
        self.state, _ = self.scheme.prepare(torch.zeros(1, T, MODEL.d_model), 0, None)
        generator = torch.Generator().manual_seed(1)
        q, k, self.v, self.grad = (
            torch.randn(1, T, MODEL.n_heads, MODEL.head_dim, generator=generator).to(dtype).transpose(1, 2)
            for _ in range(4)
        )
        tables = self.scheme.tables(torch.arange(T), dtype)
        self.q, self.k = self.scheme.query(q, tables, self.state), self.scheme.key(k, tables, self.state)
        self.leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        # Not all parameters of a scheme are in every layer's bias; those of one layer are.
        self.parameters = list(self.scheme.parameters())

    def forward(self, kernel: native.Kernel = "native") -> Tensor:
        q, k, v = self.leaves
        if self.name == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scheme.scale)
        bias = self.scheme.bias(q, self.T, self.state)
        return attend_to_all(
            q, k, v, scale=self.scheme.scale, causal=True, bias=bias, lengths=None, lse_gradient=False, kernel=kernel
        )[0]

    def gradients(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, [*self.leaves, *self.parameters], self.grad.to(out.dtype))

    def exact(self) -> tuple[Tensor, ...]:
        """Output and gradients in float64, by the torch path."""
        leaves = [x.detach().double().requires_grad_() for x in self.leaves]
        bias = self.scheme.bias(leaves[0], self.T, self.state)
        out, _ = blockwise_attention(*leaves, scale=self.scheme.scale, causal=True, bias=bias)
        return out, *torch.autograd.grad(out, [*leaves, *self.parameters], self.grad.double())


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor over all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def speed(dtype: str, rounds: int) -> None:
    for context in CONTEXTS:
        ways = [Way(name, context, DTYPES[dtype]) for name in WAYS]
        found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in WAYS}
        for _ in range(rounds + 1):
            for way in ways:
                out: list[Tensor] = []
                ahead = timed(lambda way=way, out=out: out.append(way.forward()))
                back = timed(lambda way=way, out=out: way.gradients(out[0]))
                found[way.name].append((ahead[0], ahead[0] + back[0], ahead[1], ahead[1] + back[1]))
        best = {name: [min(column) for column in zip(*rows[1:])] for name, rows in found.items()}
        for name, rows in found.items():
            forward, both, cpu_forward, cpu_both = best[name]
            print(json.dumps({
                "way": name, "context": context, "dtype": dtype, "rounds": rounds,
                "forward_seconds": forward, "best_seconds": both,
                "median_seconds": statistics.median(row[1] for row in rows[1:]),
                "forward_cpu_seconds": cpu_forward, "cpu_seconds": cpu_both,
                "to_sdpa": cpu_both / best["sdpa"][3], "to_none": cpu_both / best["none"][3],
                "peak_bytes": memory(name, context, dtype),
            }), flush=True)  # fmt: skip


def memory(name: str, context: int, dtype: str) -> int:
    """Bytes that forward and backward take at their peak over the inputs, outputs and gradients among them."""
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    line = [sys.executable, __file__, CHILD, name, str(context), dtype]
    return int(subprocess.run(line, env={**os.environ, **exact}, capture_output=True, text=True, check=True).stdout)


def child(name: str, context: int, dtype: str) -> None:
    small, way = Way(name, 256, DTYPES[dtype]), Way(name, context, DTYPES[dtype])
    small.gradients(small.forward())
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    kept = way.gradients(way.forward())
    print(_status("VmHWM") - before)
    del kept


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def errors(dtype: str) -> None:
    """Relative errors in the Euclidean norm, of a scheme's parameters the largest.

    ALiBi's columns stand before a head's own; they are constants, whose gradients nobody asks for.
    """
    for name in WAYS:
        way = Way(name, CHECKED, DTYPES[dtype])
        out = way.forward()
        pairs = list(zip((out, *way.gradients(out)), way.exact()))
        pairs[:4] = [(a[..., -MODEL.head_dim :], b[..., -MODEL.head_dim :]) for a, b in pairs[:4]]
        each = [
            float((a.detach().double() - b.detach()).norm() / b.detach().norm())
            for a, b in pairs
            if b.norm() > 1e-6  # a shift of all scores, FIRE's last bias, has no gradient
        ]
        row = {"way": name, "context": CHECKED, "dtype": dtype, **dict(zip(("out", "dq", "dk", "dv"), each))}
        print(json.dumps(row | ({"parameters": max(each[4:])} if each[4:] else {})), flush=True)


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == [CHILD]:
        child(words[1], int(words[2]), words[3])
        return
    dtype = words[0] if words else str(resolve_precision("auto", resolve_device("cpu")))
    if dtype not in DTYPES:
        raise SystemExit(f"kernel: expected fp32 or bf16, got '{dtype}'")
    native.library()
    errors(dtype)
    speed(dtype, int(words[1]) if len(words) > 1 else 5)


main()
