"""Accuracy, mean F1 and counts of labels against values worked out by hand, and what a known model is given for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctxlab.evaluation.classification import (
    ClassificationConfig,
    confusion,
    evaluate_classification,
    macro_f1,
    summary,
)
from ctxlab.model.heads import LabelHead
from ctxlab.train.objectives.classification import Classification
from tests.data.labelled.builders import texts

# Three labels and one that never occurs: rows are what is right, columns what was said.
COUNTS = np.array([[3, 1, 0, 0], [0, 2, 0, 0], [2, 0, 2, 0], [0, 0, 0, 0]])


def test_counts_are_by_label_and_choice() -> None:
    wanted = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    said = np.array([0, 0, 0, 1, 1, 1, 0, 0, 2, 2])
    assert (confusion(wanted, said, 4) == COUNTS).all()


def test_accuracy_and_mean_f1_by_hand() -> None:
    accuracy, f1 = summary(COUNTS, axes={})
    assert accuracy.value == 7 / 10
    # F1 = 2 hits / (of the label + given it): 6 / (4 + 5), 4 / (2 + 3), 4 / (4 + 2)
    assert f1.value == pytest.approx((6 / 9 + 4 / 5 + 4 / 6) / 3, abs=1e-12)
    # Wilson's interval of 7 of 10
    assert (accuracy.low, accuracy.high) == pytest.approx((0.39677, 0.89221), abs=1e-4)
    assert f1.low < f1.value < f1.high  # type: ignore[operator]


def test_the_interval_is_that_of_texts_drawn_with_replacement() -> None:
    """The same through another road: draw the texts themselves, not their counts."""
    _, f1 = summary(COUNTS * 10, axes={})
    cells = np.repeat(np.arange(16), (COUNTS * 10).ravel())
    random = np.random.default_rng(7)
    drawn = []
    for _ in range(4000):
        some = np.bincount(random.choice(cells, size=len(cells)), minlength=16).reshape(4, 4)
        drawn.append(float(macro_f1(np.diag(some), some.sum(0) + some.sum(1))))
    assert (f1.low, f1.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.01)


class Reader(torch.nn.Module):
    """Says that a text is good where it holds the letter i (fine), in which of its labels ever that is."""

    def __init__(self, labels: tuple[str, ...], letter: int) -> None:
        super().__init__()
        self.letter = letter
        self.task_head = LabelHead(len(labels), labels, "first", 0.0)
        torch.nn.init.eye_(self.task_head.choose.weight)
        self.good, self.bad = labels.index("good"), labels.index("bad")

    def hidden(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        found = torch.zeros(*tokens.shape, len(self.task_head.labels))
        is_good = (tokens == self.letter).any(1)
        found[torch.arange(len(tokens)), 0, torch.where(is_good, self.good, self.bad)] = 1.0
        return found


@pytest.mark.parametrize("labels", [("bad", "good"), ("a", "good", "bad")])
def test_labels_are_told_by_name(tmp_path: Path, labels: tuple[str, ...]) -> None:
    (tmp_path / "test.tsv").write_text("a fine film\tgood\na poor one\tbad\nno film, i think\tbad\nso so\tmixed\n")
    dataset = texts(tmp_path, test_path=str(tmp_path / "test.tsv"))
    model: Any = Reader(labels, dataset.tokenizer.encode("i")[0])
    rows, items = evaluate_classification(
        model, dataset, Classification(Classification.Config()), ClassificationConfig(batch_tokens=30), context=64,
        device=torch.device("cpu"), precision="fp32", learned={"majority_label": "bad"},
    )  # fmt: skip
    found = {(m.name, m.axes.get("baseline")): m.value for m in rows if m.name != "examples"}
    assert found["accuracy", None] == 2 / 4
    assert found["accuracy", "majority"] == 2 / 4
    # good 2 * 1 / (1 + 2), bad 2 * 1 / (2 + 2), mixed 0
    assert found["macro_f1", None] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3, abs=1e-12)
    counts = {(m.axes["label"], m.axes["said"]): m.value for m in rows if m.name == "examples"}
    assert counts == {("good", "good"): 1, ("bad", "bad"): 1, ("bad", "good"): 1, ("mixed", "bad"): 1}
    assert [item.answer for item in items] == ["good", "bad", "good", "bad"]
    assert [item.score for item in items] == [1, 1, 0, 0]
    assert items[2].wanted == ("no film, i think", "bad")
