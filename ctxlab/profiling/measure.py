"""Memory and time of one training step by context: every point in processes of its own, so that none inherits a peak.

Memory and time are two processes. The allocator setting that makes a peak exact to the page (every block of 64 KiB or
more is mapped and given back at once) slows a step by up to a third, so time is taken under the default one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from ctxlab.errors import IncompatibleError, RunError
from ctxlab.fields import Bytes, Length, OrAuto, OrNone, Seconds
from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.base import ARCHITECTURES, read_parts
from ctxlab.model.count import chosen_recompute, flops_per_token, parameters, rows_at_once, standing_bytes
from ctxlab.model.loss import chunk_for
from ctxlab.model.offload import OffloadSetting
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.remake import RecomputeSetting
from ctxlab.profiling import READY
from ctxlab.records.schema import Measurement
from ctxlab.registry import ComponentConfig, Registry
from ctxlab.train.memory import total_memory_bytes
from ctxlab.train.optim.base import OPTIMIZERS
from ctxlab.train.optim.early import Update
from ctxlab.units import format_seconds

EXACT_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
PROTOCOL = "one training step, batch 1"
GENERATION = "generation, batch 1"

ROOM = 2
"""How many times the limit the process may take that times a step on a CPU: the default allocator, which it runs under, keeps
what a step no longer uses."""


class MeasureConfig(ComponentConfig):
    """Which contexts are measured, and the limits of each point."""

    contexts: OrAuto | OrNone | tuple[Length, ...] = Field(
        "auto", description="auto: the lengths of the evaluation table"
    )
    memory: OrNone | Bytes = Field("none", description="limit of one point's process; above it it is out_of_memory")
    generation: OrAuto | bool = Field(
        False, description="measure reading and decoding too, and the cache; auto: of a model that can"
    )
    timeout: Seconds = Field(300.0, description="limit of one point; above it the point is timed_out")

    def generates(self, architecture: str) -> bool:
        """Whether generation is measured of a model. Raises IncompatibleError where it is asked for and cannot be."""
        can = ARCHITECTURES.get(architecture).causal
        if self.generation is True and not can:
            raise IncompatibleError(
                f"profile.generation: model.architecture={architecture} writes no text, since each of its places sees what "
                "follows; use false or auto"
            )
        return can and self.generation is not False


@dataclass(frozen=True)
class Point:
    """What one point runs: plain settings, as they go to the child process.

    Under recompute=auto `at` says which policy a context has, by what a training with these settings would choose in `memory`.
    """

    model: dict[str, Any]
    position: dict[str, Any] | Literal["none"]
    attention: dict[str, Any] | Literal["none"]
    optim: dict[str, Any]
    vocab_size: int
    context: int
    precision: str
    device: str
    recompute: RecomputeSetting = "none"
    offload: OffloadSetting = "none"
    update: Update = "step"
    loss_chunk: int | None = None
    source_vocab_size: int | None = None  # where sources have tokens of their own
    freeze: tuple[str, ...] = ()
    counted: tuple[int, int] | None = None  # all weights and those that are trained, where these are fewer
    memory: int = 0
    micro_batch: int | Literal["auto"] = 1
    step_tokens: int = 0
    memory_limit: int | None = None
    enough_seconds: float = 3.0

    def at(self, context: int, *, rows: int | None = None) -> Point:
        """The same with this context, and the policy that it has there; of `rows` at once, or as many as are asked for."""
        if self.recompute != "auto":
            return replace(self, context=context)
        parts = read_parts(self.__dict__)
        if rows is None:
            rows = rows_at_once(self.micro_batch, self.step_tokens, context)
        policy = chosen_recompute(
            "auto",
            *parts,
            vocab_size=self.vocab_size,
            context=context,
            rows=rows,
            precision=self.precision,  # type: ignore[arg-type]
            loss_chunk=self.chunk,
            standing=self.standing(context),
            memory=self.memory,
        )
        return replace(self, context=context, recompute=policy)

    @property
    def chunk(self) -> int:
        """Tokens whose logits exist at once."""
        return chunk_for(self.vocab_size, self.device, self.loss_chunk)

    def standing(self, context: int) -> int:
        """Bytes of weights, gradients and the optimizer's numbers, by closed form."""
        total, trained = self.counted or (self.n_parameters(context),) * 2
        return standing_bytes(total, trained, OPTIMIZERS.get(self.optim["name"]).states)

    def n_parameters(self, context: int) -> int:
        """All weights of the model."""
        sizes = {"vocab_size": self.vocab_size, "source_vocab_size": self.source_vocab_size}
        return parameters(*read_parts(self.__dict__), context=context, **sizes).total  # type: ignore[arg-type]


def run_point(point: Point, what: str, timeout: float) -> dict[str, Any]:
    """Measures "memory", "time", "generation" or "matmul" of one point; a dead child is a result, not an exception."""
    return answer_of(_start(what), _specification(point, what), timeout)


def answer_of(child: subprocess.Popen[str], specification: str, timeout: float) -> dict[str, Any]:
    """What a child that `serve`s says to a specification, with its status; or how it died, and why."""
    try:
        out, err = child.communicate(specification, timeout=timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return {"status": "timed_out", "reason": f"took longer than {format_seconds(timeout)}"}
    except BaseException:
        child.kill()
        child.communicate()
        raise
    if child.returncode == -signal.SIGKILL:
        return {"status": "out_of_memory", "reason": "killed by the system"}
    if child.returncode < 0:
        return {"status": "failed", "reason": f"killed by {signal.Signals(-child.returncode).name}"}
    if child.returncode or not out.strip():
        reason = err.strip().splitlines()[-1] if err.strip() else f"exit code {child.returncode}"
        return {"status": "failed", "reason": reason}
    result: dict[str, Any] = json.loads(out)
    return result


def steps_in_turns(points: Sequence[Point], rounds: int) -> list[list[float]]:
    """Seconds of `rounds` training steps of each point; the points, all in memory at once, run one step each in turn.

    What else happens on the machine then falls on all of them alike. Raises RunError with the reason of a point that
    cannot be measured.
    """
    children: list[subprocess.Popen[str]] = []
    try:
        for point in points:  # one after the other: none warms up while another does
            child = _start("turns", stderr=subprocess.DEVNULL)
            children.append(child)
            _tell(child, _specification(point, "turns"))
        for _ in range(rounds):
            for child in children:
                _tell(child, "")
        return [json.loads(child.communicate()[0])["seconds"] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


def _tell(child: subprocess.Popen[str], line: str) -> None:
    """Sends a line and waits until the point is ready for the next."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(line + "\n")
    child.stdin.flush()
    answer = child.stdout.readline().strip()
    if answer != READY:
        raise RunError(json.loads(answer)["reason"] if answer else f"a point ended with exit code {child.wait()}")


def _start(what: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    return start_child(["-m", "ctxlab.profiling.point"], exact=what == "memory", stderr=stderr)


def start_child(words: Sequence[str], *, exact: bool, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Python on these words, under the allocator whose peaks are exact or under the default one."""
    environment = {key: value for key, value in os.environ.items() if key not in EXACT_ALLOCATOR}
    if exact:
        environment |= EXACT_ALLOCATOR
    return subprocess.Popen(
        [sys.executable, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        errors="replace",
        env=environment,
    )


def _specification(point: Point, what: str) -> str:
    return json.dumps({**point.at(point.context).__dict__, "what": what, "plugins": plugin_files(point)})


def plugin_files(point: Point) -> list[tuple[str, str]]:
    """(module, path) of each file outside the package that a component of the point comes from."""
    found: dict[str, str] = {}
    registries: tuple[tuple[Registry[Any], dict[str, Any] | Literal["none"]], ...] = (
        (POSITIONS, point.position),
        (ATTENTIONS, point.attention),
        (OPTIMIZERS, point.optim),
    )
    for registry, settings in registries:
        if settings == "none":
            continue
        name = registry.get(settings["name"]).__module__
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is not None and not name.startswith("ctxlab."):
            found[name] = path
    return list(found.items())


def measure_step(
    point: Point,
    contexts: Iterable[int],
    *,
    timeout: float,
    advance: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """peak_memory_bytes, step_seconds and tokens_per_second of one training step at each context.

    The limit is on memory taken exactly. A step that does not fit into it is not run a second time for its time; where it does,
    what the default allocator keeps besides has ROOM, and no more than the machine has unless the limit has more.
    """
    rows: list[Measurement] = []
    for context in contexts:
        here = point.at(context)
        advance(f"memory of a step at {context}")
        used = {"recompute": here.recompute, **run_point(here, "memory", timeout)}
        sizes = ("recompute", "total_bytes", "allocated_bytes", "source", "attention_kernel")
        rows += _rows(used, context, (("peak_memory_bytes", "B"),), sizes)
        advance(f"time of a step at {context}")
        fits = used["status"] != "out_of_memory"
        timed = run_point(replace(here, memory_limit=timing_limit(point)), "time", timeout) if fits else dict(used)
        if fits and timed["status"] == "out_of_memory":
            timed["reason"] += " under the default allocator, where a step is timed"
        if timed["status"] == "done":
            timed["tokens_per_second"] = context / timed["step_seconds"]
        facts = ("best_seconds", "n_steps", "attention_kernel")
        rows += _rows(timed, context, (("step_seconds", "s"), ("tokens_per_second", "tokens/s")), facts)
    return rows


def timing_limit(point: Point) -> int | None:
    """How far the process may grow that times a step whose memory, taken exactly, is held to the point's limit."""
    limit = point.memory_limit
    if limit is None or point.device != "cpu":  # one allocator for both
        return limit
    return min(ROOM * limit, max(limit, total_memory_bytes()))


def measure_generation(
    point: Point,
    contexts: Iterable[int],
    *,
    timeout: float,
    advance: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """prefill_seconds, decode_seconds_per_token and cache_bytes of each context, whose last tokens are decoded one by one.

    One process does all of it, under the allocator that a user's has, and is itself held to the limit: a context whose step
    does not fit may well be read. Its peak is a fact beside the cache, not exact as a step's is.
    """
    rows: list[Measurement] = []
    for context in contexts:
        advance(f"generation at {context}")
        result = run_point(replace(point, context=context), "generation", timeout)
        names: tuple[tuple[str, str], ...] = (("prefill_seconds", "s"), ("cache_bytes", "B"))
        if result.get("decode_seconds_per_token", 0.0) is not None:
            names = (*names, ("decode_seconds_per_token", "s/token"))
        sizes = ("cache_allocated_bytes", "peak_memory_bytes", "total_bytes")
        facts = ("prompt", "decoded", *sizes, "attention_kernel", "decoding_kernel")
        rows += _rows(result, context, names, facts, GENERATION)
    return rows


def arithmetic(point: Point, measured: Sequence[Measurement], peak: float | None) -> list[Measurement]:
    """flops_per_second of every measured step, and flops_utilization where a matmul's `peak` rate is known.

    Operations are counted by `flops_per_token`, recomputation and the optimizer left out (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B). The second is their model FLOPs utilization but for what it is a share of: what a matmul
    was seen to reach here, which on a CPU has no data sheet, and not the peak of one.
    """
    parts = read_parts(point.__dict__)
    rows: list[Measurement] = []
    for m in measured:
        if m.name != "step_seconds" or m.value is None or m.context is None:
            continue
        needed = (
            flops_per_token(parts.model, parts.attention, vocab_size=point.vocab_size, context=m.context) * m.context
        )
        here: dict[str, Any] = {"context": m.context, "protocol": PROTOCOL}
        rate = needed / m.value
        rows.append(Measurement(name="flops_per_second", value=rate, unit="FLOP/s", facts={"flops": needed}, **here))
        if peak:
            facts = {"matmul_flops_per_second": peak}
            rows.append(Measurement(name="flops_utilization", value=rate / peak, unit="1", facts=facts, **here))
    return rows


def _rows(
    result: dict[str, Any],
    context: int,
    names: tuple[tuple[str, str], ...],
    facts: tuple[str, ...],
    protocol: str = PROTOCOL,
) -> list[Measurement]:
    done = result["status"] == "done"
    return [
        Measurement(
            name=name,
            value=result[name] if done else None,
            unit=unit,
            context=context,
            protocol=protocol,
            status=result["status"],
            reason=result.get("reason", ""),
            facts={fact: result[fact] for fact in facts if fact in result},
        )
        for name, unit in names
    ]
