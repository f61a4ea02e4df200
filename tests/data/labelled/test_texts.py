"""Labelled texts: what is read, what is held out, which number a label has; bad lines in one line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from ctxlab.data.labelled.classification import Classification, Labelled
from ctxlab.data.labelled.texts import LabelDataset
from ctxlab.errors import DataError
from tests.data.labelled.builders import lines, texts


def read(path: Path, **settings: object) -> list[Labelled]:
    return list(Classification(Classification.Config(path=str(path), **settings)).examples("path"))  # type: ignore[arg-type]


def written(dataset: LabelDataset, split: str) -> set[tuple[str, str]]:
    part = dataset.splits[split]
    decoded = (dataset.tokenizer.decode(part.text.sentence(index).tolist()) for index in range(part.n))
    return {(text, dataset.labels[int(label)]) for text, label in zip(decoded, part.label, strict=True)}


def test_columns_headers_and_packed_files(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("label\tid\ttext\ngood\t1\tVa !\n\nbad\t2\tnon\r\n", encoding="utf-8")
    with gzip.open(tmp_path / "a.tsv.gz", "wt", encoding="utf-8") as file:
        file.write("good\t1\tVa !\nbad\t2\tnon")
    columns = {"text_column": 3, "label_column": 1}
    expected = [Labelled("Va !", "good"), Labelled("non", "bad")]
    assert read(tmp_path / "a.tsv", header=True, **columns) == expected
    assert read(tmp_path / "a.tsv", **columns) == [Labelled("text", "label"), *expected]
    assert read(tmp_path / "a.tsv.gz", **columns) == expected


def test_every_text_is_on_one_side_with_its_label(tmp_path: Path) -> None:
    given = {tuple(line.split("\t")) for line in lines()}
    dataset = texts(tmp_path, lines() + lines()[:50])  # copies
    parts = [written(dataset, name) for name in ("train", "validation", "test")]
    assert parts[0] | parts[1] | parts[2] == given
    assert sum(map(len, parts)) == len(given), "no copy stands on two sides"
    assert dataset.labels == ("bad", "good")
    assert len(parts[2]) == 10  # 5% of 200
    counts = dataset.facts["splits"]["train"]["labels"]
    assert sum(counts.values()) == dataset.splits["train"].n
    assert dataset.facts["majority_label"] == max(counts, key=lambda label: counts[label])


def test_a_test_file_is_the_test_and_may_have_labels_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text("so so\tmixed\nfine\tgood\n")
    dataset = texts(tmp_path, test_path=str(tmp_path / "test.tsv"))
    assert written(dataset, "test") == {("so so", "mixed"), ("fine", "good")}
    assert dataset.labels == ("bad", "good", "mixed")
    assert dataset.splits["validation"].n == 10


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (["a text without a label"], "line 1 of {} has 1 column between tabs, and column 2 is asked for"),
        (["one\tgood", "two\t "], "line 2 of {} has no label"),
        (["one\tgood", "\tbad"], "line 2 of {} has no text"),
        ([f"text {n}\tgood" for n in range(200)], "{} has one label only ('good'), which leaves nothing to tell"),
        ([f"text {n}\t{n}" for n in range(10_200)], "column 2 of {} has more than 10,000 different labels"),
        ([f"text {n}\t{n % 2}" for n in range(63)], "63 different texts are too few to hold some out; 64 are enough"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_in_one_line(tmp_path: Path, found: list[str], said: str) -> None:
    with pytest.raises(DataError) as error:
        texts(tmp_path, found)
    assert said.format(tmp_path / "texts.tsv") in str(error.value)
    assert str(error.value).startswith("data.")
    assert "\n" not in str(error.value)


def test_one_column_cannot_be_both(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.label_column: column 1 is the text's own"):
        texts(tmp_path, label_column=1)
