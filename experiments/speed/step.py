"""One step of one contestant, alone in a process of its own: its seconds, or its peak.

Reads a JSON specification on standard input, prints one JSON line; speed.py starts it.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from contestants import VOCAB, WAYS

from ctxlab.model.attention import native
from ctxlab.profiling.point import serve, start_peak, warm_up
from ctxlab.train.memory import peak_memory_bytes
from ctxlab.train.optim.base import OPTIMIZERS
from ctxlab.train.precision import autocast

SHORT, STEPS = 512, 2


def measure(spec: dict[str, Any], _: object) -> dict[str, Any]:
    """`time`: seconds of STEPS steps behind a first. `memory`: the peak of a step over the process that has imported all.

    That step follows one of SHORT tokens, which leaves the optimizer's state and whatever else is made once.
    """
    resource.setrlimit(resource.RLIMIT_AS, (spec["memory_limit"], spec["memory_limit"]))
    device, precision = torch.device("cpu"), spec["precision"]
    torch.manual_seed(0)
    warm_up(OPTIMIZERS.get("adamw")(OPTIMIZERS.config({"name": "adamw"})), precision, device)
    build = WAYS[spec["way"]][spec["contestant"]]
    try:
        build(SHORT)  # what it imports is not the step's
    except ModuleNotFoundError as error:
        return {"status": "skipped", "reason": f"{error.name} is not installed"}
    idle = start_peak(device)
    model, loss = build(spec["context"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    text = torch.randint(VOCAB, (spec["rows"], spec["context"] + 1))

    def step(text: torch.Tensor) -> float:
        start = time.perf_counter()
        with autocast(precision, device):
            nats = loss(text[:, :-1], text[:, 1:])
        nats.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    facts = {"parameters": sum(p.numel() for p in model.parameters())}
    if spec["what"] == "time":
        step(text)
        return {"seconds": [step(text) for _ in range(STEPS)], "kernel": native.ran(), **facts}
    step(text[:1, : SHORT + 1])
    step(text)
    return {"peak_bytes": peak_memory_bytes(device)[0] - idle, "kernel": native.ran(), **facts}


if __name__ == "__main__":
    sys.exit(serve(measure))
