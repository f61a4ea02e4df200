"""Optimizer steps against a training loop written out by hand: one row at a time, no Lightning, no micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctxlab.data.prepare import TextDataset
from ctxlab.data.stream import Stage, TrainStream
from ctxlab.data.tasks.dataset import TaskDataset, prepare_task
from ctxlab.data.tasks.mqar import MQAR
from ctxlab.data.tokenizers.ids import Ids
from ctxlab.errors import ConfigError
from ctxlab.model.base import Model, Parts, build_model
from ctxlab.model.offload import Move, offloaded
from ctxlab.train.loop import TrainSettings
from tests.train.builders import computed, dataset, settings, train


@dataclass
class ByHand:
    """What a step should have been."""

    losses: list[float]
    norms: list[float]
    model: Model


def pieces(config: TrainSettings, data: TextDataset | TaskDataset, step: int) -> list[tuple[Tensor, Tensor]]:
    """Every document that a step's global batch holds a part of: its tokens and targets, without any padding."""
    rows = config.trainer.batch_tokens // config.context
    stage = Stage(config.context, rows, rows, step + 1)
    stream = TrainStream(
        lambda context: data.rows(context, seed=config.seed, packed=config.packed),
        seed=config.seed,
        stages=(stage,),
        pad_id=data.tokenizer.pad_id,
    )
    batch = stream[step]
    found = []
    for number, length in enumerate(batch.lengths.tolist()):
        sizes = batch.segments[number] if batch.segments else [length]
        assert sum(sizes) == length
        for start, size in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True):
            part = slice(start, start + size)
            found.append((batch.tokens[number, part], batch.targets[number, part]))
    return found


def fresh_model(config: TrainSettings, data: TextDataset | TaskDataset) -> Model:
    torch.manual_seed(config.seed)
    parts = Parts(config.model, config.position, config.attention)
    return build_model(parts, vocab_size=data.tokenizer.vocab_size, context=config.context)


def nats(model: Model, tokens: Tensor, targets: Tensor) -> Tensor:
    """The sum over scored targets, from all logits at once."""
    return F.cross_entropy(model(tokens[None])[0].double(), targets, reduction="sum", ignore_index=-100)


def rate(config: TrainSettings, step: int) -> float:
    """Cosine from the peak to a tenth of it, times a linear warm-up (the `step` counts from 0)."""
    optim, steps = config.optim, config.trainer.max_steps
    assert optim.schedule == "cosine"
    assert optim.final_ratio == 0.1
    assert isinstance(steps, int)
    cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2
    return optim.learning_rate * min(1.0, (step + 1) / (optim.warmup_steps + 1)) * cosine


def by_hand(config: TrainSettings, data: TextDataset | TaskDataset, steps: int) -> ByHand:
    """AdamW, decoupled decay on matrices that are no embeddings, clipping to the norm of the whole gradient."""
    model = fresh_model(config, data)
    done = ByHand([], [], model)
    optim: Any = config.optim
    first, second = optim.betas
    moments: dict[str, list[Tensor]] = {n: [torch.zeros_like(p)] * 2 for n, p in model.named_parameters()}
    for step in range(steps):
        model.zero_grad()
        parts = pieces(config, data, step)
        scored = sum(int((targets != -100).sum()) for _, targets in parts)
        total = 0.0
        for tokens, targets in parts:
            loss = nats(model, tokens, targets) / scored
            loss.backward()
            total += loss.item()
        gradients: dict[str, Tensor] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        done.losses.append(total)
        done.norms.append(norm)
        lr = rate(config, step)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gradient = gradients[name] * (min(1.0, optim.clip / norm) if optim.clip else 1.0)
                m, v = moments[name]
                m, v = first * m + (1 - first) * gradient, second * v + (1 - second) * gradient**2
                moments[name] = [m, v]
                if parameter.ndim == 2 and name != "embedding.weight":
                    parameter *= 1 - lr * optim.weight_decay
                corrected = m / (1 - first ** (step + 1)), v / (1 - second ** (step + 1))
                parameter -= lr * corrected[0] / (corrected[1].sqrt() + optim.eps)
    return done


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextDataset]:
    return dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("packed", [False, True], ids=["windows", "packed"])
@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_every_step_is_the_one_by_hand_whatever_the_micro_batch(
    tmp_path: Path, data: TextDataset | TaskDataset, micro_batch: int, packed: bool
) -> None:
    config = settings(micro_batch=micro_batch, packed=packed, max_steps=6)
    expected = by_hand(config, data, 6)
    lengths = [len(tokens) for step in range(6) for tokens, _ in pieces(config, data, step)]
    assert min(lengths) < config.context  # short documents, or several in a row
    assert max(lengths) == config.context
    run = train(tmp_path, data, config)
    rows = run.rows.of("train")
    assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-6)
    assert [row["gradient_norm"] for row in rows] == pytest.approx(expected.norms, rel=1e-5)
    assert [row["learning_rate"] for row in rows] == pytest.approx([rate(config, step) for step in range(6)], rel=1e-12)
    for name, parameter in expected.model.named_parameters():
        torch.testing.assert_close(run.weights[name], parameter.detach(), atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_steps_of_a_task_whose_places_are_mostly_unscored_are_the_ones_by_hand(
    tmp_path: Path, micro_batch: int
) -> None:
    """The head is left out where nothing is scored: loss and gradients are those of the whole."""
    task = prepare_task(MQAR.Config(vocab_size=16, pairs=(2,)), Ids.Config())
    config = settings(micro_batch=micro_batch, context=16, max_steps=4)
    expected = by_hand(config, task, 4)
    run = train(tmp_path, task, config)
    assert [row["loss"] for row in run.rows.of("train")] == pytest.approx(expected.losses, rel=1e-6)
    assert [row["gradient_norm"] for row in run.rows.of("train")] == pytest.approx(expected.norms, rel=1e-5)
    for name, parameter in expected.model.named_parameters():
        torch.testing.assert_close(run.weights[name], parameter.detach(), atol=2e-5, rtol=1e-4, msg=name)


def test_the_first_loss_is_the_mean_over_targets_and_not_a_mean_of_means(
    tmp_path: Path, data: TextDataset | TaskDataset
) -> None:
    config = settings(micro_batch=1, max_steps=1)
    model, parts = fresh_model(config, data), pieces(config, data, 0)
    with torch.no_grad():
        sums = [nats(model, tokens, targets).item() for tokens, targets in parts]
    sizes = [len(tokens) for tokens, _ in parts]
    mean_of_means = sum(s / n for s, n in zip(sums, sizes, strict=True)) / len(parts)
    (row,) = train(tmp_path, data, config).rows.of("train")
    assert row["loss"] == pytest.approx(sum(sums) / sum(sizes), rel=1e-6)
    assert abs(mean_of_means - sum(sums) / sum(sizes)) > 1e-5


@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_the_gradient_is_clipped_to_its_whole_norm_and_logged_as_it_was(
    tmp_path: Path, data: TextDataset | TaskDataset, clip: float
) -> None:
    config = settings(optimizer={"clip": clip}, max_steps=4)
    expected = by_hand(config, data, 4)
    assert min(expected.norms) > 0.05
    run = train(tmp_path, data, config)
    assert [row["gradient_norm"] for row in run.rows.of("train")] == pytest.approx(expected.norms, rel=1e-5)
    for name, parameter in expected.model.named_parameters():
        torch.testing.assert_close(run.weights[name], parameter.detach(), atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_the_chunk_of_the_loss_changes_nothing(tmp_path: Path, data: TextDataset | TaskDataset, chunk: int) -> None:
    whole = train(tmp_path, data, settings(max_steps=3), "whole").rows.of("train")
    chunked = train(tmp_path, data, settings(max_steps=3, loss_chunk=chunk), "chunked").rows.of("train")
    for name in ("loss", "gradient_norm"):
        assert [row[name] for row in chunked] == pytest.approx([row[name] for row in whole], rel=1e-5)


def test_recomputed_activations_give_the_same_bits_under_dropout(
    tmp_path: Path, data: TextDataset | TaskDataset
) -> None:
    config: dict[str, Any] = {"max_steps": 3, "model": {"dropout": 0.2}, "micro_batch": 4}
    kept = train(tmp_path, data, settings(**config), "kept")
    again = train(tmp_path, data, settings(**config, recompute="block"), "again")
    assert [row["loss"] for row in kept.rows.of("train")] == [row["loss"] for row in again.rows.of("train")]
    for name, weight in kept.weights.items():
        assert torch.equal(weight, again.weights[name]), name


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_what_waits_elsewhere_for_backward_changes_no_bit(
    tmp_path: Path, data: TextDataset | TaskDataset, monkeypatch: pytest.MonkeyPatch, where: Any
) -> None:
    moved: list[int] = []

    def counted(parameters: Iterable[Tensor], *, move: Move) -> AbstractContextManager[None]:
        def counting(kept: Tensor) -> Callable[[], Tensor]:
            moved.append(kept.numel())
            return move(kept)

        return offloaded(parameters, smallest=1, move=counting)

    config: dict[str, Any] = {"max_steps": 3, "model": {"dropout": 0.2}, "micro_batch": 4, "recompute": "block"}
    kept = train(tmp_path, data, settings(**config), "kept")
    monkeypatch.setattr("ctxlab.train.loop.require_elsewhere", lambda *_: None)
    monkeypatch.setattr("ctxlab.model.offload.offloaded", counted)
    monkeypatch.setenv("CTXLAB_CACHE", str(tmp_path / "cache"))
    away = train(tmp_path, data, settings(**config, offload=where), "away")
    assert moved
    assert (tmp_path / "cache" / "offload").exists() == (where == "disk")
    assert computed(away.rows.rows) == computed(kept.rows.rows)
    for name, weight in kept.weights.items():
        assert torch.equal(weight, away.weights[name]), name


def test_offload_is_refused_on_a_cpu(tmp_path: Path, data: TextDataset | TaskDataset) -> None:
    with pytest.raises(ConfigError, match=r"^trainer.offload: on a CPU "):
        train(tmp_path, data, settings(offload="cpu"))


def test_bf16_backward_is_that_of_plain_autocast(tmp_path: Path, data: TextDataset | TaskDataset) -> None:
    config = settings(max_steps=1, precision="bf16", position="alibi", optimizer={"clip": 0.0})
    model = fresh_model(config, data)
    stage = Stage(config.context, 8, 8, 1)
    batch = TrainStream(lambda c: data.rows(c, seed=config.seed, packed=False), seed=config.seed, stages=(stage,))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.hidden(batch.tokens, lengths=batch.lengths)
        loss = model.nats(hidden, batch.targets).sum() / batch.n_targets_in_step
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    (row,) = train(tmp_path, data, config).rows.of("train")
    assert (row["loss"], row["gradient_norm"]) == (loss.item(), norm.item())
