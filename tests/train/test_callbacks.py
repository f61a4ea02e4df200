"""What happens around the steps: a loss that is no number, signals, the moving line, and silence about all else."""

from __future__ import annotations

import io
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ctxlab.data.prepare import TextDataset
from ctxlab.errors import RunError
from ctxlab.model.transformer import Transformer
from ctxlab.train.callbacks import interrupt, progress
from ctxlab.train.callbacks.interrupt import StopOnSignal
from ctxlab.train.loop import fit
from ctxlab.train.module import LanguageModel
from tests.train.builders import CONTEXT, Rows, command, dataset, line, settings, the_run, train

SIZE = r"\d+(\.\d+)?"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return dataset(tmp_path_factory.mktemp("data"))


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def before_each_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[LanguageModel], None]) -> None:
    update = LanguageModel._update

    def acting(self: LanguageModel) -> None:
        act(self)
        update(self)

    monkeypatch.setattr(LanguageModel, "_update", acting)


def test_a_loss_that_is_no_number_ends_the_run_with_what_to_try_and_saves_nothing(tmp_path: Path) -> None:
    words = ("trainer.checkpoint_every=1", "trainer.validate_every=none", "optim=adamw", "optim.learning_rate=1e30")
    ended = command(tmp_path, *line(tmp_path, *words))
    run = the_run(tmp_path)
    assert ended.code == 1
    (step,) = re.findall(
        r"^error: the (?:loss|gradient's norm) became nan at step (\d+): try a lower optim.learning_rate \(now 1e\+30\), "
        r"a longer optim.warmup_steps, or trainer.precision=fp32$",
        ended.stderr.splitlines()[-1],
    )
    assert (run.record.status, run.record.reason) == ("failed", ended.stderr.splitlines()[-1].removeprefix("error: "))
    assert "Traceback" not in ended.stderr
    assert (run.checkpoints / "last").read_text() == f"step-{int(step) - 1:06d}\n"
    assert [row["step"] for row in run.metrics()] == list(range(1, int(step)))


def test_a_loss_that_is_no_number_is_called_one(
    tmp_path: Path, data: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(module: LanguageModel) -> None:
        if module.step == 2:
            module.model.norm.weight.data[0] = float("nan")

    before_each_step(monkeypatch, spoil)
    with pytest.raises(
        RunError, match=r"^the loss became nan at step 4: try a lower optim.learning_rate \(now 0.002\)"
    ):
        train(tmp_path, data, settings())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_no_number_ends_the_run_before_it_is_saved(
    tmp_path: Path, data: TextDataset, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def spoil(module: LanguageModel) -> None:
        if module.step == 2:
            gradient = module.model.embedding.weight.grad
            assert gradient is not None
            gradient[7, 3] = value

    before_each_step(monkeypatch, spoil)
    with pytest.raises(RunError, match=rf"^the gradient's norm became {value} at step 3: try "):
        train(tmp_path, data, settings(checkpoint_every=1))
    assert (tmp_path / "run" / "last").read_text() == "step-000002\n"


def test_a_signal_stops_behind_the_step_in_hand_and_the_handlers_are_given_back(
    tmp_path: Path, data: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = handlers()
    before_each_step(monkeypatch, lambda module: signal.raise_signal(signal.SIGTERM) if module.step == 2 else None)
    run = train(tmp_path, data, settings(validate_every=2))
    assert (run.outcome.step, run.outcome.signal) == (3, signal.SIGTERM)
    assert [row["step"] for row in run.rows.of("train")] == [1, 2, 3]
    assert [row["step"] for row in run.rows.of("validation")] == [2]
    assert (run.folder / "last").read_text() == "step-000003\n"
    assert handlers() == before


def test_a_second_ctrl_c_does_not_wait_and_the_handlers_are_given_back(
    tmp_path: Path, data: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = handlers()
    monkeypatch.setattr(interrupt, "ONE_SECOND", 0.01)

    def twice(module: LanguageModel) -> None:
        if module.step == 2:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.02)
            signal.raise_signal(signal.SIGINT)

    before_each_step(monkeypatch, twice)
    rows = Rows()
    with pytest.raises(KeyboardInterrupt):
        fit(settings(), data, folder=tmp_path / "run", sink=rows, console=Console(file=io.StringIO()))
    assert [row["step"] for row in rows.rows] == [1, 2]
    assert handlers() == before


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    stop = StopOnSignal()
    stop._handle(signal.SIGTERM, None)
    stop._handle(signal.SIGTERM, None)
    assert stop.received is signal.SIGTERM
    stop._when -= 2
    with pytest.raises(SystemExit) as left:
        stop._handle(signal.SIGTERM, None)
    assert left.value.code == 143


def test_the_line_tells_loss_speed_time_left_and_memory_after_the_first_step_and_then_now_and_then(
    tmp_path: Path, data: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_PLAIN_EVERY", 1e-9)
    text = io.StringIO()
    rows = Rows()
    console = Console(file=text, width=200)
    fit(settings(max_steps=4), data, folder=tmp_path / "run", sink=rows, console=console)
    lines = text.getvalue().splitlines()
    assert len(lines) == 4
    smooth = rows.rows[0]["loss"]
    for number, said in enumerate(lines, start=1):
        smooth = smooth if number == 1 else 0.9 * smooth + 0.1 * rows.rows[number - 1]["loss"]
        assert re.fullmatch(
            rf"training +{25 * number}%  step {number}/4  loss {smooth:.3f}  {SIZE}[kM]? tokens/s  "
            rf"{SIZE} (s|ms|us) left  {SIZE} [MG]iB peak",
            said,
        ), said
    assert lines[-1].split("  ")[-2] == "0 us left"


def test_without_a_terminal_ten_seconds_pass_between_lines(
    tmp_path: Path, data: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    before_each_step(monkeypatch, lambda _: clock.__setitem__(0, clock[0] + 4.0))
    text = io.StringIO()
    fit(settings(), data, folder=tmp_path / "run", sink=Rows(), console=Console(file=text, width=200))
    assert re.findall(r"step (\d)/8", text.getvalue()) == ["1", "4", "7"]


def test_on_a_terminal_the_line_is_taken_away_when_the_run_dies(
    tmp_path: Path, data: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(module: LanguageModel) -> None:
        if module.step == 2:
            raise RunError("dead")

    before_each_step(monkeypatch, die)
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with pytest.raises(RunError):
        fit(settings(), data, folder=tmp_path / "run", sink=Rows(), console=console)
    assert "step 1" in text.getvalue()
    assert text.getvalue().count("\x1b[?25l") == text.getvalue().count("\x1b[?25h") == 1  # the cursor is back


def test_a_run_that_goes_on_estimates_by_its_own_part(
    tmp_path: Path, data: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_PLAIN_EVERY", 1e-9)
    train(tmp_path, data, settings(max_steps=6, optimizer={"schedule": "constant"}))
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    before_each_step(monkeypatch, lambda _: clock.__setitem__(0, clock[0] + 1.0))
    text = io.StringIO()
    fit(
        settings(max_steps=10, optimizer={"schedule": "constant"}), data, folder=tmp_path / "run", sink=Rows(),
        console=Console(file=text, width=200), resume=True,
    )  # fmt: skip
    said = [
        re.findall(r"step (\d+)/10 .* (\d+) tokens/s  (\S+ \S+) left", entry)[0]
        for entry in text.getvalue().splitlines()
    ]
    assert said == [
        ("7", str(8 * CONTEXT), "3 s"), ("8", str(8 * CONTEXT), "2 s"), ("9", str(8 * CONTEXT), "1 s"),
        ("10", str(8 * CONTEXT), "0 us"),
    ]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_says_nothing_that_is_not_its_own(tmp_path: Path, precision: str) -> None:
    ended = command(tmp_path, *line(tmp_path, f"trainer.precision={precision}", "data.workers=1"))
    assert ended.code == 0
    said = ended.stderr.splitlines()
    assert said[:2] == ["reading the corpus", "turning text into tokens"]
    assert [text for text in said[2:] if not re.match(r"training +\d+%  step \d+/20  loss ", text)] == []
    assert (the_run(tmp_path).path / "log.txt").read_text() == ""


def test_torch_is_left_as_it_was(tmp_path: Path, data: TextDataset) -> None:
    threads = torch.get_num_threads()
    run = train(tmp_path, data, settings())
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    assert isinstance(run.outcome.model, Transformer)
    assert next(run.outcome.model.parameters()).device == run.outcome.device
