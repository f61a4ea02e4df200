"""What a training step will hold in memory, said without running it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ctxlab.model import count
from ctxlab.model.base import read_parts
from ctxlab.profiling.measure import Point
from ctxlab.profiling.trace import KINDS, asked_for_numbers, trace_step, trace_update
from ctxlab.train.optim.base import OPTIMIZERS

LINE = {"cpu": 1024, "cuda": 2048}
"""Shortest context from which on memory goes on as lines: no scheme or mechanism holds more than a line, and tiles are full."""

CONTINUED = "continued from traces"

PROCESS_BYTES = 15 * 2**20
WIDE_PROCESS_BYTES = {"fp32": 26 * 2**20, "bf16": 30 * 2**20}
"""What a first step brings into a process besides tensors, on a CPU: code of kernels, their scratch, small blocks of the heap. On
one with AVX512 kernels are larger.

Set by hand from twelve points (with AVX512 thirteen in each precision) at contexts of 384, 1,536, 3,072 and 6,144 tokens, before
anything else was measured.
"""


ROOM = {"cpu": 0.03, "cuda": 0.05}
"""Share of a prediction that has to be free besides, where a context is said to fit: what predictions may be short by. On a GPU
most of it is room between blocks, which the allocator gives back before it fails."""


_STANDING = ("weights", "gradients", "optimizer", "process")  # what is there once, however many rows there are


CLOSED_FORM = "closed form"  # one way of a prediction: beside the model, where no fake tensor gets through it


@dataclass(frozen=True)
class Prediction:
    """Peak bytes of a step over the idle process, split by what they are for, and how they were found."""

    context: int
    split: Mapping[str, float]  # of KINDS, and `process`
    way: str  # traced, continued from traces, or closed form

    @property
    def bytes(self) -> float:
        return sum(self.split.values())


class Predictor:
    """Predicts steps that differ from `point`, whose policy is none that `auto` would choose, in their context only. Traces are
    kept for the life of the object.

    `updates` keeps what optimizers hold, for predictors of steps that differ in other ways than their weights.
    """

    def __init__(self, point: Point, updates: dict[str, tuple[int, dict[str, int]]] | None = None) -> None:
        self.point = point
        self.updates = {} if updates is None else updates
        self.moments = functools.cache(self._moments)

    def memory(self, context: int) -> Prediction:
        """Bytes of one step at batch 1.

        Of a component that no fake tensor gets through, the closed form beside the model.
        """
        moments, way = self._stretches(context)
        return Prediction(context, max(moments, key=lambda split: sum(split.values())), way)

    def _stretches(self, context: int) -> tuple[Sequence[Mapping[str, float]], str]:
        """The splits at the worst moment of each stretch of a step, and how they were found."""
        process = _process_bytes(self.point)
        start = self._start
        try:
            if context <= 2 * start:
                return [{**split, "process": process} for split in self.moments(context)], "traced"
            near, far = self.moments(start), self.moments(2 * start)
        except Exception as error:
            if not asked_for_numbers(error):
                raise
            return [{**self._closed(context), "process": process}], CLOSED_FORM
        share = (context - start) / start
        moments = [
            {kind: max(0.0, a[kind] + share * (b[kind] - a[kind])) for kind in KINDS} | {"process": process}
            for a, b in zip(near, far, strict=True)
        ]
        return moments, CONTINUED

    def fits(self, context: int, memory: float) -> bool:
        """Whether a step is predicted to fit, with ROOM."""
        return self.memory(context).bytes * (1 + self.room) <= memory

    def longest(self, memory: float) -> int:
        """The longest context, in whole multiples of 64 tokens, whose step, with ROOM, is predicted to fit `memory` bytes.

        0 where not even 64 tokens fit.
        """
        low, high = 0, -(-2 * self._start // 64) * 64  # from there on nothing is traced again
        while self.fits(high, memory):
            low, high = high, 2 * high
            if high > 2**40:
                break
        while high - low > 64:
            middle = (low + high) // 128 * 64
            if self.fits(middle, memory):
                low = middle
            else:
                high = middle
        return low

    def rows_bytes(self, context: int, rows: int) -> float:
        """Bytes of a step whose rows are `rows` at once: what one row adds is taken to be what its own tokens add.

        The logits of a chunk, and the gradient of the matrix that makes them, are there once.
        """
        one, all_rows = self._loss(context), self._loss(rows * context)
        found = []
        for split in self._stretches(context)[0]:
            standing = sum(split[kind] for kind in _STANDING)
            added = sum(split.values()) - standing
            if split["logits"] >= one:
                found.append(standing + all_rows + rows * (added - one))
            else:
                found.append(standing + rows * added)
        return max(found)

    def rows(self, context: int, memory: float) -> int:
        """How many rows of `context` tokens fit at once, the largest number whose `rows_bytes`, with ROOM, do.

        0 where one does not.
        """
        low, high = 0, 1
        while self.rows_bytes(context, high) * (1 + self.room) <= memory:
            low, high = high, 2 * high
            if high > 2**40:
                break
        while high - low > 1:
            middle = (low + high) // 2
            if self.rows_bytes(context, middle) * (1 + self.room) <= memory:
                low = middle
            else:
                high = middle
        return low

    def _loss(self, tokens: int) -> int:
        """Bytes that the loss of so many tokens holds once: a chunk's logits, in the compute dtype and fp32, and the gradient."""
        each = 8 if self.point.precision == "fp32" else 6
        return self.point.vocab_size * (each * min(tokens, self.point.chunk) + 4 * self.point.model["d_model"])

    @property
    def room(self) -> float:
        return ROOM[self.point.device]

    @property
    def _start(self) -> int:
        """The context from which on memory goes on as lines: before it the logits, all at once, grow too."""
        return max(LINE[self.point.device], self.point.chunk)

    def _moments(self, context: int) -> Sequence[Mapping[str, float]]:
        point = replace(self.point, context=context)
        shapes = point.n_parameters(context)  # of a learned table those change with the context
        key = repr((point.model, point.position, point.attention, point.optim, point.update, point.freeze, shapes))
        if key not in self.updates:
            self.updates[key] = trace_update(point)
        state, update = self.updates[key]
        return [*({**split, "optimizer": state} for split in trace_step(point)), update]

    def _closed(self, context: int) -> dict[str, float]:
        total, trained = self.point.counted or (self.point.n_parameters(context),) * 2
        activations = count.activation_bytes(
            *read_parts(self.point.__dict__),
            vocab_size=self.point.vocab_size,
            context=context,
            precision=self.point.precision,  # type: ignore[arg-type]
            recompute=self.point.recompute,  # type: ignore[arg-type]
            loss_chunk=self.point.chunk,
        )
        states = OPTIMIZERS.get(self.point.optim["name"]).states
        gradients = trained if self.point.update == "step" else 0
        found = {
            "weights": 4 * total, "gradients": 4 * gradients, "optimizer": 4 * states * trained, "activations": activations,
        }  # fmt: skip
        return {kind: float(found.get(kind, 0)) for kind in KINDS}


def _process_bytes(point: Point) -> int:
    if point.device != "cpu":
        return 0
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return WIDE_PROCESS_BYTES[point.precision] if is_wide else PROCESS_BYTES
