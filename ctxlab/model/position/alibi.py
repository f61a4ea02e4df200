"""ALiBi: a penalty on the score that grows linearly with the distance, at a fixed rate for each head."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position

_SHIFTS = (16, 8, 0)  # of a position's digits in base 256: positions below 2^24
_COLUMNS = 2 * (len(_SHIFTS) + 1)


@POSITIONS.register("alibi")
class ALiBi(Position):
    """bias_ij = -m_h (i - j), m_h = 2^(-8h/H), h = 1 .. H, added after the scaling.

    Press et al. 2022, arXiv:2108.12409, section 3. The bias is a product, so it rides in the fused kernel as 8 columns put
    before those of q and k, for each of the two parts of the slope one with a part of the row's constant and three with the
    digits of the key's position:

        m / scale (j - i) = sum_n ( s_n 256^2 j_2 + c_in + s_n 256 j_1 + s_n j_0 )
        m / scale = s_0 + s_1 ,   sum_n c_in = -i m / scale

    Every entry is exact in the dtype of q and k, and so is every product in the kernel's fp32 sum. In bf16 the slope is kept to
    16 bits: a relative error of the bias below 2^-17, the same at all distances. The constant of a row changes no attention
    weight; it cancels the sum near the diagonal, where it matters, before the content is added: that is why the columns come
    first. It stands right behind the highest digit: a sum of all digits would first need more bits than fp32 has. In bf16
    it is rounded to 16 bits and shifts a row's log-sum-exp by at most 2^-16 m i, alike in every part of the row, so that
    merged parts stay right.

    For H no power of two, the slopes are those of the power of two below, then every other one of the power above (as in
    the authors' code). Causal only: the columns know i - j, not its absolute value.
    """

    class Config(Position.Config):
        name: Literal["alibi"] = "alibi"

    paper = "Press et al. 2022, arXiv:2108.12409"
    form = "separable"
    relative = True
    bidirectional = False

    @classmethod
    def key_columns(cls, config: Position.Config, model: ModelConfig) -> int:
        return _COLUMNS

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The columns of queries, (H,T,8), and of keys, (1,T,8), at these positions."""
        bits = 1 - round(math.log2(torch.finfo(dtype).eps))  # significant ones: 8 in bf16, 24 in fp32
        slope = torch.tensor(slopes(self.model.n_heads), dtype=torch.float64, device=positions.device) / self.scale
        slope = _parts(slope, (8, max(8, bits - 8)))  # (2,H)
        row = _parts(-slope.sum(0)[:, None] * positions, (bits, bits))  # (2,H,T)
        digits = [(positions >> shift & 255) << shift for shift in _SHIFTS]  # 3 x (T,)
        queries, keys = [], []
        for s, c in zip(slope, row):
            s = s[:, None].expand_as(c)
            queries += [s, c] + [s] * (len(digits) - 1)
            keys += [digits[0], torch.ones_like(positions), *digits[1:]]
        return torch.stack(queries, -1).to(dtype), torch.stack(keys, -1)[None].to(dtype)

    def query(self, q: Tensor, tables: Any, state: Any) -> Tensor:
        columns = tables[0]
        return torch.cat([columns.expand(q.shape[0], *columns.shape), q], dim=-1)  # (B,H,T,8+D)

    def key(self, k: Tensor, tables: Any, state: Any) -> Tensor:
        columns = tables[1]
        return torch.cat([columns.expand(*k.shape[:2], *columns.shape[1:]), k], dim=-1)  # (B,Hkv,T,8+D)


def slopes(n_heads: int) -> list[float]:
    """m_h of every head: the penalty a token of distance costs."""
    whole = 2 ** math.floor(math.log2(n_heads))
    first = [2 ** (-8 * h / whole) for h in range(1, whole + 1)]
    between = [2 ** (-4 * h / whole) for h in range(1, 2 * whole + 1, 2)]
    return first + between[: n_heads - whole]


def _parts(values: Tensor, bits: tuple[int, int]) -> Tensor:
    """float64 values as the sum of two numbers of so many significant bits, (2, ...), the larger first."""
    parts = []
    for n in bits:
        mantissa, exponent = torch.frexp(values)
        parts.append(torch.ldexp(torch.round(mantissa * 2.0**n) / 2.0**n, exponent))
        values = values - parts[-1]
    return torch.stack(parts)
