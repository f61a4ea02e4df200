"""The compiled step of a decoded token: against the same block in float64, and where it must not be taken."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ctxlab.model.attention.full import Full
from ctxlab.model.blocks import Block, Encoded, Frame
from ctxlab.model.cache import KVCache, LayerCache
from ctxlab.model.decode_step import MOST_ROWS, DecodeStep
from ctxlab.model.position.base import POSITIONS
from tests.model.builders import build, small, tokens

pytestmark = pytest.mark.usefixtures("native_kernel")

D, FF = 37, 53  # no multiples of any vector's width


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of each block's step that was taken."""
    taken: list[torch.dtype] = []
    end = DecodeStep.end

    def noted(self: DecodeStep, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        taken.append(self.dtype)
        return end(self, x, mixed)

    monkeypatch.setattr(DecodeStep, "end", noted)
    return taken


def block(*, crosses: bool = False, kernel: Any = "auto", **settings: Any) -> Block:
    """One with random norms, biases and matrices that matter."""
    torch.manual_seed(0)
    config = small(**{"d_model": D, "n_heads": 3, "n_kv_heads": 1, "head_dim": 6, "d_ff": FF} | settings)
    made = Block(config, Full(Full.Config(kernel=kernel), config, 0), 0, causal=True, crosses=crosses).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3).add_(1.0 if parameter.ndim == 1 else 0.0)
    return made


def say(made: Block, x: torch.Tensor, encoded: Encoded | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What the block makes of the sixth token, five of which are in the cache."""
    nope = POSITIONS.get("nope")(POSITIONS.config({"name": "nope"}), small(n_heads=3, n_kv_heads=1, head_dim=6), 64)
    cache = LayerCache()
    for part in (x[:, :5], x[:, 5:]):
        at = torch.arange(part.shape[1])
        out: torch.Tensor = made(part, nope, Frame(dtype or x.dtype, at, None, [None], [None], encoded=encoded), cache)
    return out


def rows(n: int, seed: int = 1) -> tuple[torch.Tensor, Encoded]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, D, generator=made), Encoded(torch.randn(n, 7, D, generator=made))


def exact(made: Block, x: torch.Tensor, encoded: Encoded) -> torch.Tensor:
    """In float64, which is never compiled."""
    return say(copy.deepcopy(made).double(), x.double(), Encoded(encoded.hidden.double()))


KINDS = [
    {"activation": "swiglu"},
    {"activation": "geglu_tanh", "bias": True},
    {"activation": "gelu", "norm": "layernorm", "bias": True},
    {"activation": "gelu_tanh", "norm": "layernorm"},
    {"activation": "relu", "norm": "layernorm", "norm_place": "post", "bias": True},
    {"activation": "swiglu", "norm_place": "post"},
]


@pytest.mark.parametrize("n", range(1, MOST_ROWS + 1))
@pytest.mark.parametrize("crosses", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_a_step_is_what_the_block_is_in_float64(
    kind: dict[str, Any], crosses: bool, n: int, steps: list[torch.dtype]
) -> None:
    made = block(crosses=crosses, **kind)
    x, encoded = rows(n)
    with torch.no_grad():
        found = say(made, x, encoded)
        assert steps == [torch.float32]
        expected = exact(made, x, encoded)
    assert len(steps) == 1
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("crosses", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_in_bf16_it_errs_as_torch_does(kind: dict[str, Any], crosses: bool, steps: list[torch.dtype]) -> None:
    """Over 48 rows: roundings are those of autocast, and which way they fall is a matter of the order of sums."""
    made, torchs = block(crosses=crosses, **kind), block(crosses=crosses, kernel="torch", **kind)
    # Of our error and of torch's, of what lies between the two, and of what is exact.
    squares = torch.zeros(4, dtype=torch.float64)
    for seed in range(12):
        x, encoded = rows(MOST_ROWS, seed)
        with torch.no_grad():
            expected = exact(made, x, encoded)
            with torch.autocast("cpu", torch.bfloat16):
                found = say(made, x, encoded, torch.bfloat16)
                theirs = say(torchs, x, encoded, torch.bfloat16)
        assert found.dtype == theirs.dtype == torch.float32
        differences = (found - expected, theirs - expected, found - theirs, expected)
        squares += torch.stack([x.double().square().sum() for x in differences])
    assert steps == 12 * [torch.bfloat16]
    ours, of_torch, between, whole = squares.sqrt().tolist()
    assert 0 < of_torch < 0.05 * whole
    assert ours <= 1.05 * of_torch
    assert between < 0.7 * of_torch  # 1 if nothing were rounded, sqrt(2) if all were elsewhere


def test_threads_change_no_bit() -> None:
    made = block(activation="geglu_tanh", bias=True)
    x, _ = rows(2)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(say(made, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


class Twice(nn.Linear):
    """What stands in for a matrix that is not one alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def heard(made: Block) -> None:
    made.feed_forward.register_forward_hook(lambda *_: None)


def told(made: Block) -> None:
    made.attention_norm.register_forward_pre_hook(lambda *_: None)


def replaced(made: Block) -> None:
    other = Twice(D, 18, bias=False)
    other.load_state_dict(made.attention.query.state_dict())
    made.attention.query = other  # type: ignore[assignment]


def trained(made: Block) -> None:
    made.train()


@pytest.mark.parametrize("change", [heard, told, replaced, trained])
def test_of_a_block_that_is_not_plain_every_part_is_called(change: Any, steps: list[torch.dtype]) -> None:
    made = block()
    change(made)
    x, _ = rows(1)
    with torch.no_grad():
        torch.testing.assert_close(say(made, x).double(), exact(made, x, rows(1)[1]), rtol=2e-5, atol=2e-5)
    assert not steps


def test_nor_is_it_taken_where_torch_is_asked_for_rows_are_many_or_a_gradient_is_wanted(
    steps: list[torch.dtype],
) -> None:
    with torch.no_grad():
        say(block(kernel="torch"), rows(1)[0])
        say(block(), rows(MOST_ROWS + 1)[0])
    say(block(), rows(1)[0])
    assert not steps


def test_a_model_decodes_what_it_reads_at_once(steps: list[torch.dtype]) -> None:
    """Under every scheme, with the input of a block that some of them read beside its queries and keys."""
    for name in POSITIONS.names():
        model = build(name)
        x = tokens(2, 40)
        cache = KVCache(model.config.n_layers)
        with torch.no_grad():
            expected = model(x)
            found = torch.cat([model(part, cache=cache) for part in x.split([20] + [1] * 20, dim=1)], dim=1)
        assert len(steps) == 20 * model.config.n_layers, name
        steps.clear()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
