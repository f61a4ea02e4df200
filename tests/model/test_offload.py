"""What is kept elsewhere for backward: all of it but weights, once, with the gradients of what stays."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctxlab.errors import ConfigError, RunError
from ctxlab.model.offload import Move, ToDisk, offloaded, require_elsewhere, to_host
from ctxlab.model.remake import POLICIES, Recompute
from tests.model.builders import build, tokens

TEXT = tokens(2, 65)


class Moves:
    """Moves to memory of its own, or as it is told, and keeps what went and how much came back."""

    def __init__(self, move: Move = to_host) -> None:
        self.move = move
        self.went: list[int] = []  # bytes
        self.n_back = 0

    def __call__(self, kept: Tensor) -> Callable[[], Tensor]:
        self.went.append(kept.untyped_storage().nbytes())
        back = self.move(kept)

        def come() -> Tensor:
            self.n_back += 1
            return back()

        return come


def gradients(position: str, recompute: Recompute, moves: Moves | None, *, bf16: bool = False) -> dict[str, Tensor]:
    model = build(position)
    model.train()
    model.recompute = recompute
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if moves is None:
            hidden = model.hidden(TEXT[:, :-1])
        else:
            with offloaded(model.parameters(), smallest=1, move=moves):
                hidden = model.hidden(TEXT[:, :-1])
        model.nats(hidden, TEXT[:, 1:]).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "fire", "fox", "learned"])
def test_gradients_are_the_same_bits(position: str, recompute: Recompute, bf16: bool) -> None:
    moves = Moves()
    kept, moved = gradients(position, recompute, None, bf16=bf16), gradients(position, recompute, moves, bf16=bf16)
    assert kept.keys() == moved.keys()
    for name, gradient in kept.items():
        assert torch.equal(moved[name], gradient), name
    assert len(moves.went) >= moves.n_back > 0  # nothing comes twice


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recompute", POLICIES)
def test_through_a_file_they_are_the_same_bits_too(
    recompute: Recompute, bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little the system writes and reads at once."""
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, part, at: write(file, part[:1000], at))
    monkeypatch.setattr(os, "preadv", lambda file, parts, at: read(file, [part[:999] for part in parts], at))
    moves = Moves(ToDisk(tmp_path / "made"))
    kept, moved = gradients("rope", recompute, None, bf16=bf16), gradients("rope", recompute, moves, bf16=bf16)
    for name, gradient in kept.items():
        assert torch.equal(moved[name], gradient), name
    assert moves.n_back > 0
    assert list((tmp_path / "made").iterdir()) == []  # the file has no name


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_a_file_goes_with_the_last_that_could_be_read_from_it(tmp_path: Path) -> None:
    move = ToDisk(tmp_path)
    file = weakref.ref(move.file)
    backs = [move(torch.arange(n).view(1, n)) for n in (3, 0, 5)]
    del move
    assert [back().view(torch.int64).tolist() for back in backs] == [[0, 1, 2], [], [0, 1, 2, 3, 4]]
    del backs[0], backs[0]
    assert file() is not None
    del backs[0]
    assert file() is None


def test_what_cannot_be_written_or_read_again_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"^trainer.offload: \S+/file/x cannot be written: Not a directory; use another paths"
    ):
        ToDisk(tmp_path / "file" / "x")
    move = ToDisk(tmp_path)
    back = move(torch.ones(100))
    move.file.truncate(399)
    with pytest.raises(RunError, match=r"^trainer.offload: what was kept in \S+ is not there any more$"):
        back()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        RunError, match=r"^trainer.offload: \S+ cannot be written: No space left on device; use another paths"
    ):
        move(torch.ones(100))


def test_of_blocks_that_are_run_again_only_inputs_go() -> None:
    moves = Moves()
    model = build("rope")
    gradients("rope", "block", moves)
    width = TEXT[:, 1:].numel() * model.config.d_model * 4
    assert moves.went.count(width) == len(model.blocks) + 1  # the last norm's too
    inputs = (len(model.blocks) + 1) * width
    assert sum(moves.went) - inputs < 0.1 * inputs  # tokens, statistics of the last norm


def test_weights_stay_and_what_several_read_goes_once() -> None:
    moves = Moves()
    x = torch.randn(4, 8, requires_grad=True)
    matrices = [torch.randn(8, 8, requires_grad=True) for _ in range(3)]
    with offloaded(matrices, smallest=1, move=moves):
        read = 2 * x
        y = sum((read[1:] @ matrix).sum() for matrix in matrices)
    assert moves.went == [4 * 8 * 4]
    expected = torch.autograd.grad(sum(((2 * x)[1:] @ matrix).sum() for matrix in matrices), [x, *matrices])
    assert all(map(torch.equal, torch.autograd.grad(y, [x, *matrices]), expected))
    assert moves.n_back == 1


def test_what_is_small_stays() -> None:
    moves = Moves()
    x = torch.randn(100, requires_grad=True)
    with offloaded([], smallest=401, move=moves):
        y = x.exp().sum()
    assert moves.went == []
    with offloaded([], smallest=400, move=moves):
        z = x.exp().sum()
    assert len(moves.went) == 1
    assert torch.equal(*(torch.autograd.grad(value, x)[0] for value in (y, z)))


def test_a_storage_that_is_written_to_between_two_that_keep_parts_of_it_goes_again() -> None:
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    room = torch.zeros(2, 2)
    with offloaded([x, w], smallest=1):
        room[0] = 3.0
        y = (x * room[0].clone().detach_()).sum() + (x * room[0]).sum()
        room[1] = 5.0
        y = y + (w * room[1]).sum()
    gradient_x, gradient_w = torch.autograd.grad(y, [x, w])
    assert gradient_x.tolist() == [6.0, 6.0]
    assert gradient_w.tolist() == [5.0, 5.0]


def test_on_a_cpu_it_is_refused() -> None:
    require_elsewhere("none", torch.device("cpu"))
    require_elsewhere("cpu", torch.device("cuda"))
    with pytest.raises(
        ConfigError, match=r"^trainer.offload: on a CPU what backward needs is in its memory already; use none or disk$"
    ):
        require_elsewhere("cpu", torch.device("cpu"))
    require_elsewhere("disk", torch.device("cpu"))
