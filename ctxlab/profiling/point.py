"""One measured point: a training step of one model at one context, alone in a process of its own.

Run as `python -m ctxlab.profiling.point`: reads a JSON specification on standard input, prints one JSON line. It imports
torch and the model only, so that the idle process is small and the same for every point.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.transformer import Transformer
from ctxlab.train.memory import peak_memory_bytes
from ctxlab.train.optim.base import OPTIMIZERS
from ctxlab.train.precision import autocast

MIN_SECONDS, MIN_STEPS = 0.5, 3


def _reset_peak(device: torch.device) -> int:
    """Starts a new peak at what is in use now, and returns that: the idle process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # VmHWM := VmRSS
    return peak_memory_bytes(device)[0]


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Builds the model and runs real steps (forward, backward, optimizer); memory or time, as `what` asks."""
    device = torch.device(spec["device"])
    if spec["memory_limit"] is not None and device.type == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (spec["memory_limit"], spec["memory_limit"]))
    torch.manual_seed(0)
    warm = torch.randn(256, 256, device=device)
    (warm @ warm).sum().item()
    idle = _reset_peak(device)

    context = spec["context"]
    model = Transformer(
        ModelConfig.model_validate(spec["model"]),
        POSITIONS.config(spec["position"]),
        ATTENTIONS.config(spec["attention"]),
        vocab_size=spec["vocab_size"],
        context=context,
    ).to(device)
    model.recompute = spec["recompute"]
    optimizer = OPTIMIZERS.get(spec["optim"]["name"])(OPTIMIZERS.config(spec["optim"])).build(model)
    tokens = torch.randint(spec["vocab_size"], (1, context + 1), device=device)

    def step() -> None:
        with autocast(spec["precision"], device):
            hidden = model.hidden(tokens[:, :-1])
            loss = model.nats(hidden, tokens[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    if spec["what"] == "memory":
        step()  # the optimizer's state exists from the second step on
        peak, source = peak_memory_bytes(device)
        return {"peak_memory_bytes": peak - idle, "total_bytes": peak, "source": source}
    seconds: list[float] = []
    while len(seconds) < MIN_STEPS or sum(seconds) < MIN_SECONDS:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > spec["enough_seconds"]:
            break
    return {"step_seconds": statistics.median(seconds), "best_seconds": min(seconds), "n_steps": len(seconds)}


def main() -> int:
    spec = json.load(sys.stdin)
    try:
        result = {"status": "done", **measure(spec)}
    except (RuntimeError, MemoryError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        full = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate" in str(error)
        result = {"status": "out_of_memory" if full else "failed", "reason": text}
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
