"""The numbers of a README are held to its results, and a changed digit is found."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.study.claims import check, claims, numbers
from ctxlab.study.readme import Study
from tests.records.builders import costs, result, scores
from tests.study.builders import make_study

TEXT = """a table, no rows: 1.83
{"scheme": "fox", "context": 512, "time": 1.83, "step_seconds": 0.5034, "peak_bytes": 204472320}
{"scheme": "rope", "context": 512, "time": 1.004, "step_seconds": 0.481, "peak_bytes": 203423744}
"""
JSON = json.dumps({"scheme": "fox", "heads": 4, "seconds": 0.5034, "share": 0.125, "count": 12, "zero": 0}) + "\n"
LOSS = 3.56749


def rows(*measurements: object) -> str:
    return "".join(m.model_dump_json() + "\n" for m in measurements)  # type: ignore[attr-defined]


def study(root: Path, findings: str, above: str = "") -> Study:
    moved = result(
        "nats_per_token", 3.6, 1024, facts={"difference": 0.08, "difference_low": 0.05, "difference_high": 0.11}
    )
    strided = result("nats_per_token", 3.4, 256, axes={"stride": 64}, protocol="overlapping")
    files = {
        "results/look.txt": TEXT,
        "results/plain.jsonl": JSON,
        "results/tiny-rope-256-aaaa.jsonl": rows(*scores(256, LOSS), *scores(1024, LOSS + 0.0692), strided),
        "results/tiny-fox-256-bbbb.jsonl": rows(*scores(256, 3.25), *costs(256, 3 * 2**30, 0.0125)),
        "results/summary.jsonl": rows(moved),
        "results/figure.png": "",
    }
    return make_study(root, findings=findings, above=above, files=files)


ROPE = "results/tiny-rope-256-aaaa.jsonl"
HELD = [
    '[1.83](results/look.txt "512 fox time") times',
    '[1.8x](results/look.txt "512 time fox"), rounded once more',
    'a step of [503 ms](results/look.txt "fox step_seconds"), or [0.503 s](results/look.txt "fox step_seconds")',
    '[195 MiB](results/look.txt "512 fox peak_bytes") and [203,423,744 B](results/look.txt "512 rope peak_bytes")',
    '[1.005](results/look.txt "fox peak_bytes / rope peak_bytes") times as much',
    f'[3.567]({ROPE} "nats_per_token context=256 protocol=non-overlapping")',
    f'[3.637]({ROPE} "nats_per_token 1024")',
    f'[3.637 ± 0.050]({ROPE} "nats_per_token 1024")',
    f'[3.400]({ROPE} "nats_per_token stride=64")',
    f'rises by [+0.069]({ROPE} "nats_per_token 1024 - nats_per_token 256 segment=2048")',
    'is [0.911](results "fox nats_per_token 256 / rope nats_per_token 256 segment=2048") of it',
    f'[9]({ROPE} "nats_per_token 1024 n_docs") documents',
    '[0.080 ± 0.030](results/summary.jsonl "1024 difference")',
    '[3.00 GiB](results/tiny-fox-256-bbbb.jsonl "peak_memory_bytes") in [12.5 ms](results "tiny-fox-256 step_seconds")',
    '[503 ms](results/plain.jsonl "fox seconds"), [12.5%](results/plain.jsonl "fox share")',
    '[12](results/plain.jsonl "heads=4 count")',
    "| scheme | 512: `time` | 512: `peak_bytes` |\n|---|---|---|\n| fox | 1.83 | 195 MiB |",
]


@pytest.mark.parametrize("findings", HELD)
def test_what_the_results_have_is_held(tmp_path: Path, findings: str) -> None:
    if findings.startswith("|"):
        findings = f"Against RoPE ([rows](results/look.txt)):\n\n{findings}"
    found, wrong = check(study(tmp_path, findings))
    assert (found > 0, wrong) == (True, [])


@pytest.mark.parametrize("findings", HELD)
def test_another_last_digit_is_not(tmp_path: Path, findings: str) -> None:
    """Each number in turn, its last digit one higher."""
    if findings.startswith("|"):
        findings = f"Against RoPE ([rows](results/look.txt)):\n\n{findings}"
    whole = study(tmp_path, findings)
    text = whole.readme.read_text(encoding="utf-8")
    for claim in claims(whole):
        printed = claim.number.text
        for old, new in changed(text, printed):
            whole.readme.write_text(new, encoding="utf-8")
            _, wrong = check(Study(whole.folder))
            assert len(wrong) == 1, f"{old} went unnoticed in {findings}"


def changed(text: str, printed: str) -> list[tuple[str, str]]:
    """The text with one more in the last digit of a number: where it stands in a link's text or a cell."""
    last = max(n for n, character in enumerate(printed) if character.isdigit())
    other = printed[:last] + str((int(printed[last]) + 1) % 10) + printed[last + 1 :]
    places = [f"[{printed}]", f"[{printed} ±", f"± {printed}]", f"| {printed} |"]
    found = [(place, text.replace(place, place.replace(printed, other))) for place in places if place in text]
    assert found
    return found


@pytest.mark.parametrize(
    ("findings", "said"),
    [
        ("It takes 1.83 times as long.", "1.83 names no row of results/"),
        ("In 17 of them.", "17 names no row of results/, and is no whole number stated above Findings"),
        ("At 8 GiB.", "8 GiB names no row"),
        ("`1.83` times", "1.83 names no row"),
        ("```\n1.83\n```", "1.83 names no row"),
        ("1.5-2.5 times", "2.5 names no row"),
        ("| a | b |\n|---|---|\n| x | 1.83 |", "1.83 names no row"),
        ("### Below\n\n1.83", "1.83 names no row"),
        ("## Discussion\n\n1.83", "1.83 names no row"),
        (
            '[1.83](results/look.txt "513 fox time")',
            "1.83: no rows of results/look.txt have '513 fox time'; one is needed",
        ),
        ('[1.83](results/look.txt "512 time")', "1.83: 2 rows of results/look.txt have '512 time'"),
        ("[1.83](results/look.txt)", "1.83: 2 rows of results/look.txt have ''"),
        (
            '[1.83](results/look.txt "512 fox")',
            "1.83: results/look.txt has no such number at '512 fox'; name one of its fields",
        ),
        ('[1.84](results/look.txt "512 fox time")', "1.84: results/look.txt has 1.83 at '512 fox time'"),
        ('[195 ms](results/look.txt "512 fox peak_bytes")', "195 ms: results/look.txt has 2.04472e+08 bytes at"),
        ('[1.83 s](results/look.txt "512 fox time")', "1.83 s: results/look.txt has 1.83 at"),
        ('[195k](results/look.txt "512 fox peak_bytes")', "195k: results/look.txt has"),
        ('[1.83 ± 0.10](results/look.txt "512 fox time")', "0.10: results/look.txt has no such number"),
        ('[1.83](results/gone.txt "512 fox")', "there is no results/gone.txt"),
        ("![it](results/gone.png)", "there is no results/gone.png"),
        (f'[3.5]({ROPE} "nats_per_token 256 stride=64")', "3.5: results/tiny-rope-256-aaaa.jsonl has 3.4 at"),
        (f'[0.070]({ROPE} "nats_per_token 1024 - nats_per_token 256 segment=2048")', "has 0.0692 at"),
        (f'[-0.069]({ROPE} "nats_per_token 1024 - nats_per_token 256 segment=2048")', "has 0.0692 at"),
        ('[1.83](results/look.txt "512 fox - 512 rope")', "has no such number at '512 fox'"),
        ('[1.83](results/look.txt "fox time - rope time - fox time")', "expected one row, or two"),
        ('[1.83](results/look.txt "fox time / plain zero")', "no rows of results/look.txt"),
        ('[1.83](results "fox time / fox zero")', "'fox time / fox zero' divides by zero"),
        ('[0.050 ± 0.010](results/summary.jsonl "difference - difference")', "half of an interval is of one row"),
    ],
)
def test_what_is_not_held_says_why(tmp_path: Path, findings: str, said: str) -> None:
    _, wrong = check(study(tmp_path, findings, above="Trained for 150 steps on 8 plays at 1,024 tokens."))
    assert any(said in problem for problem in wrong), wrong
    assert all(problem.startswith(f"{tmp_path}/experiments/mine/README.md:") for problem in wrong)


@pytest.mark.parametrize(
    "findings",
    [
        "At 150 steps, over 8 plays and 1,024 tokens, nothing.",
        "T5's bias, bf16, AVX512-bf16, GPT-2 and tiny-rope-256-aaaa are names.",
        "`context=256` is a setting, and [a link](https://arxiv.org/abs/2108.12409) is no number.",
        "One seed, six schemes.",
        "![Loss by context](results/figure.png)",
        "",
    ],
)
def test_settings_and_names_are_no_findings(tmp_path: Path, findings: str) -> None:
    assert check(study(tmp_path, findings, above="Trained for 150 steps on 8 plays at 1,024 tokens.")) == (0, [])


def test_a_setting_is_a_whole_number_with_its_unit(tmp_path: Path) -> None:
    _, wrong = check(study(tmp_path, "3.5 nats, 150 ms, 150%", above="150 steps, 3.5 million parameters"))
    assert [problem.split(": ")[1].split(" names")[0] for problem in wrong] == ["3.5", "150 ms", "150%"]


def test_a_table_by_context_and_run(tmp_path: Path) -> None:
    table = """Loss ([files](results "nats_per_token segment=2048")):

| position | 256 | 1,024 | 1,024 - 256 | run |
|---|---|---|---|---|
| rope | 3.567 | 3.637 | +0.069 | tiny-rope-256-aaaa |
| fox | 3.250 | undefined | undefined | tiny-fox-256-bbbb |
"""
    assert check(study(tmp_path, table)) == (4, [])
    for wrong in ("3.568 | 3.637", "3.567 | 3.567", "3.250 | 3.637"):
        cells = (
            table.replace("3.567 | 3.637", wrong) if wrong[:5] != "3.250" else table.replace("3.250 | undefined", wrong)
        )
        assert len(check(study(tmp_path, cells))[1]) == 1, wrong
    swapped = table.replace("tiny-rope-256-aaaa", "tiny-fox-256-bbbb").replace("| rope", "| fox")
    assert len(check(study(tmp_path, swapped))[1]) == 3


def test_a_table_with_a_metric_a_column(tmp_path: Path) -> None:
    table = """[One run](results/tiny-rope-256-aaaa.jsonl "segment=2048"):

| context | `nats_per_token` | `perplexity` |
|---|---|---|
| 256 | 3.567 ± 0.050 | 35.43 |
| 1,024 | 3.637 ± 0.050 | 37.97 |
"""
    assert check(study(tmp_path, table)) == (6, [])
    assert len(check(study(tmp_path, table.replace("37.97", "37.98")))[1]) == 1


@given(
    value=st.decimals(-(10**6), 10**6, allow_nan=False, allow_infinity=False, places=6),
    decimals=st.integers(0, 4),
    wrong=st.integers(1, 9),
)
def test_a_number_holds_to_its_printed_digits(value: Decimal, decimals: int, wrong: int) -> None:
    """Printed by Python itself it holds; with any other last digit it does not."""
    printed = f"{value:,.{decimals}f}"
    (number,) = numbers(printed)
    assert number.prints(value) or not number.value
    last = int(printed[-1])
    (other,) = numbers(printed[:-1] + str((last + wrong) % 10))
    assert not other.prints(value)


def test_digits_of_names_are_no_numbers() -> None:
    assert [n.text for n in numbers("T5 bf16 GPT-2 v1.2 tiny-256-ab x_3")] == []
    text = "-1.5, +2 and −3; 4-5, 1,024 and 2e-3 (6) 7% 8x 9 ms ±0.1"
    assert [(str(n.value), n.unit) for n in numbers(text)] == [
        ("-1.5", ""), ("2", ""), ("-3", ""), ("4", ""), ("5", ""), ("1024", ""), ("0.002", ""), ("6", ""), ("7", "%"),
        ("8", "x"), ("9", "ms"), ("0.1", ""),
    ]  # fmt: skip
    assert numbers("±0.1")[0].is_half
