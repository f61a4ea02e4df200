"""Makes the golden tables from code and formulas that are not ours. Nothing here knows ctxlab, and no test runs it.

    pip install torch==2.13.0 x-transformers==2.31.10 pope-pytorch==0.2.1
    pip install --no-deps torchscale==0.3.0 fla-core==0.6.0 nemo-toolkit==1.23.0
    python -m tests.conformance.golden.make_tables

Public classes are computed in float64: they ask for fp32 by name in places, and are given float64 there. What no package has is
computed with mpmath, to 40 digits, from the equation printed in the paper.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.conformance.golden import inputs

HERE = Path(__file__).parent
Rows = list[list[list[float | None]]]
NEMO = "nemo.collections.nlp.modules.common.megatron.position_embedding"
D = inputs.HEAD_DIM


@contextmanager
def in_float64() -> Iterator[None]:
    """fp32 read as float64, whether it is the default, asked for as torch.float or made by .float()."""
    default, named, method = torch.get_default_dtype(), torch.float, Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.float, Tensor.float = torch.float64, Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        torch.float, Tensor.float = named, method  # type: ignore[method-assign]


def file_of(package: str, path: str, name: str) -> ModuleType:
    """One file of an installed package as a module of this name, without what the package imports at its top."""
    spec = importlib.util.spec_from_file_location(name, str(distribution(package).locate_file(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def queries_and_keys(positions: list[int]) -> tuple[Tensor, Tensor]:
    """(1,H,T,D) each, float64."""
    q, k = (
        torch.tensor([[row(h, p) for p in positions] for h in range(inputs.HEADS)], dtype=torch.float64)[None]
        for row in (inputs.query, inputs.key)
    )
    return q, k


def tokens(n: int) -> Tensor:
    return torch.tensor([inputs.token(p) for p in range(n)], dtype=torch.float64)[None]


def wave(*shape: int, step: float) -> Tensor:
    """Parameters: 1.5 sin(step n), n = 1, 2, ... in the order of the entries."""
    n = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return (1.5 * torch.sin(step * n)).view(shape)


def rows(scores: Tensor, i: list[int], j: list[int]) -> Rows:
    """(1,H,T,S) at positions i and j as numbers, null where j lies ahead of i."""
    return [
        [[float(s) if b <= a else None for b, s in zip(j, row)] for a, row in zip(i, head)]
        for head in scores[0].tolist()
    ]


def case(
    i: list[int], j: list[int], *, content: bool, settings: dict[str, Any] | None = None, **rest: Any
) -> dict[str, Any]:
    """content: whether the scores hold q . k / sqrt(8); otherwise q and k are 0, and the scores are the bias."""
    return {"settings": settings or {}, "queries": i, "keys": j, "content": content} | rest


def agree(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.tril(), other.tril(), atol=1e-12, rtol=1e-12)


def xpos() -> tuple[list[str], list[dict[str, Any]]]:
    from torchscale.component.xpos_relative_position import XPOS
    from x_transformers.x_transformers import RotaryEmbedding, apply_rotary_pos_emb

    near, far = list(range(24)), [0, 1, 7, 100, 511, 2047, 4096]
    with in_float64():
        q, k = queries_and_keys(near)
        theirs = XPOS(D)
        first = (theirs(q[0]) @ theirs(k[0], downscale=True).mT)[None] / math.sqrt(D)
        rotary = RotaryEmbedding(D, use_xpos=True)

        def scores(positions: list[int]) -> Tensor:
            q, k = queries_and_keys(positions)
            turns, lengths = rotary(torch.tensor(positions))
            q, k = apply_rotary_pos_emb(q, turns, lengths), apply_rotary_pos_emb(k, turns, lengths**-1.0)
            return q @ k.mT / math.sqrt(D)

        agree(first, scores(near))
        second = scores(far)
    return (
        [
            f"torchscale {version('torchscale')}, XPOS: the first case (x-transformers gives the same)",
            f"x-transformers {version('x-transformers')}, RotaryEmbedding(use_xpos=True): the second case",
        ],
        [
            case(near, near, content=True, scores=rows(first, near, near)),
            case(far, far, content=True, scores=rows(second, far, far)),
        ],
    )


def pope() -> tuple[list[str], list[dict[str, Any]]]:
    from PoPE_pytorch import PoPE
    from x_transformers.x_transformers import PolarEmbedding, apply_polar_pos_emb

    cases = []
    for positions, theta in ((list(range(12)), 10_000), ([0, 1, 2, 5, 40, 333, 4096], 500)):
        delta = -wave(inputs.HEADS, D, step=0.9).abs()
        with in_float64():
            q, k = queries_and_keys(positions)
            at = torch.tensor(positions)
            theirs = PoPE(D, heads=inputs.HEADS, theta=theta)
            theirs.bias.data.copy_(delta)
            turned = theirs.apply_pope_to_qk(theirs(at.double()), q, k)
            scores = turned[0] @ turned[1].mT / math.sqrt(D)
            polar = PolarEmbedding(D, inputs.HEADS, base=theta)
            polar.learned_bias.data.copy_(delta[:, None])
            turns, bias = polar(at)
            agree(scores, apply_polar_pos_emb(q, turns) @ apply_polar_pos_emb(k, turns + bias).mT / math.sqrt(D))
        cases.append(
            case(
                positions,
                positions,
                content=True,
                settings={"theta": float(theta)},
                parameters={"delta": delta.tolist()},
                scores=rows(scores.detach(), positions, positions),
            )
        )
    sources = [
        f"pope-pytorch {version('pope-pytorch')}, PoPE",
        f"x-transformers {version('x-transformers')}, PolarEmbedding: the same",
    ]
    return sources, cases


def cope_ctx() -> tuple[list[str], list[dict[str, Any]]]:
    from x_transformers.x_transformers import CoPE

    positions, cases = list(range(24)), []
    for n in (5, 64):
        e = wave(n, D, step=1.1)
        with in_float64():
            q, k = queries_and_keys(positions)
            score = q @ k.mT / math.sqrt(D)
            future = torch.ones(len(positions), len(positions), dtype=torch.bool).triu(1)
            theirs = CoPE(D, inputs.HEADS, n)
            theirs.pos_emb.data.copy_(e / math.sqrt(D))
            score = score + theirs(q, score.masked_fill(future, -torch.finfo(score.dtype).max))
        cases.append(
            case(
                positions,
                positions,
                content=True,
                settings={"rows": n},
                parameters={"weight": e.tolist()},
                scores=rows(score.detach(), positions, positions),
            )
        )
    source = (
        f"x-transformers {version('x-transformers')}, CoPE, its rows being these over sqrt(8): it follows the listing in "
        "the paper's appendix and does not scale q . e, the authors' program (facebookresearch/RAM) does"
    )
    return [source], cases


def fox() -> tuple[list[str], list[dict[str, Any]]]:
    from x_transformers.x_transformers import DataDependentAlibi

    fla = file_of("fla-core", "fla/ops/forgetting_attn/naive.py", "forgetting_attn_naive")
    n = 24
    positions = list(range(n))
    weight, offset = wave(inputs.HEADS, inputs.WIDTH, step=0.7) / 4, torch.tensor([1.0, 5.0], dtype=torch.float64)
    with in_float64():
        q, k = queries_and_keys(positions)
        theirs = DataDependentAlibi(inputs.WIDTH, inputs.HEADS)
        linear = theirs.to_forget_gates[0]
        linear.weight.data.copy_(weight)
        linear.bias.data.copy_(offset)
        bias = theirs(tokens(n)).detach()
        gates = torch.nn.functional.logsigmoid(tokens(n) @ weight.T + offset)  # (1,T,H)
        each = torch.eye(n)[None, :, None].expand(1, n, inputs.HEADS, n)  # values that tell the keys apart: weights
        weights = fla.naive_forgetting_attn(q.transpose(1, 2), k.transpose(1, 2), each, gates).transpose(1, 2)
    parameters = {"weight": weight.tolist(), "offset": offset.tolist()}
    return (
        [
            f"x-transformers {version('x-transformers')}, DataDependentAlibi: the bias",
            f"fla-core {version('fla-core')}, naive_forgetting_attn: the attention weights",
        ],
        [
            case(positions, positions, content=False, parameters=parameters, scores=rows(bias, positions, positions)),
            case(
                positions, positions, content=True, parameters=parameters, weights=rows(weights, positions, positions)
            ),
        ],
    )


def nemo(module: str) -> ModuleType:
    marks = ModuleType("nemo.utils.decorators")
    marks.experimental = lambda kind: kind  # type: ignore[attr-defined]  # only prints a warning, but imports much
    sys.modules[marks.__name__] = marks
    return file_of("nemo-toolkit", f"{NEMO.replace('.', '/')}/{module}.py", f"{NEMO}.{module}")


def sandwich() -> tuple[list[str], list[dict[str, Any]]]:
    nemo("alibi_relative_position_embedding")
    module = nemo("sandwich_relative_position_embedding")
    i, j, cases = [299], [0, 1, 50, 200, 250, 283, 290, 296, 297, 298, 299], []
    for width in (8, 128):
        with in_float64():
            bias = module.SandwichRelativePositionEmbedding(False, inputs.HEADS, None, width)(300, 300)
        cases.append(case(i, j, content=False, settings={"width": width}, scores=rows(bias[:, :, i][..., j], i, j)))
    return [f"nemo-toolkit {version('nemo-toolkit')}, SandwichRelativePositionEmbedding"], cases


def kerple() -> tuple[list[str], list[dict[str, Any]]]:
    """-r1 ln(1 + r2 |m - n|) and -r1 |m - n|^r2, the two kernels of the paper's section 4."""
    from mpmath import log, mp, mpf

    mp.dps = 40
    nemo("alibi_relative_position_embedding")
    module = nemo("kerple_relative_position_embedding")
    i, j = [299], [0, 1, 50, 200, 250, 283, 290, 296, 297, 298, 299]
    p, a = [0.25, 1.75], [0.875, 0.0625]
    with in_float64():
        theirs = module.KERPLERelativePositionEmbedding(False, inputs.HEADS, None)
        for parameter, values in ((theirs.kerple_b, p), (theirs.kerple_a, a), (theirs.kerple_p, [1.0, 1.0])):
            parameter.data = torch.tensor(values, dtype=torch.float64)[:, None, None]
        bias = theirs(300, 300).detach()
    cases = [
        case(i, j, content=False, parameters={"p": p, "a": a}, scores=rows(bias[:, :, i][..., j], i, j)),
    ]
    far_i, far_j = [131_071], [0, 1, 65_536, 130_000, 131_008, 131_069, 131_070, 131_071]

    def logarithmic(d: int, p: float, a: float) -> float:
        return float(-mpf(p) * log(1 + mpf(a) * d))

    def power(d: int, p: float, a: float) -> float:
        return float(-mpf(a) * mpf(d) ** mpf(p)) if d else 0.0

    for kind, formula in (("log", logarithmic), ("power", power)):
        scores = [[[formula(far_i[0] - n, *pair) for n in far_j]] for pair in zip(p, a)]
        cases.append(
            case(far_i, far_j, content=False, settings={"kind": kind}, parameters={"p": p, "a": a}, scores=scores)
        )
    return (
        [
            f"nemo-toolkit {version('nemo-toolkit')}, KERPLERelativePositionEmbedding: the first case",
            f"the paper's equations in mpmath {version('mpmath')}, 40 digits: the others",
        ],
        cases,
    )


def fire() -> tuple[list[str], list[dict[str, Any]]]:
    """b(i, j) = f(psi(i - j) / psi(max(i, L))), psi(x) = ln(c x + 1), f one layer of ReLUs; 1e-6 is the authors' code's."""
    from mpmath import log, mp, mpf

    mp.dps = 40
    K = 6
    w1, b1 = wave(1, K, step=1.3), wave(1, K, step=0.4) / 2
    w2, b2 = wave(inputs.HEADS, K, step=2.1), wave(inputs.HEADS, 1, step=0.8)
    cases = []
    for c, m, span in ((0.1, 1.0, 512.0), (0.75, -0.5, 40.0)):
        i = [0, 1, 7, 19, 20, 21, 100, 511, 512, 513, 1000, 20_000]
        j = [0, 1, 5, 18, 19, 20, 90, 400, 511, 512, 990, 1000, 15_000, 19_990, 20_000]

        def bias(head: int, i: int, j: int, c: float, threshold: float) -> float:
            u = log(mpf(c) * (i - j) + 1) / (log(mpf(c) * max(mpf(i), mpf(threshold)) + 1) + mpf(10) ** -6)
            hidden = (max(mpf(0), mpf(w) * u + mpf(b)) for w, b in zip(w1[0].tolist(), b1[0].tolist()))
            return float(sum(mpf(w) * h for w, h in zip(w2[head].tolist(), hidden)) + mpf(float(b2[head, 0])))

        scores = [
            [[bias(h, a, b, c, abs(m * span)) if b <= a else None for b in j] for a in i] for h in range(inputs.HEADS)
        ]
        parameters = {"c": c, "m": m, "w1": w1.tolist(), "b1": b1.tolist(), "w2": w2.tolist(), "b2": b2.tolist()}
        settings = {"hidden": K, "span": span}
        cases.append(case(i, j, content=False, settings=settings, parameters=parameters, scores=scores))
    return [f"no package has it: the paper's equations in mpmath {version('mpmath')}, 40 digits"], cases


PAPERS = {
    "xpos": "arXiv:2212.10554",
    "pope": "arXiv:2509.10534",
    "cope_ctx": "arXiv:2405.18719",
    "fox": "arXiv:2503.02130",
    "sandwich": "arXiv:2212.10356",
    "kerple": "arXiv:2205.09921",
    "fire": "arXiv:2310.04418",
}


def main() -> None:
    torch.set_grad_enabled(False)
    for scheme, make in ((f.__name__, f) for f in (xpos, pope, cope_ctx, fox, sandwich, kerple, fire)):
        source, cases = make()
        head = {"scheme": scheme, "paper": PAPERS[scheme], "source": source, "inputs": inputs.FORMULAS}
        lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        lines += [' "cases": [\n  ' + ",\n  ".join(json.dumps(c) for c in cases) + "\n ]"]
        (HERE / f"{scheme}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
