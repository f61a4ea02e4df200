"""Bytes alive, against hand counts, closed forms, and the same step on real tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ctxlab.model import count
from ctxlab.model.base import build_model, read_parts
from ctxlab.model.kernels import kernels_of, traced_for
from ctxlab.model.offload import OffloadSetting
from ctxlab.model.remake import POLICIES, Recompute
from ctxlab.profiling.measure import Point
from ctxlab.profiling.predict import ROOM, Predictor
from ctxlab.profiling.trace import KINDS, Live, asked_for_numbers, count_weights, trace_step, trace_update
from tests.profiling.builders import point

MIB = 2**20


def total(split: dict[str, int]) -> int:
    return sum(split.values())


def test_views_count_once_and_what_is_freed_no_more() -> None:
    with FakeTensorMode(), Live() as live:
        live.mark()
        kept = torch.zeros(1000)
        with live.counting("activations"):
            gone = torch.zeros(500, dtype=torch.float64)
            view = gone[10:].view(7, 70)
        del gone, view
        live.mark()
        again = kept + 1
    assert live.moments == [
        {**dict.fromkeys(KINDS, 0), "weights": 4000, "activations": 4000},
        {**dict.fromkeys(KINDS, 0), "weights": 8000},
    ]
    del again


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_fake_tensors_live_and_die_as_real_ones(recompute: str) -> None:
    at = point("nano", 96, recompute=recompute)
    found = max(map(total, trace_step(at)))
    with Live() as live:
        model = build_model(read_parts(at.__dict__), vocab_size=at.vocab_size, context=at.context)
        model.recompute = at.recompute
        live.mark()
        tokens = torch.zeros(1, at.context + 1, dtype=torch.int64)
        hidden = model.hidden(tokens[:, :-1])
        loss = model.nats(hidden, tokens[:, 1:]).sum() / at.context
        del hidden
        loss.backward()
    assert total(live.moments[0]) == pytest.approx(found, abs=64)  # scalars that one of them keeps a little longer


def test_policies_leave_out_what_they_make_again() -> None:
    """Of every block, by hand: norms' inputs, q, k, v and what attention makes, 6 d; gate and up; two norms' and H heads'
    statistics. Selective is without gate, up and a statistic, block without all but its input."""
    at = point("nano", 128)
    none, selective, block = (trace_step(replace(at, recompute=policy))[1]["activations"] for policy in POLICIES)
    sizes = read_parts(at.__dict__).model
    token_layers = 128 * sizes.n_layers
    assert none - selective == pytest.approx(4 * token_layers * (2 * sizes.d_ff + 1), rel=1e-3)
    kept = 5 * sizes.d_model + 2 * sizes.d_ff + 2 + sizes.n_heads
    assert none - block == pytest.approx(4 * token_layers * kept, rel=1e-3)


def test_adamw_keeps_two_numbers_a_weight_and_one_a_tensor() -> None:
    at = point("nano", 64, optim="adamw")
    state, update = trace_update(at)
    parts = read_parts(at.__dict__)
    weights = 4 * count.parameters(*parts, vocab_size=at.vocab_size, context=64).total
    tensors = len(list(build_model(parts, vocab_size=at.vocab_size, context=64).parameters()))
    assert state == 2 * weights + 4 * tensors
    assert (update["weights"], update["gradients"]) == (weights, weights)


@pytest.mark.parametrize("recompute", POLICIES)
def test_of_what_waits_elsewhere_the_device_holds_nothing(recompute: Recompute) -> None:
    """Behind the forward pass, of 6 MiB and more: the hidden states that the loss reads, and less than 64 KiB a piece."""
    at = point("nano", 2048, recompute=recompute)
    settings: list[OffloadSetting] = ["none", "cpu", "disk"]
    kept, host, disk = (trace_step(replace(at, offload=where))[1]["activations"] for where in settings)
    hidden = 4 * 2048 * read_parts(at.__dict__).model.d_model
    assert hidden <= host == disk < hidden + 2**16 * 16 < kept


MEASURED = Path(__file__).parents[2] / "experiments" / "memory_scaling" / "results" / "memory_scaling-cuda.txt"


@pytest.mark.parametrize("n", range(0, 24, 5))
def test_of_a_gpu_a_trace_says_what_was_allocated_there(n: int) -> None:
    """On an H100, over the idle process; some small blocks that kernels take for themselves are not seen."""
    rows = [json.loads(line) for line in MEASURED.read_text().splitlines() if "allocated_bytes" in line]
    row = rows[n]
    settings = {key: row[key] for key in ("recompute", "precision", "device")}
    at = point(row["model"], row["context"], row["position"], "muon", vocab_size=32_768, **settings)
    assert Predictor(at).memory(row["context"]).bytes == pytest.approx(row["allocated_bytes"], rel=4e-5)


@pytest.mark.parametrize(("position", "mib"), [("rope", 4296), ("alibi", 4510), ("t5", 4300), ("fox", 4318)])
def test_of_a_gpu_so_it_does_where_flex_attention_runs_and_where_not(position: str, mib: int) -> None:
    """Whole MiB of a step at 8,192 tokens on an H100, 64 of which are what cuBLAS works in."""
    at = point("small", 8192, position, vocab_size=50_304, precision="bf16", device="cuda")
    assert Predictor(at).memory(8192).bytes / MIB + 64 == pytest.approx(mib, abs=0.6)


def test_kernels_of_another_device_are_those_of_the_trace_alone() -> None:
    device = torch.device("cpu")
    with traced_for("cuda"):
        assert kernels_of(device) == "cuda"
        with traced_for("cpu"):
            assert kernels_of(device) == "cpu"
        assert kernels_of(device) == "cuda"
    assert kernels_of(device) == "cpu"


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_updates_within_backward_hold_one_gradient_at_a_time(optim: str) -> None:
    """At the worst, the largest matrix'; and the optimizer keeps what it does behind backward."""
    at = point("nano", 64, optim=optim, vocab_size=256)
    early = replace(at, update="backward")
    whole, freed = (max(split["gradients"] for split in Predictor(a).moments(64)) for a in (at, early))
    model = build_model(read_parts(at.__dict__), vocab_size=at.vocab_size, context=64)
    sizes = sorted(4 * parameter.numel() for parameter in model.parameters())
    assert whole == sum(sizes)
    assert freed == sizes[-1]
    for kind in ("weights", "optimizer"):
        assert {split[kind] for split in Predictor(early).moments(64)} == {Predictor(at).memory(64).split[kind]}


@pytest.mark.parametrize(
    ("position", "recompute", "vocab_size", "context"),
    [
        ("rope", "none", 2048, 2304),
        ("alibi", "block", 2048, 5000),
        ("t5", "selective", 2048, 2304),
        ("rope", "none", 256, 20_000),
    ],
)
def test_what_is_continued_as_a_line_is_what_a_trace_says(
    position: str, recompute: str, vocab_size: int, context: int
) -> None:
    """Of few words the logits of 8,192 tokens are one chunk: lines begin behind it."""
    predictor = Predictor(point("nano", context, position, recompute=recompute, vocab_size=vocab_size))
    continued = predictor.memory(context)
    assert continued.way.startswith("continued")
    traced = max(sum(split.values()) for split in predictor.moments(context))
    assert continued.bytes - continued.split["process"] == pytest.approx(traced, rel=1e-4)


@pytest.mark.parametrize("vocab_size", [260, 2048, 50_257])
def test_the_longest_context_on_a_gpu_is_found_in_few_traces(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few words, and so however many tokens' logits would go into a chunk."""
    traced: list[int] = []

    def counting(at: Point) -> list[dict[str, int]]:
        traced.append(at.context)
        return trace_step(at)

    monkeypatch.setattr("ctxlab.profiling.predict.trace_step", counting)
    predictor = Predictor(point("nano", 1024, vocab_size=vocab_size, device="cuda", precision="bf16"))
    assert predictor.longest(2**34) > 2**16
    assert len(traced) <= 2
    assert max(traced) <= 8192


def test_a_scheme_that_asks_which_knots_a_tile_has_is_traced_as_if_it_had_all_of_them() -> None:
    """FIRE in tiles: the kernels of a GPU, measured on an H100 before loss chunks were wider there (2,979.5 MB)."""
    at = point("small", 4096, "fire", vocab_size=8192, precision="bf16", device="cuda", loss_chunk=256)
    assert 0.99 < Predictor(at).memory(4096).bytes / 2.9795e9 < 1.05


def test_a_component_that_needs_numbers_is_said_by_closed_form() -> None:
    found = Predictor(point("nano", 512, "cope_ctx")).memory(512)
    assert found.way == "closed form"
    assert found.split["activations"] > 0


def test_a_fault_of_a_component_is_no_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (96x3 and 4x96)")

    monkeypatch.setattr("ctxlab.model.transformer.Transformer.hidden", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        Predictor(point("nano", 96)).memory(96)


def numpy(x: torch.Tensor) -> object:
    return x.numpy()


@pytest.mark.parametrize("ask", [torch.Tensor.tolist, torch.Tensor.nonzero, numpy, bool], ids=lambda ask: ask.__name__)
def test_what_asks_for_numbers_is_known_from_what_is_wrong(ask: Callable[[torch.Tensor], object]) -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError) as numbers:
        ask(torch.zeros(1))
    assert asked_for_numbers(numbers.value)
    with FakeTensorMode(), pytest.raises(RuntimeError) as wrong:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not asked_for_numbers(wrong.value)
    assert not asked_for_numbers(NotImplementedError("bias"))


def test_what_is_frozen_has_no_gradient_and_no_state() -> None:
    """All blocks but one frozen: by hand from the shapes, AdamW with two numbers a weight and one a tensor."""
    at = point("nano", 128, optim="adamw")
    some = replace(at, freeze=("blocks.0", "blocks.1", "embedding"))
    model = build_model(read_parts(at.__dict__), vocab_size=at.vocab_size, context=at.context)
    learned = [p for name, p in model.named_parameters() if not name.startswith(some.freeze)]
    numbers = sum(p.numel() for p in learned)
    assert 0 < numbers < model.n_parameters()
    assert count_weights(some) == (model.n_parameters(), numbers)
    state, update = trace_update(some)
    assert (state, update["gradients"]) == (8 * numbers + 4 * len(learned), 4 * numbers)
    assert trace_step(some)[-1]["gradients"] <= 4 * numbers < trace_step(at)[-1]["gradients"]
    counted = replace(some, counted=count_weights(some))
    closed = Predictor(counted)._closed(128)
    assert (closed["weights"], closed["gradients"], closed["optimizer"]) == (
        4 * model.n_parameters(), 4 * numbers, 8 * numbers,
    )  # fmt: skip


def test_predictors_of_other_weights_share_no_state() -> None:
    at, updates = point("nano", 64), {}
    whole = Predictor(at, updates).memory(64)
    some = Predictor(replace(at, freeze=("blocks",)), updates).memory(64)
    assert some.bytes < whole.bytes
    assert Predictor(replace(at, freeze=("blocks",)), {}).memory(64) == some


def test_the_longest_context_is_the_last_that_fits() -> None:
    predictor = Predictor(point("nano", 512))
    memory = 150 * MIB
    longest = predictor.longest(memory)
    assert longest > 1024
    assert longest % 64 == 0
    here, beyond = (predictor.memory(n).bytes * (1 + ROOM["cpu"]) for n in (longest, longest + 64))
    assert here <= memory < beyond
    assert predictor.longest(MIB) == 0


def test_as_many_rows_fit_as_their_tokens_in_one_row() -> None:
    predictor = Predictor(point("nano", 512))
    rows = predictor.rows(1024, 200 * MIB)
    assert abs(rows * 1024 - predictor.longest(200 * MIB)) <= 1024
    assert predictor.rows(1024, MIB) == 0
