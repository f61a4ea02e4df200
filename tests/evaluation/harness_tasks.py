"""Tasks for lm-evaluation-harness that need no network: a YAML and a file of items each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

CHOICES = [
    {"question": "a b", "choices": ["c", "dd", "e f"], "gold": 0},
    {"question": "b b a ", "choices": ["c", "cc", "ccc"], "gold": 1},
    {"question": "", "choices": ["a", "bb", "c"], "gold": 2},
    {"question": "f e d c", "choices": ["x", "y", "z z"], "gold": 2},
    {"question": "one two", "choices": ["three", "four", "five"], "gold": 0},
]
TEXTS = ["a b c\n", "the quick brown fox jumps over the lazy dog, " * 4, "ça va? déjà vu"]
PROMPTS = ["a b", "the quick brown fox", "", "f e d c"]


def write_task(folder: Path, name: str, items: Sequence[Any], **settings: Any) -> None:
    """folder/NAME.yaml over folder/NAME.json."""
    data = folder / f"{name}.json"
    data.write_text(json.dumps(items), encoding="utf-8")
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "metadata": {"version": 1.5},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | settings), encoding="utf-8")


def metrics(*names: str, **more: Any) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True, **more} for name in names]


def write_choices(folder: Path, name: str = "choices", items: Sequence[Any] = CHOICES, **settings: Any) -> None:
    task = {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold", "target_delimiter": "", "metric_list": metrics("acc", "acc_norm"),
    }  # fmt: skip
    write_task(folder, name, items, **task | settings)


def write_texts(folder: Path, name: str = "texts") -> None:
    ratios = [("word_perplexity", "weighted_perplexity"), ("byte_perplexity", "weighted_perplexity")]
    ratios += [("bits_per_byte", "bits_per_byte")]
    write_task(
        folder, name, [{"text": text} for text in TEXTS], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": m, "aggregation": a, "higher_is_better": False} for m, a in ratios],
    )  # fmt: skip


def write_answers(folder: Path, targets: Sequence[str], name: str = "answers", **asked: Any) -> None:
    items = [{"prompt": prompt, "target": target} for prompt, target in zip(PROMPTS, targets, strict=True)]
    write_task(
        folder, name, items, output_type="generate_until", doc_to_text="{{prompt}}", doc_to_target="{{target}}",
        generation_kwargs={"until": ["\x03"], "max_gen_toks": 12} | asked, metric_list=metrics("exact_match"),
    )  # fmt: skip
