"""Memory of a training step: predicted and measured, for a budget, and with and without the matrix of scores.

    python experiments/memory_scaling/memory_scaling.py            prediction against measurement
    python experiments/memory_scaling/memory_scaling.py budget     the longest context that should fit, and 1.1 times that
    python experiments/memory_scaling/memory_scaling.py naive      attention that keeps its scores against attention that does not
    python experiments/memory_scaling/memory_scaling.py cuda       prediction against measurement on a GPU, and with as much room

Prints a JSON object a line. Words of the first may be models (nano, tiny, mini), only those are measured, and bf16 for fp32.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ctxlab.cli.environment import set_process_defaults

set_process_defaults()  # before torch is imported

import naive as _naive  # noqa: F401  registers attention=naive
import yaml
from pictures import save_errors, save_growth

from ctxlab.config.catalog import conf_dir
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.remake import Recompute
from ctxlab.profiling.fit import OTHERS, power_law
from ctxlab.profiling.measure import Point, run_point
from ctxlab.profiling.predict import Prediction, Predictor
from ctxlab.study.script import results_folder, run_script

MODELS = ("nano", "tiny", "mini")
POSITION_NAMES = ("rope", "alibi", "nope", "t5", "kerple", "fox")
LARGE = 256e6  # bytes, from which on the error counts as a share
BUDGETS = (("rope", 2**30), ("alibi", 2**30), ("t5", 2**30), ("rope", 2**32))
TIMEOUT = 1800
GPU_VOCAB, AT_ONCE = 32_768, 8  # points that share a GPU: each has its own peak
HELD, ENOUGH, TOO_LITTLE = ("rope", "t5"), 1.03, 0.97  # which of them get how much of what is predicted


def point(
    model: str, position: str, *, recompute: Recompute = "none", attention: str = "full", precision: str = "fp32"
) -> Point:
    sizes = yaml.safe_load((conf_dir() / "model" / f"{model}.yaml").read_text())
    return Point(
        model=ModelConfig.model_validate_json(json.dumps(sizes)).model_dump(mode="json"),
        position=POSITIONS.config({"name": position}).model_dump(mode="json"),
        attention={"name": attention},
        optim={"name": "muon"},
        vocab_size=2048,
        context=256,
        precision=precision,
        device="cpu",
        recompute=recompute,
    )


def points(models: Sequence[str]) -> Iterator[tuple[str, str, Recompute, tuple[int, ...]]]:
    """Model, position, policy, contexts: a ladder a model, those with recomputation where it is what counts, the longest last."""
    for position in POSITION_NAMES:
        for model, policy, contexts in (
            ("nano", "none", (256, 2048)), ("nano", "block", (1024,)),
            ("tiny", "none", (512, 2048)), ("tiny", "selective", (1024,)), ("tiny", "block", (4096,)),
            ("mini", "none", (512, 1024, 2048)), ("mini", "selective", (2048,)),
        ):  # fmt: skip
            if model in models:
                yield model, position, policy, contexts  # type: ignore[misc]
    for position in POSITION_NAMES[:3]:
        if "tiny" in models:
            yield "tiny", position, "none", (8192,)
    if "nano" in models:
        yield "nano", "rope", "none", (16_384,)
    if "mini" in models:
        yield "mini", "rope", "none", (8192,)


def grid(models: Sequence[str], precision: str) -> None:
    """One row a point, then what all of them say together."""
    rows: list[dict[str, Any]] = []
    for model, position, policy, contexts in points(models):
        if model not in models:
            continue
        at = point(model, position, recompute=policy, precision=precision)
        predictor = Predictor(at)
        for context in contexts:
            step = _at(at, context)
            rows.append(_compared(predictor.memory(context), step, run_point(step, "memory", TIMEOUT)))
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps(summary(rows)))
    name = "errors.png" if precision == "fp32" else f"errors-{precision}.png"
    save_errors(rows, LARGE, results_folder("memory_scaling") / name)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all points say together: errors as a share of large steps, in bytes of small ones."""
    done = [row for row in rows if row["status"] == "done"]
    large = [abs(row["error"]) for row in done if row["measured_bytes"] >= LARGE]
    small = [abs(row["error_bytes"]) for row in done if row["measured_bytes"] < LARGE]
    allocated = [abs(row["allocated_error"]) for row in done if "allocated_error" in row]
    return {
        "summary": "all",
        "n_points": len(rows),
        "n_done": len(done),
        "n_large": len(large),
        "median_error": round(statistics.median(large), 5) if large else None,
        "worst_error": max(large, default=None),
        "n_small": len(small),
        "worst_bytes": max(small, default=None),
        **({"worst_allocated_error": max(allocated)} if allocated else {}),
    }


def gpu_points() -> Iterator[tuple[Point, tuple[int, ...]]]:
    """Steps on a GPU and their contexts: those of a kind together. Schemes whose kernels torch compiles take the longest."""
    for position in POSITION_NAMES:
        for model, precision, policy, contexts in (
            ("small", "bf16", "none", (1024, 3072)), ("small", "bf16", "block", (6144,)), ("mini", "fp32", "none", (2048,)),
            ("mini", "bf16", "none", (512, 5120)), ("small", "bf16", "selective", (6144,)), ("medium", "bf16", "none", (2048,)),
        ):  # fmt: skip
            if position in ("rope", "alibi", "nope") or (model == "small" and policy != "selective"):
                at = point(model, position, recompute=policy, precision=precision)  # type: ignore[arg-type]
                yield replace(at, device="cuda", vocab_size=GPU_VOCAB), contexts
    long = point("small", "rope", recompute="block", precision="bf16")
    yield replace(long, device="cuda", vocab_size=GPU_VOCAB), (65_536,)


def cuda() -> None:
    """As `grid`, several points at once; then whether steps run where they have a little more, and less, than is predicted."""
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        steps = [_at(at, context) for at, contexts in gpu_points() for context in contexts]
        running = [pool.submit(run_point, step, "memory", TIMEOUT) for step in steps]
        for step, result in zip(steps, running):
            rows.append(_compared(Predictor(step).memory(step.context), step, result.result()))
            print(json.dumps(rows[-1]), flush=True)
        print(json.dumps(summary(rows)))
        limited = []
        for step, row in zip(steps, rows):
            if row["status"] == "done" and step.position["name"] in HELD and step.context >= 3072:
                for share in (ENOUGH, TOO_LITTLE):
                    limit = round(share * row["predicted_bytes"]) + row["idle_bytes"]
                    with_limit = replace(step, memory_limit=limit)
                    limited.append((step, share, pool.submit(run_point, with_limit, "memory", TIMEOUT)))
        for step, share, found in limited:
            print(json.dumps({**_said(step), "room": share, "status": found.result()["status"]}), flush=True)


def _compared(predicted: Prediction, step: Point, result: Mapping[str, Any]) -> dict[str, Any]:
    """A row: the prediction, what was measured, and how far they are apart; on a GPU beside the idle process's own bytes what was
    allocated, where what is measured is what the allocator took for that."""
    row = {
        **_said(step), "predicted_bytes": round(predicted.bytes), "way": predicted.way,
        "measured_bytes": result.get("peak_memory_bytes"), "status": result["status"],
    }  # fmt: skip
    if result["status"] == "done":
        row["error_bytes"] = row["predicted_bytes"] - row["measured_bytes"]
        row["error"] = round(row["error_bytes"] / row["measured_bytes"], 5)
        if "allocated_bytes" in result:
            row["allocated_bytes"] = result["allocated_bytes"]
            row["allocated_error"] = round(row["predicted_bytes"] / row["allocated_bytes"] - 1, 5)
            row["idle_bytes"] = result["total_bytes"] - result["peak_memory_bytes"]
    else:
        row["reason"] = result.get("reason")
    return row


def _said(step: Point) -> dict[str, Any]:
    return {
        "model": step.model["name"], "position": step.position["name"], "recompute": step.recompute,
        "context": step.context, "device": step.device, "precision": step.precision,
    }  # fmt: skip


def budget() -> None:
    """Mini: the longest context that is predicted to fit trains a step within the budget, 1.1 times that does not."""
    for position, memory in BUDGETS:
        at = point("mini", position)
        longest = Predictor(at).longest(memory)
        for name, context in (("predicted longest", longest), ("1.1 times that", int(1.1 * longest))):
            result = run_point(_at(at, context), "memory", TIMEOUT)
            used = result.get("peak_memory_bytes")
            row = {
                "budget": name, "position": position, "memory": memory, "context": context,
                "measured_bytes": used, "status": result["status"], "fits": used is not None and used <= memory,
            }  # fmt: skip
            print(json.dumps(row), flush=True)


def naive() -> None:
    """Nano without positions: how activation bytes grow with the context where scores are kept and where they are not.

    What is no activation is left out as it is predicted; a + b L^p from 1,024 tokens on leaves it out by itself.
    """
    rows: list[dict[str, Any]] = []
    for name, attention in (("naive", "naive"), ("fused", "full")):
        at = point("nano", "nope", attention=attention)
        predictor = Predictor(at)
        found: list[tuple[int, float]] = []
        for context in (512, 1024, 2048, 4096):
            used = run_point(_at(at, context), "memory", TIMEOUT)["peak_memory_bytes"]
            split = predictor.memory(context).split
            activations = used - sum(split[kind] for kind in OTHERS)
            found.append((context, activations))
            row = {
                "attention": name,
                "context": context,
                "measured_bytes": used,
                "activation_bytes": round(activations),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
        near, middle, far = (used for _, used in found[-3:])
        beyond = math.log2((far - middle) / (middle - near))
        row = {"fit": name, "law": "a + b L^p from 1,024 tokens on", "p": round(beyond, 3)}
        print(json.dumps(row), flush=True)
        fit = power_law(found)
        print(
            json.dumps(
                {"fit": name, "exponent": round(fit.exponent, 3), "low": round(fit.low, 3), "high": round(fit.high, 3)}
            )
        )
    save_growth(rows, results_folder("memory_scaling") / "growth.png")


def _at(at: Point, context: int) -> Point:
    return replace(at, context=context)


def main(words: Sequence[str]) -> None:
    if words[:1] == ["budget"]:
        budget()
    elif words[:1] == ["naive"]:
        naive()
    elif words[:1] == ["cuda"]:
        cuda()
    else:
        precision = "bf16" if "bf16" in words else "fp32"
        grid([word for word in words if word != precision] or MODELS, precision)


if __name__ == "__main__":
    run_script(main)
