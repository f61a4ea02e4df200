"""One measured point: a training step of one model at one context, alone in a process of its own.

Run as `python -m ctxlab.profiling.point`: reads a JSON specification on standard input, prints one JSON line. It
imports torch and the model only, so that the idle process is small and the same for every point. A point that takes
turns with others says READY when it has warmed up, runs one step for every further line that it reads, and says READY
again behind each.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer of a process imports it, 70 MB; that is no model's

from ctxlab.errors import CtxlabError, UndefinedBeyondTraining
from ctxlab.model.attention import native
from ctxlab.model.base import ARCHITECTURES, Model, build_model, read_parts
from ctxlab.model.offload import offloading
from ctxlab.profiling import READY
from ctxlab.registry import import_file
from ctxlab.train.memory import peak_memory_bytes
from ctxlab.train.optim.base import OPTIMIZERS, Optimizer
from ctxlab.train.optim.early import EarlyUpdates
from ctxlab.train.precision import Precision, autocast
from ctxlab.train.trained import freeze
from ctxlab.units import format_bytes

MIN_SECONDS, MIN_STEPS = 0.5, 3
DECODED = 16  # tokens that are decoded one by one
SIZES = (256, 512, 1024, 2048)  # of the matrices whose product is timed on a CPU, each twice the one before
WIDE_SIZES = (2048, 4096, 8192)  # and elsewhere, where the smaller ones do not fill the chip
LONG = 10  # times `enough_seconds` is too much even for a median of three steps
_WARM = 256  # width of the warm-up: wide enough for every thread to take part
_NO_ROOM = ("out of memory", "allocate", "alloc_failed")  # of torch, of the C library, of cuBLAS


def measure(spec: dict[str, Any], say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Builds the model and runs real steps (forward, backward, clipping, optimizer), and says which attention kernel ran.

    `what` asks for memory, for time, or for time in turns: then `say` tells the parent that it is its turn; for generation,
    or for the rate of a matmul, in place of steps. All of them are held to `memory_limit`.
    """
    device = torch.device(spec["device"])
    if spec["what"] == "matmul":
        return matmul_rate(spec["precision"], device, spec["enough_seconds"])
    native.forget()
    result = _measure(spec, say, device)
    return {**result, "attention_kernel": native.ran()} if native.ran() else result


def _measure(spec: dict[str, Any], say: Callable[[str], None], device: torch.device) -> dict[str, Any]:
    for name, file in spec["plugins"]:
        import_file(name, Path(file))
    parts = read_parts(spec)
    ARCHITECTURES.get(parts.model.architecture).check_installed()  # imports are no model's either
    optim = OPTIMIZERS.get(spec["optim"]["name"])(OPTIMIZERS.config(spec["optim"]))
    torch.manual_seed(0)
    warm_up(optim, spec["precision"], device)
    idle = start_peak(device)
    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    limit, context = spec["memory_limit"], spec["context"]
    with _limited(limit, idle, device):
        vocab_size, sources = spec["vocab_size"], spec["source_vocab_size"]
        model = build_model(parts, vocab_size=vocab_size, context=context, source_vocab_size=sources).to(device)
        model.recompute, model.loss_chunk = spec["recompute"], spec["loss_chunk"]
        freeze(model, spec["freeze"])
        optimizer = optim.build(model)
        early = EarlyUpdates(optimizer) if spec["update"] == "backward" else None
        tokens = torch.randint(min(vocab_size, sources or vocab_size), (1, context + 1), device=device)
        if spec["what"] == "generation":
            result = generation(model, tokens[:, :context], spec["precision"], device)
            return {**result, **_used(limit, idle, device)}

        # A recurrent model's steps all see a memory but the first of a document: measured is one that does.
        memory = model.new_memory(1) if model.carries else None
        if memory is not None:
            memory.held.fill_(memory.capacity)

        def step() -> None:
            with autocast(spec["precision"], device):
                source: Any = {"source": tokens[:, :-1]} if model.reads_source else {}
                with offloading(spec["offload"], model.parameters()):
                    hidden = model.hidden(tokens[:, :-1], memory=memory, **source)
                nats = model.nats(hidden, tokens[:, 1:])
                del hidden
                loss = nats.sum() / context  # not their mean, whose gradient torch writes out token by token
            loss.backward()
            if early is not None:
                early.take_norm(list(model.parameters()))
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), optim.config.clip or float("inf"))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        def timed() -> float:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start

        step()
        if spec["what"] == "memory":
            step()  # the first that runs with all in place: optimizer state, kernels made to measure
            result = _used(limit, idle, device)
            if device.type == "cuda":
                result["allocated_bytes"] = torch.cuda.max_memory_allocated(device) - allocated
            return result
        seconds: list[float] = []
        if spec["what"] == "turns":
            say(READY)
            for _ in sys.stdin:
                seconds.append(timed())
                say(READY)
            return {"seconds": seconds}
        while len(seconds) < MIN_STEPS or sum(seconds) < MIN_SECONDS:
            seconds.append(timed())
            if sum(seconds) > (spec["enough_seconds"] if len(seconds) >= MIN_STEPS else LONG * spec["enough_seconds"]):
                break
        return {"step_seconds": statistics.median(seconds), "best_seconds": min(seconds), "n_steps": len(seconds)}


def _used(limit: int | None, idle: int, device: torch.device) -> dict[str, Any]:
    """The peak over the idle process, and in all. Raises MemoryError where that is more than the limit."""
    peak, source = peak_memory_bytes(device)
    if limit is not None and peak > limit:
        raise MemoryError
    return {"peak_memory_bytes": peak - idle, "total_bytes": peak, "source": source}


def generation(model: Model, tokens: torch.Tensor, precision: Precision, device: torch.device) -> dict[str, Any]:
    """Seconds to read all but the last DECODED of `tokens` (1,T), and of each of these, one by one behind what is cached.

    Each step ends with the logits of one place, as it does where a next token is chosen. Reading is timed thrice. A source, of
    as many tokens, has been encoded before.
    """
    model.eval()
    n_decoded = min(DECODED, tokens.shape[1] - 1)
    prompt = tokens.shape[1] - n_decoded
    reader: Any = model
    with torch.inference_mode(), autocast(precision, device):
        more: Any = {"encoded": reader.encode(tokens)} if model.reads_source else {}

    def timed(new: torch.Tensor, cache: Any) -> float:
        start = time.perf_counter()
        model.logits(model.hidden(new, cache=cache, **more)[:, -1])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.no_grad(), autocast(precision, device):  # one for all steps: it keeps the weights that it has cast
        prefill = []
        for _ in range(MIN_STEPS):
            cache = model.new_cache()
            prefill.append(timed(tokens[:, :prompt], cache))
        steps = [timed(tokens[:, at : at + 1], cache) for at in range(prompt, tokens.shape[1])]
    return {
        "prefill_seconds": statistics.median(prefill),
        "decode_seconds_per_token": statistics.median(steps) if steps else None,
        "cache_bytes": cache.bytes,
        "cache_allocated_bytes": cache.allocated_bytes,
        "prompt": prompt,
        "decoded": n_decoded,
        **({"decoding_kernel": _decoded_by(cache)} if device.type == "cpu" else {}),
    }


def _decoded_by(cache: Any) -> str:
    """What computed the blocks around their attention, by what a cache keeps of that."""
    steps = [getattr(layer, "step", None) for layer in getattr(cache, "layers", ())]
    return "native" if any(step is not None and step[1] is not None for step in steps) else "torch"


def matmul_rate(precision: Precision, device: torch.device, seconds: float) -> dict[str, Any]:
    """The best rate of a square matmul over SIZES, or WIDE_SIZES, 2 n^3 operations each: what a model's is compared with.

    Takes about `seconds`: a size whose one product would take as long by itself is left out, with those above it, which
    costs nothing where numbers are emulated (bf16 without its instructions) and the rate is the same at every size.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best, at = 0.0, 0
    soonest = 0.0  # seconds that a product of this size takes by the rate of the one before
    sizes = SIZES if device.type == "cpu" else WIDE_SIZES
    for size in sizes:
        if soonest > seconds:
            break
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        spent, rounds = 0.0, 0
        while rounds < MIN_STEPS or spent < seconds / len(sizes):
            start = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took = time.perf_counter() - start
            spent, rounds = spent + took, rounds + 1
            if rounds > 1 and 2 * size**3 / took > best:  # the first of a size sets things up
                best, at = 2 * size**3 / took, size
        soonest = took * 8
    return {"flops_per_second": best, "size": at}


def warm_up(optim: Optimizer, precision: Precision, device: torch.device) -> None:
    """One step of a throw-away matrix: what the first of all steps brings into a process stays, the matrix goes.

    That is threads with their stacks, the code of matmul, backward and optimizer, and what libraries set up once. The
    code of the model's own kernels and whatever is made to the measure of its shapes is left to the model.
    """
    layer = torch.nn.Linear(_WARM, _WARM).to(device)
    optimizer = optim.build(layer)
    with autocast(precision, device):
        loss = layer(torch.randn(_WARM, _WARM, device=device)).square().mean()
    loss.backward()
    optimizer.step()
    loss.item()


def start_peak(device: torch.device) -> int:
    """Starts a new peak at what is in use now, and returns that: the idle process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    with contextlib.suppress(AttributeError):  # room that imports left free would hide as much of the model
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # not there, or closed to us: then the peak so far stands for the idle process
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    return peak_memory_bytes(device)[0]


@contextlib.contextmanager
def _limited(limit: int | None, idle: int, device: torch.device) -> Iterator[None]:
    """Lets the process grow to `limit` bytes in all and no further.

    On a CPU the kernel limits what is mapped, not what is used: from what is mapped now the process may go as far as
    `limit` is from what it uses now.
    """
    if limit is None:
        yield
        return
    if device.type == "cuda":
        everything = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / everything))
        yield
        return
    if limit <= idle:
        raise MemoryError(f"the process takes {format_bytes(idle)} before there is a model")
    status = Path("/proc/self/status")
    mapped = re.search(r"VmData:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if mapped is None:
        yield  # nothing to go by: the peak is compared in the end
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(mapped[1]) * 1024 + limit - idle, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _without_result(error: Exception, limit: int | None) -> dict[str, Any]:
    """What a point that ended in an error is, and why, in one line."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if isinstance(error, UndefinedBeyondTraining):
        return {"status": "undefined", "reason": text}
    full = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in text.lower() for words in _NO_ROOM)
    )
    if not full:
        kind = "" if isinstance(error, CtxlabError) and text else type(error).__name__
        return {"status": "failed", "reason": ": ".join(filter(None, (kind, text)))}
    if limit is None:
        return {"status": "out_of_memory", "reason": text or "no memory is left"}
    more = f" ({text})" if isinstance(error, MemoryError) and text else ""
    return {"status": "out_of_memory", "reason": f"does not fit in {format_bytes(limit)}{more}"}


def serve(measure: Callable[[dict[str, Any], Callable[[str], None]], dict[str, Any]]) -> int:
    """Reads a specification, prints what `measure` finds with its status; an error, too little memory too, is a result."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not the answer
    spec = json.loads(sys.stdin.readline())
    try:
        result = {"status": "done", **measure(spec, lambda word: print(word, file=answer, flush=True))}
    except Exception as error:
        result = _without_result(error, spec["memory_limit"])
    print(json.dumps(result), file=answer, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve(measure))
