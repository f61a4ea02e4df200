"""Memory of a training step: predicted and measured, for a budget, and with and without the matrix of scores.

    python experiments/memory_scaling/memory_scaling.py            prediction against measurement
    python experiments/memory_scaling/memory_scaling.py budget     the longest context that should fit, and 1.1 times that
    python experiments/memory_scaling/memory_scaling.py naive      attention that keeps its scores against attention that does not

Prints a JSON object a line. Words after the first name models (nano, tiny, mini): only those are measured.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ctxlab.cli.environment import set_thread_defaults

set_thread_defaults()  # before torch is imported

import naive as _naive  # noqa: F401  registers attention=naive
import yaml
from pictures import save_errors, save_growth

from ctxlab.config.catalog import conf_dir
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.remake import Recompute
from ctxlab.profiling.fit import OTHERS, power_law
from ctxlab.profiling.measure import Point, run_point
from ctxlab.profiling.predict import Predictor
from ctxlab.study.script import results_folder, run_script

MODELS = ("nano", "tiny", "mini")
POSITION_NAMES = ("rope", "alibi", "nope", "t5", "kerple", "fox")
LARGE = 256e6  # bytes, from which on the error counts as a share
BUDGETS = (("rope", 2**30), ("alibi", 2**30), ("t5", 2**30), ("rope", 2**32))
TIMEOUT = 1800


def point(model: str, position: str, *, recompute: Recompute = "none", attention: str = "full") -> Point:
    sizes = yaml.safe_load((conf_dir() / "model" / f"{model}.yaml").read_text())
    return Point(
        model=ModelConfig.model_validate_json(json.dumps(sizes)).model_dump(mode="json"),
        position=POSITIONS.config({"name": position}).model_dump(mode="json"),
        attention={"name": attention},
        optim={"name": "muon"},
        vocab_size=2048,
        context=256,
        precision="fp32",
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


def grid(models: Sequence[str]) -> None:
    """One row a point, then what all of them say together."""
    rows: list[dict[str, Any]] = []
    for model, position, policy, contexts in points(models):
        if model not in models:
            continue
        at = point(model, position, recompute=policy)
        predictor = Predictor(at)
        for context in contexts:
            predicted = predictor.memory(context)
            result = run_point(_at(at, context), "memory", TIMEOUT)
            row = {
                "model": model, "position": position, "recompute": policy, "context": context, "device": "cpu",
                "precision": "fp32", "predicted_bytes": round(predicted.bytes), "way": predicted.way,
                "measured_bytes": result.get("peak_memory_bytes"), "status": result["status"],
            }  # fmt: skip
            if result["status"] == "done":
                row["error_bytes"] = row["predicted_bytes"] - row["measured_bytes"]
                row["error"] = round(row["error_bytes"] / row["measured_bytes"], 5)
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(json.dumps(summary(rows)))
    save_errors(rows, LARGE, results_folder("memory_scaling") / "errors.png")


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all points say together: errors as a share of large steps, in bytes of small ones."""
    done = [row for row in rows if row["status"] == "done"]
    large = [abs(row["error"]) for row in done if row["measured_bytes"] >= LARGE]
    small = [abs(row["error_bytes"]) for row in done if row["measured_bytes"] < LARGE]
    return {
        "summary": "all",
        "n_points": len(rows),
        "n_done": len(done),
        "n_large": len(large),
        "median_error": round(statistics.median(large), 5) if large else None,
        "worst_error": max(large, default=None),
        "n_small": len(small),
        "worst_bytes": max(small, default=None),
    }


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
    else:
        grid(words or MODELS)


if __name__ == "__main__":
    run_script(main)
