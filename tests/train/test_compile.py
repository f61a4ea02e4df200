"""Compiled blocks train as the others do."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from ctxlab.errors import ConfigError, IncompatibleError
from ctxlab.model.kernels import traced_for
from ctxlab.model.position.rope import rotate
from ctxlab.train.compiling import check_compiled, decide
from tests.model.builders import build
from tests.train.builders import computed, dataset, settings, train


def test_without_a_compiler_it_is_refused(tmp_path: Path) -> None:
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    refused = pytest.raises(ConfigError, match=r"^trainer.compile: there is no C\+\+ compiler here \(g\+\+\); use ")
    with config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}), refused:
        train(tmp_path, dataset(tmp_path), settings(compile=True))
    cpp_builder.cpp_compiler_search.cache_clear()


def test_auto_compiles_nothing_on_a_cpu_says_so_and_runs_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiler(_: torch.device) -> None:
        raise AssertionError("nobody needs it")

    monkeypatch.setattr("ctxlab.train.compiling.require_compiler", compiler)
    data, said = dataset(tmp_path), io.StringIO()
    auto = train(tmp_path, data, settings(max_steps=2, compile="auto"), "auto", console=Console(file=said))
    plain = train(tmp_path, data, settings(max_steps=2), "plain")
    assert computed(auto.rows.rows) == computed(plain.rows.rows)
    assert auto.outcome.resolved["compile"] is False
    assert "compile" not in plain.outcome.resolved
    line = "blocks are not compiled (trainer.compile=auto): on a CPU blocks run in kernels that are compiled already\n"
    assert line in said.getvalue()


@pytest.mark.parametrize(
    ("operations", "max_seconds", "compiled", "why"),
    [
        (2.06e16, math.inf, False, "a run of about 3:26 min would save less than compiling takes"),
        (2.07e16, math.inf, True, "about 1:00 min of compiling save a third of each step"),
        (1e30, 60.0, False, "a run of about 1:00 min would save less than compiling takes"),
        (math.inf, 3600.0, True, "about 1:00 min of compiling save a third of each step"),
    ],
)
def test_on_a_gpu_auto_goes_by_the_length_of_the_run(
    operations: float, max_seconds: float, compiled: bool, why: str
) -> None:
    """1.41 times as fast, 60 s pay from 60 x 1.41 / 0.41 = 206.3 s on, at 1e14 operations a second."""
    assert decide("auto", torch.device("cuda"), operations, max_seconds) == (compiled, why)


def test_what_cannot_be_compiled_auto_leaves_alone() -> None:
    recompute = settings(compile="auto", recompute="selective")
    with pytest.raises(IncompatibleError) as refused:
        check_compiled(recompute.model, recompute.trainer)
    assert decide("auto", torch.device("cuda"), 1e30, math.inf, str(refused.value)) == (False, str(refused.value))
    assert decide(False, torch.device("cuda"), 1e30, math.inf) == (False, "")


@pytest.mark.parametrize(
    "position",
    ["rope", "alibi", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nope", "learned", "xpos", "pope"))],
)
def test_on_a_gpu_all_of_a_block_is_one_graph(position: str) -> None:
    """A call that torch's compiler has to step out for would leave the rest of the block as it is."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with traced_for("cuda"), FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype=torch.bfloat16):
        model = build(position, context=64, n_layers=1)
        model.blocks[0].compile(fullgraph=True, backend=keep)
        model.hidden(torch.zeros(1, 64, dtype=torch.int64)).float().sum().backward()
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten._scaled_dot_product_flash_attention in called
    assert sum(target is torch._C._nn.linear for target in called) == 7


def test_what_a_compiled_block_turns_is_turned_as_complex_numbers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    turns = torch.polar(torch.ones(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64))
    expected = torch.view_as_real(torch.view_as_complex(x.view(2, 3, 5, 4, 2)) * turns).view(x.shape)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = rotate(x, turns, "interleaved")
    torch.testing.assert_close(found, expected, atol=1e-15, rtol=1e-15)
    upstream = torch.randn_like(x)
    ours, theirs = (torch.autograd.grad(y, x, upstream)[0] for y in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-15, rtol=1e-15)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiled_blocks_take_the_same_steps(tmp_path: Path, recompute: str) -> None:
    data = dataset(tmp_path)
    plain = train(tmp_path, data, settings(max_steps=4, micro_batch=4), "plain")
    torch._dynamo.reset()
    compiled = train(
        tmp_path,
        data,
        settings(max_steps=4, micro_batch=4, compile=True, recompute=recompute, validate_every=2),
        "compiled",
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name in ("loss", "gradient_norm"):
        expected = [row[name] for row in plain.rows.of("train")]
        assert [row[name] for row in compiled.rows.of("train")] == pytest.approx(expected, rel=1e-5)
    assert compiled.weights.keys() == plain.weights.keys()  # names that know nothing of it
